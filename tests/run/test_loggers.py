import json
import struct
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from domainbed_kd.folder import files
from domainbed_kd.results import selection
from domainbed_kd.scripts import sweep, train

FLAGS = ["--dataset", "Debug28", "--steps", "10", "--checkpoint_freq", "3", "--test_envs", "2",
         "--holdout_fraction", "0.5", "--hparams", '{"batch_size": 4, "lr": 0.01}']


def run(folder, *flags):
    assert train.main([*FLAGS, *flags, "--output_dir", str(folder)]) == 0
    return records_in(folder)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(records):
    return [{k: v for k, v in r.items() if k not in ("step_time", "mem_gb", "args")}
            for r in records]


def curves(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)}
            for name in events.Tags()["scalars"]}


def hparams_pages(folder):
    events = EventAccumulator(str(folder)).Reload()
    found = []
    for metadata in events.summary_metadata.values():
        if metadata.plugin_data.plugin_name == "hparams":
            found.append(plugin_data_pb2.HParamsPluginData.FromString(metadata.plugin_data.content))
    starts = [p.session_start_info for p in found if p.HasField("session_start_info")]
    return starts, [p.experiment for p in found if p.HasField("experiment")]


@pytest.fixture(scope="module")
def open_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("open")
    return folder, run(folder, "--algorithm", "IRM", "--log_test_domains", "--diagnostics")


def test_every_number_of_a_record_is_a_curve(open_run):
    folder, records = open_run
    drawn = curves(folder)
    names = {"loss": "train/loss", "nll": "train/nll", "penalty": "train/penalty",
             "step_time": "time/step_s", "mem_gb": "memory/gb", "epoch": "epoch"}
    names |= {f"env{i}_{split}_acc": f"acc/env{i}/{split}"
              for i in range(3) for split in ("in", "out")}
    for key, curve in names.items():
        assert drawn[curve] == pytest.approx({r["step"]: r[key] for r in records}, rel=1e-6), curve
    for key in ("weight_distance", "env2_ece", "mutual_information_class"):
        assert drawn[f"diagnostics/{key}"] == pytest.approx(
            {r["step"]: r["diagnostics"][key] for r in records}, rel=1e-6)
    assert drawn["acc/validation"] == pytest.approx(
        {r["step"]: (r["env0_out_acc"] + r["env1_out_acc"]) / 2 for r in records}, rel=1e-6)


def test_the_selected_accuracies_are_those_of_model_selection_so_far(open_run):
    folder, records = open_run
    drawn = curves(folder)
    for n, record in enumerate(records, 1):
        chosen = selection.IIDAccuracySelectionMethod.run_acc(records[:n])
        assert drawn["selected/validation"][record["step"]] == pytest.approx(chosen["val_acc"])
        assert drawn["selected/test"][record["step"]] == pytest.approx(chosen["test_acc"])


def test_the_hparams_page_gets_one_row_with_the_final_metrics(open_run):
    folder, records = open_run
    (start,), (experiment,) = hparams_pages(folder)
    values = {name: getattr(v, v.WhichOneof("kind")) for name, v in start.hparams.items()}
    assert values["algorithm"] == "IRM" and values["test_envs"] == "[2]"
    assert values["lr"] == 0.01 and values["batch_size"] == 4
    assert {"trial_seed", "hparams_seed", *records[0]["hparams"]} <= values.keys()
    metrics = {info.name.tag for info in experiment.metric_infos}
    assert metrics == {"selected/validation", "selected/test"} and metrics <= curves(folder).keys()


def test_test_domains_are_shown_only_on_request(tmp_path):
    run(tmp_path, "--diagnostics")
    names = curves(tmp_path)
    assert "acc/env1/out" in names and "diagnostics/env1_ece" in names
    assert not any("env2" in name or "test" in name for name in names)
    _, (experiment,) = hparams_pages(tmp_path)
    assert [info.name.tag for info in experiment.metric_infos] == ["selected/validation"]


def test_a_restarted_run_has_one_value_a_step_and_one_row(tmp_path, monkeypatch):
    append, calls = files.append_record, []

    def append_and_die(*args):
        calls.append(append(*args))
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "append_record", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert hparams_pages(tmp_path) == ([], [])
    monkeypatch.undo()
    time.sleep(1)  # files of one process are read by name: its second, then 10 before 9
    records = run(tmp_path)
    drawn = curves(tmp_path)
    assert list(drawn["selected/validation"]) == [0, 3, 6, 9]
    best = selection.IIDAccuracySelectionMethod.run_acc(records)["val_acc"]
    assert drawn["selected/validation"][9] == pytest.approx(best)
    assert len(hparams_pages(tmp_path)[0]) == 1


def entries(data):
    """The entries of a LevelDB log, which is what a .wandb file is after 7 bytes of its own."""
    at, entry = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768  # in the block; 6 bytes or fewer are padding
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        entry += data[at + 7:at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last of its fragments
            yield entry
            entry = b""


def logged_by_wandb(folder):
    """(config, history, summary) from the file that `wandb sync` sends."""
    from wandb.proto import wandb_internal_pb2

    path, = folder.glob("wandb/offline-run-*/*.wandb")
    config, history, summary = {}, [], {}

    def values(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                for item in items}

    for entry in entries(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(entry)
        config |= values(record.run.config.update)
        summary |= values(record.summary.update)
        if record.HasField("history"):
            history.append(values(record.history.item))
    return config, history, summary


def test_wandb_gets_the_same_numbers_offline_and_training_the_same_bits(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    without = run(tmp_path / "without")
    records = run(tmp_path / "with", "--wandb")
    assert comparable(records) == comparable(without) and "wandb" not in records[0]["args"]
    ours, theirs = (torch.load(tmp_path / f / "model.pkl", weights_only=True)["model_dict"]
                    for f in ("with", "without"))
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    config, history, summary = logged_by_wandb(tmp_path / "with")
    assert config["algorithm"] == "ERM" and config["lr"] == 0.01
    assert [row["train/loss"] for row in history] == [r["loss"] for r in records]
    assert [row["_step"] for row in history] == [0, 3, 6, 9]
    assert summary["selected/validation"] == max(
        (r["env0_out_acc"] + r["env1_out_acc"]) / 2 for r in records)
    assert not any("env2" in name for row in history for name in row)


def test_without_the_library_wandb_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'domainbed_kd\[wandb\]'"):
        run(tmp_path, "--wandb")


def test_a_sweep_passes_on_what_to_show_and_names_its_folders_as_without(tmp_path, capsys):
    flags = ["launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1",
             "--n_trials", "1", "--single_test_envs", "--command_launcher", "dummy",
             "--output_dir", str(tmp_path)]
    assert sweep.main(flags) == 0
    without = [line for line in capsys.readouterr().out.splitlines() if "Dummy" in line]
    assert sweep.main([*flags, "--wandb", "--log_test_domains"]) == 0
    with_ = [line for line in capsys.readouterr().out.splitlines() if "Dummy" in line]
    assert with_ == [f"{line} --log_test_domains --wandb" for line in without] and without
