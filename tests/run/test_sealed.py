"""A sealed test domain: its accuracies are in sealed.jsonl alone until `--unseal` reads them."""

import json
import re
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from domainbed_kd import results
from domainbed_kd.console import run_main
from domainbed_kd.folder import files
from domainbed_kd.scripts import collect_results, list_top_hparams, report, sweep, train

FLAGS = ["--algorithm", "ERM", "--test_envs", "1", "--steps", "3", "--checkpoint_freq", "1",
         "--diagnostics"]
OF_TEST = re.compile(r"env1_(in|out)_acc|env1_ece|env1_acc|acc/env1|selected/test")


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """Images in three domains, so many that no two accuracies are likely to be the same."""
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    draw = np.random.RandomState(0)
    for domain in "abc":
        for label in ("cat", "dog"):
            Path("mine", domain, label).mkdir(parents=True)
            for i in range(20):
                pixels = draw.randint(256, size=(8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(Path("mine", domain, label, f"{i}.png"))


def trained(folder, *flags):
    hparams = {"batch_size": 4, "image_size": 32, "wrn_depth": 10, "wrn_widen": 1}
    assert train.main(["--dataset", "Folder:mine", "--data_dir", ".", *FLAGS, "--hparams",
                       json.dumps(hparams), "--output_dir", folder, *flags]) == 0
    return [json.loads(line) for line in Path(folder, "results.jsonl").read_text().splitlines()]


def curves_of(folder):
    """The names of the curves in a run's event files, and all bytes of these."""
    events = EventAccumulator(str(folder)).Reload()
    raw = b"".join(path.read_bytes() for path in Path(folder).glob("events*"))
    return events.Tags()["scalars"], raw


def refused(main, argv, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: main(argv))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err, err


def test_nothing_but_sealed_jsonl_says_how_good_a_run_is_on_its_test_domain(capsys):
    sealed = trained("sealed/run", "--seal")
    plain = trained("plain/run")
    for name in ("results.jsonl", "out.txt", "err.txt"):
        assert not OF_TEST.search(Path("sealed/run", name).read_text())
        assert "env0_out_acc" in Path("sealed/run", name).read_text() or name == "err.txt"
    tags, raw = curves_of("sealed/run")
    assert not [tag for tag in tags if "env1" in tag or "test" in tag] and "acc/env0/in" in tags
    assert not OF_TEST.search(raw.decode("latin1"))
    # What is sealed and what is not are together what a run records that is not sealed.
    hidden = [json.loads(line) for line in Path("sealed/run/sealed.jsonl").read_text().splitlines()]
    for record, more, whole in zip(sealed, hidden, plain, strict=True):
        both = record | more | {"diagnostics": record["diagnostics"] | more["diagnostics"]}
        assert all(name.startswith("env1_") for name in more["diagnostics"])
        assert both.keys() == whole.keys()
        assert all(both[name] == whole[name] for name in whole if name.endswith("_acc"))


def test_only_unseal_reads_it_and_every_look_is_written_down(capsys):
    trained("sealed/run", "--seal")
    trained("plain/run")
    argv = ["--input_dir", "sealed"]
    cell = ["--dataset", "Folder:mine", "--algorithm", "ERM", "--test_env", "1"]
    for main, more in ((collect_results.main, []), (report.main, []),
                       (list_top_hparams.main, cell)):
        refused(main, [*argv, *more], "of 1 of its runs are sealed, for example of run.", capsys)
    assert not Path("sealed/looks.jsonl").exists()
    frame = results.to_frame("sealed")
    assert frame["test_acc"].isna().all() and frame["val_acc"].notna().all()
    assert frame["selected"].tolist() == results.to_frame("plain")["selected"].tolist()
    capsys.readouterr()
    for n in (1, 2):
        assert collect_results.main([*argv, "--unseal"]) == 0
        out, err = capsys.readouterr()
        assert f"Unsealed 1 runs. This is look {n} at test accuracies" in err
        looks = [json.loads(line) for line in Path("sealed/looks.jsonl").read_text().splitlines()]
        assert [look["runs"] for look in looks] == [["run"]] * n
    collect_results.main(["--input_dir", "plain"])
    assert out == capsys.readouterr().out


def test_a_look_that_cannot_be_written_down_is_not_had(monkeypatch, capsys):
    trained("sealed/run", "--seal")
    Path("sealed/looks.jsonl").mkdir()
    refused(collect_results.main, ["--input_dir", "sealed", "--unseal"], "looks.jsonl", capsys)


@pytest.mark.slow
def test_a_sealed_sweep_shows_nothing_in_its_status(capsys):
    flags = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1",
             "--single_test_envs", "--steps", "2", "--hparams", '{"batch_size": 4}', "--seal",
             "--skip_confirmation", "--output_dir", "sweep"]
    assert sweep.main(["launch", *flags]) == 0
    assert len(list(Path("sweep").glob("*/sealed.jsonl"))) == 3
    capsys.readouterr()
    assert sweep.main(["status", "sweep"]) == 0
    assert "acc" not in capsys.readouterr().out


def test_a_sealed_run_that_was_killed_ends_as_one_that_was_not(monkeypatch):
    whole = trained("whole", "--seal")
    append, calls = files.append_record, []

    def die(folder, record, name=files.RESULTS):
        append(folder, record, name)
        calls.append(name)
        if len(calls) == 3:  # sealed, but not yet recorded
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_record", die)
        with pytest.raises(KeyboardInterrupt):
            trained("killed", "--seal")
    assert [record["step"] for record in trained("killed", "--seal")] == [0, 1, 2]
    for run in ("whole", "killed"):
        shutil.move(run, f"both/{run}")
    from domainbed_kd.results.records import Folder

    one, other = Folder("both").curves(unseal=True)
    assert one.columns == other.columns and len(one.columns["step"]) == len(whole)


def test_a_sealed_run_is_not_shown_to_tensorboard_either(capsys):
    refused(train.main, [*FLAGS, "--seal", "--log_test_domains"], "Leave one out", capsys)
