import json
import shutil

import pytest
import torch
from conftest import golden
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from domainbed_kd.folder import args as flags
from domainbed_kd.folder import files
from domainbed_kd.scripts import collect_results, sweep, train

# It stops in its first stage after 50 updates, as the rate has come down, and in its second too.
SHORT = ["--auto_lr", "--algorithm", "ERMPlusPlus", "--dataset", "Debug28", "--steps", "300",
         "--checkpoint_freq", "5", "--seed", "5", "--trial_seed", "1",
         "--hparams", '{"batch_size": 2, "lr": 0.002, "linear_steps": 4}']


def run(folder, *words):
    assert train.main([*words, "--output_dir", str(folder)]) == 0
    return records_in(folder)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("quiet")
    run(folder, *SHORT)
    return folder


def timeless(records):
    return [{k: v for k, v in r.items() if k not in ("step_time", "args")} for r in records]


@pytest.mark.parametrize("name", [
    "plain", "two_test_envs", "balanced", "uda", pytest.param("averaged", marks=pytest.mark.slow)])
def test_both_stages_leave_the_records_that_domainbeds_train_autolr_leaves(name, tmp_path):
    theirs = [json.loads(line) for line in golden(f"train_autolr/{name}.jsonl").splitlines()]
    asked = {k: v for k, v in theirs[0]["args"].items() if k != "output_dir"} | {"auto_lr": True}
    ours = run(tmp_path, *flags.words(asked))
    # If the rate never comes down far enough, DomainBed crashes before its last record.
    n = len(theirs)
    assert len(ours) == n + (name == "uda")
    total, updates = 0.0, 0
    for our, their in zip(ours, theirs):
        assert our.keys() == their.keys()
        if our["step"] == 0:
            total, updates = 0.0, 0
        total += our["loss"] * (our["step"] + 1 - updates)
        updates = our["step"] + 1
        # The means of its first stage are over all steps so far.
        is_first = "env0_in_acc" in our
        assert (total / updates if is_first else our["loss"]) == pytest.approx(
            their["loss"], rel=1e-5)
        accuracies = [key for key in their if key.endswith("_acc")]
        for key in (*accuracies, "step", "epoch", "lr", "hparams"):
            assert our[key] == their[key], key
        assert our["args"]["holdout_fraction"] == their["args"]["holdout_fraction"]


@pytest.mark.parametrize("n_records", [4, 15, 17])
def test_a_run_killed_in_either_stage_ends_in_the_same_bits(
        n_records, quiet, tmp_path, monkeypatch):
    n_first = sum("env0_in_acc" in record for record in records_in(quiet))
    assert 4 < n_first < 15 < 17 < len(records_in(quiet))
    append, calls = files.append_record, []

    def append_and_die(*args):
        calls.append(append(*args))
        if len(calls) == n_records:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "append_record", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.main([*SHORT, "--output_dir", str(tmp_path)])
    monkeypatch.undo()
    assert timeless(run(tmp_path, *SHORT)) == timeless(records_in(quiet))
    ours, theirs = (torch.load(folder / "model.pkl", weights_only=True)
                    for folder in (tmp_path, quiet))
    assert ours["args"]["holdout_fraction"] == 0
    for name, value in theirs["model_dict"].items():
        assert torch.equal(ours["model_dict"][name], value), name


def test_a_finished_run_of_two_stages_is_known_and_another_is_not_mixed_in(quiet, capsys):
    before = records_in(quiet)
    assert run(quiet, *SHORT) == before
    assert "holds this run, finished" in capsys.readouterr().err
    with pytest.raises(ValueError, match="holds another run .*holdout_fraction 0.2 instead of"):
        run(quiet, *SHORT, "--holdout_fraction", "0.3")


def test_curves_of_the_second_stage_follow_those_of_the_first_and_show_no_test_domain(quiet):
    n_first = sum("env0_in_acc" in record for record in records_in(quiet))
    events = EventAccumulator(str(quiet))
    events.Reload()
    first = [event.step for event in events.Scalars("acc/env1/in")]
    second = [event.step for event in events.Scalars("acc/fd/env1/in")]
    assert len(first) == n_first
    assert second[0] > first[-1]
    assert [event.step for event in events.Scalars("train/lr")] == first + second
    assert not {"acc/fd/env0/in", "acc/env0/in"} & set(events.Tags()["scalars"])


def test_extras_are_of_the_stage_that_holds_images_out(tmp_path):
    records = run(tmp_path, *SHORT, "--diagnostics", "--save_logits", "--fast")
    first = [r for r in records if "env0_in_acc" in r]
    assert all("diagnostics" in record for record in first)
    assert {path.name for path in (tmp_path / "logits").iterdir()} == {
        f"step{record['step']}.npz" for record in first}
    second = records[len(first):]
    assert second
    assert all({k for k in r if k.endswith("_acc")} == {"fd_env0_in_acc"} for r in second)


def test_the_test_accuracy_of_the_second_stage_is_what_auto_lr_tabulates(quiet, tmp_path, capsys):
    shutil.copytree(quiet, tmp_path / "run")
    assert collect_results.main(["--input_dir", str(tmp_path), "--auto_lr", "--upstream"]) == 0
    last = records_in(quiet)[-1]["fd_env0_in_acc"]
    assert f"{100 * last:.1f} +/- 0.0" in capsys.readouterr().out


@pytest.mark.parametrize("main, words", [
    (train.main, ["--algorithm", "ERM", "--dataset", "Debug28"]),
    (sweep.main, ["launch", "--algorithms", "ERMPlusPlus", "ERM", "--datasets", "Debug28"])])
def test_other_algorithms_are_refused_in_one_line(main, words, tmp_path):
    with pytest.raises(ValueError, match="^--auto_lr: ERM does not take it.*ERMPlusPlus") as error:
        main([*words, "--auto_lr", "--output_dir", str(tmp_path / "run")])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
