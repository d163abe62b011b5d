"""Whatever a user types, or whatever has happened to a file: one line, exit 2, nothing lost."""

import errno
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDENS, ROOT
from PIL import Image

from domainbed_kd import __main__ as cli
from domainbed_kd import algorithms, checkpoints
from domainbed_kd.console import run_main
from domainbed_kd.folder import files

TRAIN = ["train", "--dataset", "Debug28", "--steps", "1", "--hparams", '{"batch_size": 4}',
         "--output_dir", "run"]
SWEEP = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1",
         "--output_dir", "sweep", "--skip_confirmation"]
LAUNCH, STATUS, DELETE, PLAN = (["sweep", command, *SWEEP]
                                for command in ("launch", "status", "delete_incomplete", "plan"))
REPORT = ["report", "--input_dir", "results"]
COLLECT = ["collect_results", "--input_dir", "results"]
LIST = ["list_top_hparams", "--input_dir", "results", "--dataset", "VLCS", "--algorithm", "ERM",
        "--test_env", "0"]
DOWNLOAD = ["download", "--data_dir", "data"]
SLURM = ["--command_launcher", "slurm", "--slurm_cluster", "local"]
RAY = ["--command_launcher", "ray"]
SWEEPS = ROOT / "sweeps"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory with the results of a sweep, and no network to wait for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shutil.copytree(GOLDENS / "sweep_data", "results")
    Path("classes", "dog").mkdir(parents=True)
    return tmp_path


