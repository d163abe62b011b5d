import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import GOLDENS, golden

from domainbed_kd import datasets
from domainbed_kd.folder import claims, files
from domainbed_kd.run import records
from domainbed_kd.scripts import train

COMMANDS = dict(line.split(": ", 1) for line in golden("train/COMMANDS.txt").splitlines())
KEPT = [name for name in COMMANDS if (GOLDENS / "train" / f"{name}.jsonl").exists()]
NOT_COMPARED = ("step_time", "mem_gb")  # they depend on the machine


def flags_of(name):
    """(number of loader workers, the flags) of a run of DomainBed's train script."""
    workers, flags = COMMANDS[name].split(" ", 1)
    head, hparams = flags.split(" --hparams ")
    hparams, _, tail = hparams.partition("}")
    return (int(workers.removeprefix("N_WORKERS=")),
            [*shlex.split(head), "--hparams", hparams + "}", *shlex.split(tail)])


@pytest.fixture
def two_threads():
    """The goldens' number: the last bits of a convolution's gradient depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def run(folder, *flags):
    status = train.main([*flags, "--output_dir", str(folder)])
    if status == claims.STOPPED:  # e.g. by `timeout`: the signal was meant for the tests
        pytest.exit("a signal ended the tests during a run", status)
    assert status == 0
    return records_in(folder)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def comparable(records):
    """Records without what depends on the machine or the place."""
    return [{k: v for k, v in r.items() if k not in NOT_COMPARED} |
            {"args": {k: v for k, v in r["args"].items() if k != "output_dir"}} for r in records]


@pytest.mark.parametrize("name", KEPT)
def test_a_run_leaves_the_records_that_domainbed_leaves(name, tmp_path, monkeypatch, two_threads):
    workers, flags = flags_of(name)
    monkeypatch.setattr(datasets.get_dataset_class("Debug28"), "N_WORKERS", workers)
    ours = comparable(run(tmp_path, *flags))
    theirs = comparable(map(json.loads, golden(f"train/{name}.jsonl").splitlines()))
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs):
        assert our.keys() == their.keys()
        for key, value in their.items():
            if isinstance(value, float) and not key.endswith("_acc"):
                assert our[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
            else:
                assert our[key] == value, key


@pytest.mark.parametrize("name", KEPT)
def test_a_run_prints_the_lines_that_domainbed_prints(name, tmp_path, monkeypatch):
    workers, flags = flags_of(name)
    monkeypatch.setattr(datasets.get_dataset_class("Debug28"), "N_WORKERS", workers)
    run(tmp_path, *flags)

    def settings_and_headers(text):
        lines = text.splitlines()[8:]  # without the versions
        return [line for line in lines if not line[:1].isdigit() and "output_dir" not in line]

    ours = (tmp_path / "out.txt").read_text()
    assert settings_and_headers(ours) == settings_and_headers(golden(f"train/{name}.out.txt"))


def test_record_fields_have_the_types_that_domainbeds_have(tmp_path):
    record = run(tmp_path, "--dataset", "Debug28", "--steps", "2",
                 "--hparams", '{"batch_size": 8}')[0]
    types = golden("results_jsonl_types.json")
    assert {k: type(v).__name__ for k, v in record.items()} == types["record"]
    assert {k: type(v).__name__ for k, v in record["args"].items()} == types["args"] | {
        "checkpoint_freq": "NoneType"}
    assert {k: type(v).__name__ for k, v in record["hparams"].items()} == types["hparams"]


def test_model_pkl_has_domainbeds_layout_and_loads_without_running_code(tmp_path):
    run(tmp_path, "--dataset", "Debug28", "--steps", "1", "--hparams", '{"batch_size": 8}',
        "--hparams_seed", "1")
    model = torch.load(tmp_path / "model.pkl", weights_only=True)
    expected = golden("model_pkl_erm_debug28.json")
    assert list(model)[:6] == expected["top_level_keys_in_order"]
    assert model["model_input_shape"] == (3, 28, 28)
    assert {k: [list(v.shape), str(v.dtype)] for k, v in model["model_dict"].items()} == \
        expected["model_dict"]


DEBUG = ["--dataset", "Debug28", "--steps", "12", "--checkpoint_freq", "4",
         "--hparams", '{"batch_size": 6}']


@pytest.mark.parametrize("algorithm", ["ERM", "IRM", "DANN", "SWAD", "SMA", "Fish"])
def test_a_run_that_was_stopped_ends_in_the_same_bits(algorithm, tmp_path, monkeypatch):
    flags = [*DEBUG, "--algorithm", algorithm]
    quiet = run(tmp_path / "quiet", *flags)

    stopped = tmp_path / "stopped"
    update, calls = files.append_record, []

    def append_and_die(*args):
        calls.append(update(*args))
        if len(calls) == 3:
            raise KeyboardInterrupt  # after the record, before the state is saved

    monkeypatch.setattr(files, "append_record", append_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.main([*flags, "--output_dir", str(stopped)])
    monkeypatch.undo()
    assert not (stopped / "done").exists()
    assert comparable(run(stopped, *flags)) == comparable(quiet)
    theirs, ours = (checkpoint_tensors(folder) for folder in (tmp_path / "quiet", stopped))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    assert not (stopped / "resume.pt").exists()


def checkpoint_tensors(folder):
    state = torch.load(folder / "model.pkl", weights_only=True)["model_dict"]
    return {k: v for k, v in state.items() if torch.is_tensor(v)}


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_continues(tmp_path):
    command = [sys.executable, "-m", "domainbed_kd.scripts.train", *DEBUG, "--steps", "150",
               "--checkpoint_freq", "50", "--output_dir"]
    subprocess.run([*command, str(tmp_path / "quiet")], check=True, capture_output=True)
    folder = tmp_path / "stopped"
    process = subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (folder / "results.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == claims.STOPPED
    assert "The same command continues." in errors
    subprocess.run([*command, str(folder)], check=True, capture_output=True)
    assert comparable(records_in(folder)) == comparable(records_in(tmp_path / "quiet"))


def test_a_finished_run_is_not_trained_again(tmp_path, capsys):
    run(tmp_path, *DEBUG)
    before = (tmp_path / "results.jsonl").read_bytes()
    run(tmp_path, *DEBUG)
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert "holds this run, finished" in capsys.readouterr().err


def test_another_run_is_not_mixed_into_a_folder(tmp_path):
    run(tmp_path, *DEBUG)
    with pytest.raises(ValueError, match="holds another run .*trial_seed 0 instead of 1"):
        run(tmp_path, *DEBUG, "--trial_seed", "1")


def test_resume_never_appends_as_domainbed_does(tmp_path):
    first = run(tmp_path, *DEBUG)
    assert len(run(tmp_path, *DEBUG, "--resume", "never")) == 2 * len(first)


@pytest.mark.parametrize("flags, message", [
    (["--test_envs", "3"], "Debug28 has environments 0 to 2"),
    (["--test_envs", "0", "1", "2"], "no environment is left"),
    (["--test_envs", "0", "0"], "names an environment twice"),
    (["--steps", "-1"], "--steps is -1"),
    (["--holdout_fraction", "1"], "--holdout_fraction is 1.0"),
    (["--holdout_fraction", "0.01"], "out"),
    (["--uda_holdout_fraction", "-0.1"], "--uda_holdout_fraction is -0.1"),
    (["--task", "domain_adaptation"], "Not enough unlabeled samples"),
    (["--algorithm", "ERMM"], "Did you mean ERM"),
    (["--dataset", "PACSS"], "PACS"),
    (["--dataset", "PACS"], "data_dir"),
    (["--dataset", "PACS", "--data_dir", "absent"], "absent"),
    (["--hparams", "{"], "not JSON"),
    (["--hparams", "[1]"], "takes a JSON object"),
    (["--hparams", '{"batch_size": "8"}'], "batch_size is \"8\", a str; it takes an int"),
    (["--hparams", '{"batch_size": 0}'], "at least 1"),
    (["--hparams", "{}"], "batch"),  # 64 images a step from 13: DomainBed hangs for ever
])
def test_bad_input_is_refused_in_one_line(flags, message, tmp_path):
    command = ["--dataset", "Debug28", "--hparams", '{"batch_size": 8}', "--output_dir",
               str(tmp_path / "run"), *flags]
    with pytest.raises((ValueError, OSError, NotImplementedError)) as error:
        train.main(command)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_input_exits_with_2_and_one_line_on_stderr(tmp_path):
    process = subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.train", "--dataset", "Debug28",
         "--output_dir", str(tmp_path)], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1
    assert (tmp_path / "err.txt").read_text() == process.stderr


def test_an_unknown_hparam_is_taken_with_a_warning_that_names_the_nearest(tmp_path):
    with pytest.warns(UserWarning, match="nothing here reads 'weight_decai'. Did you mean weight_"):
        run(tmp_path, *DEBUG, "--hparams", '{"batch_size": 6, "weight_decai": 1}')


def test_a_run_that_goes_on_counts_the_seconds_of_its_first_attempt(tmp_path):
    assert records.seconds_before(tmp_path, 5) == 0
    (tmp_path / "memory.json").write_text('{"seconds": 60, "steps": 30}')
    assert records.seconds_before(tmp_path, 20) == 40
    for damaged in ("", "[]", '{"seconds": 1}', '{"seconds": 1, "steps": 0}'):
        (tmp_path / "memory.json").write_text(damaged)
        assert records.seconds_before(tmp_path, 5) == 0


def test_a_run_that_diverges_says_so_once_and_since_when_and_goes_on(tmp_path, capsys):
    wild = ["--dataset", "Debug28", "--steps", "12", "--hparams", '{"batch_size": 4, "lr": 1e20}']
    run(tmp_path / "each", *wild, "--checkpoint_freq", "1")
    losses = [record["loss"] for record in records_in(tmp_path / "each")]
    first = next(step for step, loss in enumerate(losses) if not abs(loss) < float("inf"))
    assert 0 < first < 10
    capsys.readouterr()
    run(tmp_path / "rare", *wild, "--checkpoint_freq", "10")
    err = capsys.readouterr().err
    assert err.startswith(f"ERM has diverged: loss is {losses[first]} since step {first}. The run ")
    assert err.count("\n") == 1 and (tmp_path / "rare" / "err.txt").read_text() == err
    assert [record["step"] for record in records_in(tmp_path / "rare")] == [0, 10, 11]
    assert (tmp_path / "rare" / "done").exists()
    assert "diverged" in json.loads((tmp_path / "rare" / "memory.json").read_text())


def test_a_run_leaves_the_memory_that_it_held_beside_its_records(tmp_path):
    records = run(tmp_path, "--dataset", "Debug28", "--steps", "1", "--skip_model_save",
                  "--hparams", '{"batch_size": 4}')
    memory = json.loads((tmp_path / "memory.json").read_text())
    assert memory["gpu_mb"] == pytest.approx(1024 * records[-1]["mem_gb"])
    with open("/proc/self/status") as file:
        peak_kb = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    assert 0 < memory["rss_mb"] <= 1.05 * peak_kb / 1024
    assert memory["steps"] == 1 and memory["seconds"] >= records[-1]["step_time"]
    assert memory["threads"] == torch.get_num_threads()
    assert not {"rss_mb", "memory", "seconds"} & set(records[-1])  # the keys are DomainBed's
