import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from domainbed_kd import algorithms, averaging, checkpoints
from domainbed_kd.scripts import train

TRAIN = ["--dataset", "Debug28", "--steps", "3", "--checkpoint_freq", "1",
         "--hparams", '{"batch_size": 4}']


def test_the_bytes_depend_on_the_content_alone(tmp_path):
    content = {"a": torch.arange(3.0), "b": [1, "x", None]}
    checkpoints.save(tmp_path / "one", content)
    checkpoints.save(tmp_path / "two.pkl", content)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two.pkl").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["one", "two.pkl"]


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    checkpoints.save(tmp_path / "x", {"a": 1})

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(tmp_path / "x", {"a": 2})
    assert checkpoints.load(tmp_path / "x") == {"a": 1}
    assert os.listdir(tmp_path) == ["x"]


class Evil:
    def __reduce__(self):
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("name", ["model.pkl", "resume.pt"])
def test_a_fifo_in_the_place_of_a_checkpoint_is_refused_and_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match=f"Not a regular file.*{name}"):
        checkpoints.load(tmp_path / name)


def test_pickled_code_is_refused_with_what_to_do_and_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Evil()}, "evil.pkl")
    with pytest.raises(ValueError, match="evil.pkl .*run code.*system.*load it there once"):
        checkpoints.load(Path("evil.pkl"))
    assert os.listdir(tmp_path) == ["evil.pkl"]


@pytest.mark.parametrize("algorithm", ["ERM", "SMA", "SWAD", "DANN"])
def test_a_model_in_safetensors_predicts_as_the_one_in_model_pkl(algorithm, tmp_path):
    assert train.main([*TRAIN, "--algorithm", algorithm, "--format", "safetensors",
                       "--output_dir", str(tmp_path)]) == 0
    pickled = torch.load(tmp_path / "model.pkl", weights_only=True)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        told = {name: json.loads(value) for name, value in file.metadata().items()}
    assert told.keys() == pickled.keys() - {"model_dict"}
    assert told["args"] == pickled["args"] and told["model_hparams"] == pickled["model_hparams"]
    cls = averaging.averaged(algorithms.get_algorithm_class(told["args"]["algorithm"]),
                             told["model_hparams"].get("averaging"))
    x, logits = torch.randn(5, 3, 28, 28, generator=torch.Generator().manual_seed(0)), []
    for weights, strict in ((pickled["model_dict"], True), (load_file(path), False)):
        model = cls(told["model_input_shape"], told["model_num_classes"],
                    told["model_num_domains"], told["model_hparams"] | {"total_steps": 3}).eval()
        model.load_state_dict(weights, strict=strict)
        with torch.no_grad():
            logits.append(model.predict(x))
    assert torch.equal(*logits)


# A small disk of its own, as far as the kernel lets anybody have one.
SMALL_DISK = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
              'mount -t tmpfs -o "$0" tmpfs "$1" && shift && "$@"; status=$?;'
              'cp "$OUT"/run/*.jsonl "$OUT"/run/resume.pt "$KEEP" 2> /dev/null;'
              "exit $status"]


@pytest.fixture
def may_mount(tmp_path):
    """Skips the test where no file system can be mounted."""
    mount = [*SMALL_DISK[:6], 'mount -t tmpfs tmpfs "$0" && mount -o remount,ro "$0"', tmp_path]
    if not shutil.which("unshare") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")


def on_a_disk(options, folder, kept, *command):
    return subprocess.run(
        [*SMALL_DISK, options, str(folder), *command], capture_output=True, text=True,
        env={**os.environ, "OUT": str(folder), "KEEP": str(kept)})


@pytest.mark.slow
def test_a_full_disk_is_said_in_a_line_and_the_earlier_records_stay_whole(tmp_path, may_mount):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    for folder in (disk, kept):
        folder.mkdir()
    ran = on_a_disk("size=1300k", disk, kept, sys.executable, "-m", "domainbed_kd.scripts.train",
                    *TRAIN, "--steps", "2000", "--output_dir", str(disk / "run"))
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.startswith("error: ") and ran.stderr.count("\n") == 1, ran.stderr
    assert "No space left on device" in ran.stderr
    text = (kept / "results.jsonl").read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert text.endswith("\n") and [record["step"] for record in records] == list(
        range(len(records)))
    if (kept / "resume.pt").exists():
        assert checkpoints.load(kept / "resume.pt")["next_step"] <= len(records)


@pytest.mark.slow
def test_a_sweep_on_a_disk_that_fills_up_keeps_what_was_done_and_says_why_the_rest_failed(
        tmp_path, may_mount):
    script = ('mount -t tmpfs -o size=11500k tmpfs "$0"; "$@"; echo "exit $?";'
              'ls "$0"/*/done; cat "$0"/*/failed; wc -l "$0"/*/results.jsonl')
    # A run leaves 1.5 MB, and needs 9 while its next state is written beside the last.
    ran = subprocess.run(
        [*SMALL_DISK[:6], script, str(tmp_path), sys.executable, "-m", "domainbed_kd", "sweep",
         "launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1",
         "--n_trials", "1", "--steps", "6", "--checkpoint_freq", "2", "--single_test_envs",
         "--hparams", '{"batch_size": 4}', "--skip_confirmation", "--output_dir", str(tmp_path)],
        capture_output=True, text=True)
    assert "exit 1\n" in ran.stdout and "1 of 3 jobs failed:\n" in ran.stderr, ran
    assert ran.stdout.count("/done\n") == 2 and ran.stdout.count("No space left on device") == 1
    assert ran.stdout.count(" 4 /") == 2  # records of each run that is done


# A folder that nobody may write to, root included.
READ_ONLY = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c",
             'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"']


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_in_a_read_only_folder_nothing_is_lost_and_a_line_says_why(tmp_path, may_mount):
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    flags = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--steps", "2",
             "--single_test_envs", "--skip_confirmation", "--hparams", '{"batch_size": 4}',
             "--output_dir", str(sweep)]
    python = [sys.executable, "-m", "domainbed_kd"]
    subprocess.run([*python, "sweep", "launch", *flags, "--n_trials", "1"], check=True,
                   capture_output=True)
    killed = sorted(sweep.iterdir())[0]
    (killed / "done").unlink()
    before = contents(sweep)
    for command, status, message in (
            (["sweep", "launch", *flags, "--n_trials", "2"], 2, "Read-only file system"),
            (["train", *TRAIN, "--output_dir", str(killed)], 2, "Read-only file system"),
            (["collect_results", "--input_dir", str(sweep)], 0, "Read-only file system"),
            (["sweep", "status", *flags, "--n_trials", "2"], 0, "")):
        ran = subprocess.run([*READ_ONLY, str(sweep), *python, *command], capture_output=True,
                             text=True)
        assert ran.returncode == status and "Traceback" not in ran.stderr, ran.stderr
        assert message in (ran.stderr.splitlines() or [""])[-1] and contents(sweep) == before