def said(argv, capsys):
    """(exit status, stdout, stderr) of a command, run here."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: cli.dispatch(list(argv)))
    return ended.value.code, *capsys.readouterr()


def refused(argv, message, capsys):
    status, _, err = said(argv, capsys)
    assert status == 2, err
    assert err.count("\n") == 1 and err.startswith("error: ") and message in err, err


def contents(folder):
    return {path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command, flags, message", [
    # Unknown names, with the nearest known.
    (TRAIN, ["--algorithm", "MosaikKD"], "Did you mean MosaicKD?"),
    (TRAIN, ["--algorithm", "mosaickd"], "Did you mean MosaicKD?"),
    (TRAIN, ["--dataset", "DigitDG"], "Did you mean DigitsDG?"),
    (TRAIN, ["--dataset", "results", "--data_dir", "."], "say Folder:results"),
    (TRAIN, ["--task", "generalization"], "Did you mean domain_generalization?"),
    (TRAIN, ["--resum", "sometimes"], "invalid choice"),
    (TRAIN, ["--hparam_seed", "1"], "Did you mean --hparams_seed?"),
    (TRAIN, ["--testenv=1"], "unrecognized arguments: --testenv=1. Did you mean --test_envs?"),
    (TRAIN, ["1"], "unrecognized arguments: 1."),
    (TRAIN, ["--plugin", "no_such_plugin"], "no_such_plugin"),
    (TRAIN, ["--plugin", "../.."], "takes a .py file or a module's dotted name, the latter"),
    (TRAIN, ["--plugin", "absent.py"], "there is no such file"),
    (LAUNCH, ["--algorithms", "erm", "rise"], "Did you mean ERM?"),
    (LAUNCH, ["--algorithms", "ERM", "RISSE"], "Did you mean RISE?"),
    (LAUNCH, ["--datasets", "results", "--data_dir", "."], "say Folder:results"),
    (LAUNCH, ["--comand_launcher", "local"], "Did you mean --command_launcher?"),
    (COLLECT, ["--latx"], "Did you mean --latex?"),
    (["collect_results", "--inputdir", "results"], [], "Did you mean --input_dir?"),
    (LAUNCH, ["--datasets", "OficeHome"], "Did you mean OfficeHome?"),
    (LAUNCH, ["--command_launcher", "multigpu"], "Did you mean multi_gpu?"),
    (STATUS, ["--algorithms", "SCDM"], "Did you mean SCMD?"),
    (DELETE, ["--datasets", "DomainNett"], "Did you mean DomainNet?"),
    (LIST, ["--algorithm", "ERN"], "it has"),
    (LIST, ["--dataset", "VLC"], "it has VLCS"),
    (DOWNLOAD, ["--datasets", "PASC"], "Did you mean PACS?"),
    (DOWNLOAD, ["--list", "--datasets", "PACSS"], "Did you mean PACS?"),
    (DOWNLOAD, ["--datasets", "pacs"], "Did you mean PACS?"),
    (["sweep", "lunch", *SWEEP], [], "Did you mean launch?"),
    (["collect_result"], [], "Did you mean collect_results?"),
    # Hparams out of range.
    (TRAIN, ["--hparams", '{"lr": -1, "batch_size": 4}'], "ERM: lr is -1; it takes at least 0."),
    (TRAIN, ["--algorithm", "Transfer", "--hparams", '{"d_steps_per_g": 1' + "0" * 30
             + ', "batch_size": 4}'], "it takes a number from 0 to 1000."),
    (TRAIN, ["--algorithm", "KD", "--hparams", '{"kd_temperature": 0, "batch_size": 4}'],
     "KD: kd_temperature is 0; it takes a number above 0."),
    # Wrong types, and numbers that are negative, absurd or not numbers.
    (TRAIN, ["--steps", "ten"], "invalid int value: 'ten'"),
    (TRAIN, ["--steps", "1.5"], "invalid int value"),
    (TRAIN, ["--steps", "-1"], "--steps is -1"),
    (TRAIN, ["--checkpoint_freq", "-1"], "--checkpoint_freq is -1"),
    (TRAIN, ["--holdout_fraction", "nan"], "--holdout_fraction is nan"),
    (TRAIN, ["--holdout_fraction", "inf"], "--holdout_fraction is inf"),
    (TRAIN, ["--holdout_fraction", "0.9999"], "less than a batch of 4"),
    (TRAIN, ["--uda_holdout_fraction", "nan"], "--uda_holdout_fraction is nan"),
    (TRAIN, ["--seed", "-1"], "--seed is -1"),
    (TRAIN, ["--seed", str(10**30)], "--seed is 1000"),
    (TRAIN, ["--loader_processes", "-1"], "--loader_processes is -1"),
    (TRAIN, ["--gpu_image_gb", "-1"], "--gpu_image_gb is -1.0"),
    (TRAIN, ["--gpu_image_gb", "nan"], "--gpu_image_gb is nan"),
    (TRAIN, ["--gpu_image_gb", "inf"], "--gpu_image_gb is inf"),
    (LAUNCH, ["--n_trials", "0"], "--n_trials is 0"),
    (LAUNCH, ["--n_hparams", "-3"], "--n_hparams is -3"),
    (LAUNCH, ["--holdout_fraction", "nan"], "--holdout_fraction is nan"),
    (LAUNCH, ["--steps", "1e3"], "invalid int value"),
    (LAUNCH, ["--jobs_per_device", "0"], "--jobs_per_device is 0"),
    (PLAN, ["--budget", "nan"], "--budget is nan"),
    (PLAN, ["--budget", "3"], "--hours_per_run"),
    (PLAN, ["--hours_per_run", "1e999"], "--hours_per_run is inf"),
    (PLAN, ["--algorithms", "SCDM"], "Did you mean SCMD?"),
    (STATUS, ["--watch", "-1"], "--watch is -1"),
    (LAUNCH, ["--retry", "-1"], "--retry is -1"),
    (LAUNCH, ["--command_launcher", "slurm", "--slurm_cpus", "0"], "--slurm_cpus is 0"),
    (LAUNCH, ["--command_launcher", "slurm", "--slurm_parallel", "-1"], "--slurm_parallel is -1"),
    (LAUNCH, ["--command_launcher", "ray", "--ray_cpus", "nan"], "--ray_cpus is nan"),
    (LAUNCH, ["--ray_gpus", "0.5"], "does not take --ray_gpus. It is for --command_launcher ray."),
    (LAUNCH, ["--slurm_time", "9"], "does not take --slurm_time. It is for --command_launcher sl"),
    (LAUNCH, [*RAY, "--slurm_gpus", "1"], "ray does not take --slurm_gpus"),
    (LAUNCH, [*SLURM, "--ray_gpus", "1"], "slurm does not take --ray_gpus"),
    (LAUNCH, [*SLURM, "--jobs_per_device", "2"], "slurm does not take --jobs_per_device"),
    (LAUNCH, [*SLURM, "--slurm_gpus", "-1"], "--slurm_gpus is -1"),
    (LAUNCH, [*SLURM, "--slurm_time", "-5"], "--slurm_time is -5"),
    (LAUNCH, [*SLURM, "--slurm_time", "1.5"], "invalid int value"),
    (LAUNCH, [*SLURM, "--slurm_extra", "{"], "--slurm_extra is not JSON"),
    (LAUNCH, [*SLURM, "--slurm_extra", "[1]"], "--slurm_extra takes a JSON object"),
    (LAUNCH, [*SLURM, "--slurm_extra", ""], "--slurm_extra is not JSON"),
    (LAUNCH, [*SLURM, "--slurm_extra", '{"slurm_acount": "me"}'], "acount"),
    (LAUNCH, [*SLURM, "--slurm_extra", '{"mem_gb": "a lot"}'], "mem_gb"),
    (LAUNCH, [*SLURM[:2]], "finds no sbatch on this machine"),
    (LAUNCH, [*RAY, "--ray_gpus", "-0.5"], "--ray_gpus is -0.5"),
    (LAUNCH, [*RAY, "--ray_address", "head"], "takes auto, or HOST:PORT"),
    (LAUNCH, [*RAY, "--ray_address", "head:port"], "takes auto, or HOST:PORT"),
    (LAUNCH, [*RAY, "--ray_address", "127.0.0.1:99999"], "takes auto, or HOST:PORT"),
    (LAUNCH, [*RAY, "--ray_address", "127.0.0.1:1"], "nobody answers there"),
    (LAUNCH, ["--slurm_cluster", "lsf"], "invalid choice"),
    (LAUNCH, ["--teacher_cache", "views"], '{"canonical_view": true}'),
    (TRAIN, ["--teacher_cache", "views"], '{"canonical_view": true}'),
    (TRAIN, ["--compile"], "--fast"),
    (COLLECT, ["--compare", "ERN"], "ERN"),
    (REPORT, ["--input_dir", "absent"], "there is no such folder"),
    (REPORT, ["--output", "/proc/nowhere/report.html"], "/proc/nowhere"),
    (TRAIN, ["--wait", "nan"], "--wait is nan"),
    (STATUS, ["--n_trials", "-1"], "--n_trials is -1"),
    (LIST, ["--test_env", "one"], "invalid int value"),
    (LIST, ["--test_env", "7"], "--test_env 7"),
    # Test envs out of range, twice, or all.
    (TRAIN, ["--test_envs", "3"], "environments 0 to 2"),
    (TRAIN, ["--test_envs", "-1"], "environments 0 to 2"),
    (TRAIN, ["--test_envs", "0", "0"], "twice"),
    (TRAIN, ["--test_envs", "0", "1", "2"], "no environment is left"),
    (TRAIN, ["--test_envs"], "expected at least one argument"),
    # JSON that is none, and hparams of no use.
    (TRAIN, ["--hparams", "{"], "--hparams is not JSON"),
    (TRAIN, ["--hparams", "[" * 5000], "--hparams is not JSON"),
    (TRAIN, ["--hparams", "3"], "takes a JSON object"),
    (TRAIN, ["--hparams", '{"lr": NaN}'], "NaN is not a finite number"),
    (TRAIN, ["--hparams", '{"lr": 1e400}'], "1e400 is not a finite number"),
    (TRAIN, ["--hparams", '{"lr": "fast"}'], "it takes a float"),
    (TRAIN, ["--hparams", '{"batch_size": -4}'], "at least 1"),
    (TRAIN, ["--hparams", '{"batch_size": 1000000000}'], "less than a batch"),
    (TRAIN, ["--hparams", '{"averaging": "swadd", "batch_size": 4}'], "swadd"),
    (TRAIN, ["--algorithm", "RSC", "--hparams", '{"rsc_b_drop_factor": -1, "batch_size": 4}'],
     "rsc_b_drop_factor is -1"),
    (TRAIN, ["--algorithm", "Fishr", "--hparams", '{"ema": 1.0, "batch_size": 4}'],
     "Fishr fails with --hparams"),
    (LAUNCH, ["--hparams", '{"mended": true}'], "mended has nothing to fix in ERM"),
    (LAUNCH, ["--hparams", '{"lr": Infinity}'], "Infinity is not a finite number"),
    (STATUS, ["--hparams", "lr=1"], "--hparams is not JSON"),
    # Folders and files that are not what they should be.
    (TRAIN, ["--output_dir", "file"], "file"),
    (TRAIN, ["--output_dir", ""], "--output_dir is empty; it takes a folder."),
    (LAUNCH, ["--output_dir", ""], "--output_dir is empty; it takes a folder."),
    (STATUS, ["--output_dir", ""], "--output_dir is empty; it takes a folder."),
    (LAUNCH, ["--n_trials", "1000000000"], "make 1000000000 runs"),
    (TRAIN, ["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
    (TRAIN, ["--output_dir", "a\0b"], "null byte"),
    (TRAIN, ["--dataset", "PACS", "--data_dir", "absent"], "absent"),
    (TRAIN, ["--dataset", "PACS"], "--data_dir"),
    (TRAIN, ["--dataset", "Folder:../x", "--data_dir", "."], "without a path"),
    (TRAIN, ["--algorithm", "KDDG", "--teacher", "absent"], "no finished run"),
    (TRAIN, ["--algorithm", "KDDG", "--teacher", "results"], "no finished run"),
    (TRAIN, ["--teacher", "absent"],
     "ERM does not learn from a run. Leave the flag out, or choose one of FourDs, KD,"),
    (TRAIN, ["--algorithm", "RISE", "--teacher", "absent"], "RISE does not learn from a run"),
    (TRAIN, ["--fork", "absent"], "--fork: absent is not a folder that holds"),
    (LAUNCH, ["--fork", "results"], "--fork: results is not a folder that holds"),
    (TRAIN, ["--dataset", "Folder:classes", "--data_dir", "."],
     "classes holds folders (dog) without folders in them, where domains with classes should be. "
     "Images belong in classes/<domain>/<class>/."),
    (LAUNCH, ["--output_dir", "file"], "is a file"),
    (LAUNCH, ["--output_dir", "/proc/nowhere"], "/proc/nowhere"),
    (LAUNCH, ["@absent.args"], "@absent.args: No such file"),
    (LAUNCH, [f"@{SWEEPS}/pacs_smal.args"], "pacs_small.args?"),
    (LAUNCH, ["@results"], "@results: No such file"),
    (STATUS, [], "--output_dir sweep: there is no such folder"),
    (DELETE, [], "--output_dir sweep: there is no such folder"),
    (LAUNCH, ["--datasets", "PACS", "--data_dir", "absent"], "absent"),
    (DELETE, ["--output_dir", "file"], "is a file"),
    (COLLECT, ["--input_dir", "absent"], "there is no such folder"),
    (COLLECT, ["--input_dir", "file"], "there is no such folder"),
    (COLLECT, ["--format", "html"], "invalid choice"),
    (COLLECT, ["--latex", "--format", "csv"], "contradict"),
    (LIST, ["--input_dir", "absent"], "there is no such folder"),
    (DOWNLOAD, ["--datasets", "Debug28"], "no files to fetch"),
    (["download", "--datasets", "PACS"], [], "--data_dir is required"),
])
def test_bad_input_is_one_line_and_changes_nothing(command, flags, message, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    before = contents(tmp_path)
    refused([*command, *flags], message, capsys)
    after = {path: content for path, content in contents(tmp_path).items()
             if path.parts[0] != "run"}  # a run's folder keeps what it said
    assert after == before


@pytest.mark.parametrize("flags", [
    ["--algorithm", "erm"], ["--dataset", "Pets"], ["--hparams", "{"], ["--test_envs", "3"],
    ["--test_envs", "0", "1", "2"], ["--dataset", "PACS", "--data_dir", "absent"],
    ["--dataset", "Folder:results", "--data_dir", "absent"], ["--plugin", "absent.py"],
    ["--no_such_flag"]])
def test_a_slip_in_a_runs_flags_makes_no_folder(flags, tmp_path, capsys):
    status, out, _ = said([*TRAIN, *flags], capsys)
    assert (status, out) == (2, "") and not (tmp_path / "run").exists()


def test_a_runs_names_are_checked_before_torch_is_imported(tmp_path):
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "domainbed_kd", *TRAIN, "--algorithm", "erm"],
        capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(SWEEPS.parent)})
    assert ran.returncode == 2 and ran.stderr.splitlines()[-1].startswith("error: Algorithm not")
    assert "argparse" in ran.stderr and "| torch" not in ran.stderr


def test_in_a_folder_that_is_there_it_is_noted_what_was_wrong(tmp_path, capsys):
    (tmp_path / "run").mkdir()  # as a sweep makes it
    refused([*TRAIN, "--plugin", "absent.py"], "there is no such file", capsys)
    assert "there is no such file" in (tmp_path / "run" / "failed").read_text()


@pytest.mark.parametrize("flags, message", [
    (["--ray_cpus", "999"], "takes 999.0 CPUs"), (["--ray_address", "auto"], "no Ray cluster")])
@pytest.mark.slow
def test_what_a_ray_cluster_refuses_leaves_no_folder(flags, message, ray, tmp_path, capsys):
    status, _, err = said([*LAUNCH, *RAY, *flags], capsys)
    assert status == 2 and message in err and not (tmp_path / "sweep").exists()


def test_a_line_of_flags_that_no_shell_could_read_is_shown(tmp_path, capsys):
    (tmp_path / "my.args").write_text("--hparams '{\n")
    refused([*LAUNCH, "@my.args"], "No closing quotation in a line of the @FILE: --hparams '{",
            capsys)


def test_reports_commands_are_all_tested_here():
    tested = {command[0] for command in (TRAIN, LAUNCH, COLLECT, LIST, DOWNLOAD, REPORT)}
    assert tested <= set(cli.COMMANDS)


# Files that are damaged.


@pytest.fixture
def images(tmp_path):
    """Three domains with two classes of four images, one of which is none."""
    for domain in "abc":
        for label in ("cat", "dog"):
            folder = tmp_path / "mine" / domain / label
            folder.mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (8, 8), (i * 30, 0, 0)).save(folder / f"{i}.png")
    broken = tmp_path / "mine" / "b" / "dog"
    for i in range(8):
        (broken / f"{i}.png").write_bytes(b"no image")
    return ["train", "--dataset", "Folder:mine", "--data_dir", ".", "--steps", "1",
            "--output_dir", "run", "--hparams",
            json.dumps({"batch_size": 4, "image_size": 32, "weights": "none", "resnet18": True})]


@pytest.mark.parametrize("flags", [[], ["--loader_processes", "1"],
                                   ["--loader_processes", "1", "--fast"]])
def test_a_corrupt_image_is_named_also_by_a_loader_process(flags, images, capsys):
    refused([*images, *flags], ".png cannot be read as an image. Replace it.\n", capsys)


def not_root(*words):
    """What a process without root's right to read everything says; its last line on stderr."""
    less = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={less}", f"--inh-caps={less}"] if os.getuid() == 0 else []
    ran = subprocess.run([*drop, sys.executable, *words], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    return ran.stderr.splitlines()[-1]


@pytest.fixture
def forbidden():
    """A function that forbids to read a path until the test ends."""
    changed = []

    def forbid(path, mode=0):
        changed.append((path, path.stat().st_mode))
        path.chmod(mode)

    yield forbid
    for path, mode in reversed(changed):
        path.chmod(mode)


NOT_READ = "Permission denied. You may not read it: have its owner change that, as chmod does."


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root reads all")
def test_what_may_not_be_read_is_said_to_be_so_and_is_not_to_be_replaced(
        images, forbidden, tmp_path):
    image = tmp_path / "mine" / "a" / "dog" / "0.png"
    load = ("from domainbed_kd import console, datasets\n"
            "console.run_main(lambda: datasets.load_image('mine/a/dog/0.png'))")
    forbidden(image)
    assert not_root("-c", load) == f"error: mine/a/dog/0.png: {NOT_READ}"
    forbidden(image.parent)
    assert not_root("-m", "domainbed_kd", *images) == f"error: mine/a/dog: {NOT_READ}"
    results = next(Path("results").glob("*/results.jsonl"))
    forbidden(results)
    forbidden(Path("results"), 0o555)  # may be read
    assert not_root("-m", "domainbed_kd", *TRAIN[:-1], "results/x") == (
        "error: results/x: Permission denied. Choose a folder in which you may write.")
    forbidden(Path("results"))
    assert not_root("-m", "domainbed_kd", *COLLECT) == f"error: results: {NOT_READ}"


def test_a_corrupt_image_is_named_when_the_cache_is_built(images, capsys):
    status, _, err = said([*images, "--loader_processes", "1", "--image_cache", "cache"], capsys)
    began, error = err.splitlines()
    assert status == 2 and began.startswith("Decoding the images of Folder:mine into ")
    assert error == "error: mine/b/dog/0.png cannot be read as an image. Replace it."


def test_a_data_folder_that_is_deleted_ends_the_run_which_goes_on_when_it_is_back(
        images, tmp_path, monkeypatch, capsys):
    folder, results = tmp_path / "mine", tmp_path / "run" / "results.jsonl"
    for i in range(8):
        shutil.copy(folder / "a" / "dog" / f"{i}.png", folder / "b" / "dog")
    command = [*images, "--steps", "4", "--checkpoint_freq", "2"]
    append = files.append_record

    def append_and_delete(*args):
        append(*args)
        folder.rename(tmp_path / "deleted")

    with monkeypatch.context() as patched:
        patched.setattr(files, "append_record", append_and_delete)
        refused(command, "no longer exists. Put the images back", capsys)
    first = results.read_text()
    assert first.count("\n") == 1
    (tmp_path / "deleted").rename(folder)
    assert said(command, capsys)[0] == 0
    lines = results.read_text().splitlines()
    assert lines[0] == first.strip() and [json.loads(line)["step"] for line in lines] == [0, 2, 3]


def test_a_loader_process_that_is_killed_is_said(images, monkeypatch, capsys):
    from domainbed_kd import datasets

    monkeypatch.setattr(datasets.image_folders, "load_image", lambda path: os._exit(9))
    refused([*images, "--loader_processes", "1"], "A loader process ended early", capsys)


def train_until(steps, monkeypatch, capsys, *flags):
    """A run that is cut short after its second record; returns what its folder holds."""
    append, calls = files.append_record, []

    def die(*args):
        append(*args)
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files, "append_record", die)
        status, *_ = said([*TRAIN, "--steps", str(steps), "--checkpoint_freq", "1", *flags], capsys)
        assert status == 130


RESUMED = [*TRAIN, "--steps", "3", "--checkpoint_freq", "1"]


@pytest.mark.parametrize("damage, message", [
    (lambda path: path.write_bytes(b""), "damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "damaged"),
    (lambda path: path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR."), "could run code"),
    (lambda path: checkpoints.save(path, {"args": {}}), "holds another run"),
    (lambda path: checkpoints.save(path, [1]), "does not fit this run"),
])
def test_a_corrupt_state_is_refused_and_loses_no_record(
        damage, message, tmp_path, monkeypatch, capsys):
    train_until(3, monkeypatch, capsys)
    before = (tmp_path / "run" / "results.jsonl").read_bytes()
    damage(tmp_path / "run" / "resume.pt")
    refused(RESUMED, message, capsys)
    assert (tmp_path / "run" / "results.jsonl").read_bytes() == before
    assert not (tmp_path / "hacked").exists()


def test_a_state_whose_records_are_lost_is_refused(tmp_path, monkeypatch, capsys):
    train_until(3, monkeypatch, capsys)
    (tmp_path / "run" / "results.jsonl").write_bytes(b"")
    refused(RESUMED, "records are lost. Delete run/resume.pt", capsys)


def test_what_a_killed_run_left_half_written_goes_and_its_torn_line_is_written_again(
        tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    train_until(3, monkeypatch, capsys)
    whole = (run / "results.jsonl").read_bytes()
    (run / "results.jsonl").write_bytes(whole[:-100])
    (run / "resume.pt.123.tmp").write_bytes(b"half")
    assert said(RESUMED, capsys)[0] == 0
    records = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 1, 2]
    assert not list(run.glob("*.tmp")) and not list(run.glob("*.old"))


def test_the_only_record_of_a_killed_run_is_written_again_and_more_are_set_aside(
        tmp_path, monkeypatch, capsys):
    run = tmp_path / "run"
    for n_records, aside in ((1, []), (2, ["results.jsonl.old"])):
        train_until(3, monkeypatch, capsys)
        (run / "resume.pt").unlink()
        lines = (run / "results.jsonl").read_bytes().splitlines(keepends=True)
        (run / "results.jsonl").write_bytes(b"".join(lines[:n_records]))
        assert said(RESUMED, capsys)[0] == 0
        assert [path.name for path in run.glob("*.old")] == aside
        shutil.rmtree(run)


def test_a_folder_that_has_become_read_only_is_named_and_keeps_its_records(
        tmp_path, monkeypatch, capsys):
    train_until(3, monkeypatch, capsys)
    run, real = tmp_path / "run", Path.open
    before = contents(run)

    def read_only(path, mode="r", *args, **kwargs):  # root may write anywhere, so no chmod
        if set(mode) & set("wax+") and path.parent.name == "run":
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)
    refused(RESUMED, "Read-only file system. Choose a folder in which you may write.", capsys)
    monkeypatch.undo()
    assert contents(run) == before


def test_records_are_appended_after_the_last_whole_line(tmp_path):
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"a": 1}\n{"b": ' + b"2" * 200_000)
    files.append_record(tmp_path, {"c": 3})
    assert path.read_bytes() == b'{"a": 1}\n{"c": 3}\n'
    path.write_bytes(b"torn")
    files.append_record(tmp_path, {"c": 3})
    assert path.read_bytes() == b'{"c": 3}\n'


def test_a_finished_run_with_a_first_line_that_is_none_is_refused(tmp_path, capsys):
    assert said(TRAIN, capsys)[0] == 0
    for text in ("\n", '{"step": 1}\n', "[]\n", "torn"):
        (tmp_path / "run" / "results.jsonl").write_text(text)
        refused(TRAIN, "is not a record", capsys)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\3\4", b"cos\nsystem\n(S'touch hacked'\ntR.",
                                     b"\x80\x04\x95", b"\x80\x02}q\x00."])
def test_a_teacher_whose_model_is_damaged_or_dangerous_is_refused(content, tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "done").write_text("done")
    (tmp_path / "teacher" / "model.pkl").write_bytes(content)
    refused([*TRAIN, "--algorithm", "KDDG", "--teacher", "teacher"], "model.pkl", capsys)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.parametrize("content, message", [
    ([1, 2], "it holds a list"), (torch.zeros(3), "it holds a Tensor"), ({}, "it lacks args"),
    ({"args": [], "model_dict": {}, "model_hparams": {}, "model_input_shape": (3, 28, 28),
      "model_num_classes": 2, "model_num_domains": 2}, "its args is a list"),
    ({"args": {"dataset": "Debug28", "test_envs": [0]}, "model_dict": {}, "model_hparams": {},
      "model_input_shape": (3, 28, 28), "model_num_classes": 2, "model_num_domains": 2},
     "its args do not say what the run trained")])
def test_a_teacher_file_that_holds_no_model_is_said_to(content, message, tmp_path, capsys):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "done").write_text("done")
    torch.save(content, tmp_path / "teacher" / "model.pkl")
    refused([*TRAIN, "--algorithm", "KDDG", "--teacher", "teacher"],
            f"teacher/model.pkl is not the model of a run: {message}", capsys)


@pytest.mark.parametrize("command", [TRAIN, LAUNCH, STATUS])
@pytest.mark.parametrize("name", ["ends.py", "ends"])
def test_a_plugin_that_ends_the_program_is_blamed(command, name, tmp_path, capsys):
    (tmp_path / "ends.py").write_text("import sys\nsys.exit(7)\n")
    (tmp_path / "sweep").mkdir()
    refused([*command, "--plugin", name], f"--plugin {name} ends the program", capsys)


def test_a_method_that_ends_the_program_has_failed_and_that_is_noted(tmp_path, capsys):
    (tmp_path / "ends.py").write_text(
        "import sys\nfrom domainbed_kd.algorithms.erm import ERM\n"
        "class Ends(ERM):\n    def update(self, *_):\n        sys.exit(0)\n")
    refused([*TRAIN, "--plugin", "ends.py", "--algorithm", "Ends"], "sys.exit(0) was called",
            capsys)
    assert "sys.exit(0) was called" in (tmp_path / "run" / "failed").read_text()
    assert not (tmp_path / "run" / "done").exists()


def test_a_folder_whose_name_starts_with_a_dash_is_a_folder(tmp_path, capsys):
    dashed = [*LAUNCH, "--output_dir=-dash", "--single_test_envs", "--steps", "1", "--hparams",
              '{"batch_size": 4}']
    assert said(dashed, capsys)[0] == 0
    assert len(list((tmp_path / "-dash").glob("*/done"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["results.jsonl", "args.json", "out.txt", "err.txt", "failed",
                                  "memory.json", "heartbeat", "sweep.json"])
def test_a_fifo_in_the_place_of_any_file_holds_no_command_up(name, tmp_path):
    single = [*SWEEP, "--single_test_envs", "--steps", "1", "--hparams", '{"batch_size": 4}']
    python = [sys.executable, "-m", "domainbed_kd"]
    listed = subprocess.run([*python, "sweep", "launch", *single, "--command_launcher", "dummy"],
                            capture_output=True, text=True).stdout
    run = Path(re.search(r"--output_dir (\S+)", listed)[1])
    run.mkdir(parents=True)
    if name != "out.txt":
        (run / "out.txt").touch()
    os.mkfifo(run.parent / name if name == "sweep.json" else run / name)
    for command in (["sweep", "status", *single], ["sweep", "launch", *single],
                    ["collect_results", "--input_dir", "sweep"]):
        ran = subprocess.run([*python, *command], capture_output=True, text=True, timeout=90)
        assert ran.returncode in (0, 1, 2) and "Traceback" not in ran.stderr, ran.stderr


@pytest.mark.parametrize("text", [
    "[" * 10000, '{"seconds": 1' + "0" * 400 + "}", '"\\ud800"', '{"a": ' * 400 + "1" + "}" * 400,
    '{"test_envs": [400000000], "dataset": "Debug28", "algorithm": "ERM", "trial_seed": 0, '
    '"hparams_seed": 0}'])
@pytest.mark.parametrize("name", ["results.jsonl", "args.json", "memory.json", "heartbeat"])
def test_json_that_nobody_could_bear_is_skipped_in_every_file(text, name, tmp_path, capsys):
    for folder in ("sweep/a", "sweep/b"):
        Path(folder).mkdir(parents=True)
    line = json.loads(next(Path("results").glob("*/results.jsonl")).read_text().splitlines()[0])
    Path("sweep/b/results.jsonl").write_text(json.dumps(line) + "\n")
    Path("sweep/a/out.txt").touch()
    Path("sweep/a", name).write_text(
        f'{{"step": 1, "args": {text}}}\n' if name == "results.jsonl" else text)
    for command in (STATUS, PLAN, ["collect_results", "--input_dir", "sweep"]):
        status, _, err = said(command, capsys)
        assert status == 0 and "Traceback" not in err, err


def test_a_folder_of_mixed_and_damaged_results_is_read_as_far_as_it_goes(tmp_path, capsys):
    runs = sorted(path for path in (tmp_path / "results").iterdir() if path.is_dir())
    (runs[0] / "results.jsonl").write_bytes(b"\x00\xff{")
    (runs[1] / "results.jsonl").unlink()
    (runs[2] / "results.jsonl").write_text("[]\n" + (runs[2] / "results.jsonl").read_text())
    status, out, err = said(COLLECT, capsys)
    assert status == 0 and "Total records: " in out
    assert len([line for line in err.splitlines() if line.startswith("skipped ")]) >= 3


# Random input.

VALUES = ["-1", "0", "1", "2", "nan", "inf", "1e309", "9" * 40, "0.5", "", "é", "[]", "{}", "/proc",
          "a/../b", "--", " ", "\x00", "true", "ERM", "results", "local"]
JSON_VALUES = [0, -1, 1, 3, 0.1, 1e308, 10**30, None, True, "", "x", [], [1], {}, "tiny", "swad"]


NUMBERS = ["0", "1", "2", "3", "0.25", "0.5", "1e-3", "7", "-1"]
# What would take long, or is in the command already.
LEFT_OUT = ("--steps", "--help", "--watch", "--n_hparams", "--n_trials", "--wandb", "--compile")


def flags_of(command):
    """The flags of a command's parser that have a long form, as argparse's actions."""
    import importlib

    module = importlib.import_module(f"domainbed_kd.scripts.{command}")
    return [action for action in module.build_parser()._actions
            if action.option_strings and action.option_strings[-1].startswith("--")
            and action.option_strings[-1] not in LEFT_OUT]


def random_values(r, action):
    """Three times of four as many values as the flag takes, of a kind that it might take."""
    if r.random() < 0.25:
        return [r.choice(VALUES) for _ in range(r.choice([0, 1, 1, 1, 2]))]
    if action.nargs == 0:
        return []
    known = action.choices or (NUMBERS if action.type in (int, float) else [
        *VALUES, "Debug28", "VLCS", "KDDG", '{"lr": 0.01}', "results", "absent"])
    return [str(r.choice(list(known))) for _ in range(r.choice([1, 1, 2]) if action.nargs else 1)]


def random_argv(r):
    command, = r.choices(["train", "sweep", "collect_results", "list_top_hparams", "download",
                          "report"], [8, 8, 4, 4, 2, 1])
    if command == "train" and r.random() < 0.5:
        algorithm = r.choice(list(algorithms.ALGORITHMS))
        from domainbed_kd import hparams_registry

        names = list(hparams_registry.default_hparams(algorithm, "Debug28"))
        chosen = {r.choice(names): r.choice(JSON_VALUES) for _ in range(r.choice([1, 1, 2]))}
        hparams = {"batch_size": 4, "clip_backbone": "tiny"} | chosen
        return [*TRAIN, "--algorithm", algorithm, "--hparams", json.dumps(hparams)]
    start = {"train": TRAIN, "sweep": r.choice([LAUNCH, STATUS, DELETE, PLAN]),
             "collect_results": COLLECT, "list_top_hparams": LIST,
             "download": r.choice([DOWNLOAD, [*DOWNLOAD, "--verify"]]), "report": REPORT}[command]
    argv = list(start)
    for _ in range(r.choice([1, 1, 2, 3])):
        action = r.choice(flags_of(command))
        argv += [action.option_strings[-1], *random_values(r, action)]
    if start in (STATUS, DELETE) and r.random() < 0.5:
        argv += ["--output_dir", "results"]
    return [*argv, "--command_launcher", "dummy"] if start == LAUNCH else argv


def never_a_traceback(seeds, tmp_path, capsys):
    for seed in seeds:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        argv = random_argv(random.Random(seed))
        status, _, err = said(argv, capsys)  # other exceptions than SystemExit are not caught
        assert status in (0, 1, 2) and "Traceback" not in err, (seed, argv, err)
        if status == 2:
            assert err.splitlines()[-1].startswith("error: "), (seed, argv, err)


def test_random_arguments_never_end_in_a_traceback(tmp_path, capsys):
    never_a_traceback(range(60), tmp_path, capsys)


@pytest.mark.slow
def test_two_thousand_random_arguments_never_end_in_a_traceback(tmp_path, capsys):
    never_a_traceback(range(60, 2000), tmp_path, capsys)


def test_random_damage_to_records_never_ends_in_a_traceback(tmp_path, capsys):
    path = next((tmp_path / "results").glob("*/results.jsonl"))
    whole = path.read_bytes()
    line = json.loads(whole.splitlines()[0])
    for seed in range(150):
        r = random.Random(seed)
        record = json.loads(json.dumps(line))
        target = r.choice([record, record["args"], record["hparams"]])
        name = r.choice(list(target))
        if r.random() < 0.3:
            del target[name]
        else:
            target[name] = r.choice([*JSON_VALUES, float("nan"), -(10**400)])
        damaged = bytearray(json.dumps(record).encode() + b"\n" + whole)
        if r.random() < 0.3:
            damaged[r.randrange(len(damaged))] = r.randrange(256)
        path.write_bytes(damaged)
        for argv in (COLLECT, LIST):
            status, _, err = said(argv, capsys)
            assert status in (0, 2) and "Traceback" not in err, (seed, err)
