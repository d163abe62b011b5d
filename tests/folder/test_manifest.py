import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import GOLDENS

from domainbed_kd import algorithms, command_launchers, datasets
from domainbed_kd.console import run_main
from domainbed_kd.folder import manifest
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import workers

SMALL = ["--datasets", "Debug28", "--algorithms", "ERM", "--n_hparams", "1", "--n_trials", "1",
         "--hparams", '{"batch_size": 4}', "--steps", "3", "--single_test_envs",
         "--command_launcher", "pretend", "--skip_confirmation"]


@pytest.fixture(autouse=True)
def launched(monkeypatch, tmp_path):
    """A launcher called `pretend` that finishes each job but the first, and what it was given."""
    commands = []

    def pretend(received):
        for command in received:
            folder = Path(words_of(command)["--output_dir"])
            (folder / "out.txt").touch()
            if commands:
                (folder / "done").touch()
            commands.append(command)

    monkeypatch.setitem(command_launchers.REGISTRY, "pretend", pretend)
    monkeypatch.chdir(tmp_path)
    return commands


def words_of(command):
    words = workers.words(command)
    return {word: words[i + 1] for i, word in enumerate(words[:-1]) if word.startswith("--")}


def launch(*more):
    assert sweep.main(["launch", *SMALL, "--output_dir", "sweep", *more]) == 0


def rows(capsys, *argv):
    capsys.readouterr()
    assert sweep.main(list(argv)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) == 6 and line[1].isdigit()}


def refused(argv, message, capsys):
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: sweep.main(list(argv)))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and message in err, err


@pytest.mark.parametrize("folder", [["sweep"], ["--output_dir", "sweep"]])
def test_a_sweep_that_was_launched_needs_its_folder_alone(folder, launched, capsys):
    launch()
    assert rows(capsys, "status", *folder) == {
        "ERM": ["2", "0", "1", "0", "0"], "Debug28": ["2", "0", "1", "0", "0"]}
    assert sweep.main(["launch", *folder, "--skip_confirmation"]) == 0
    assert launched[3:] == launched[:1]
    assert sweep.main(["plan", *folder]) == 0
    assert "ERM Debug28: 3 runs, 3 done" in capsys.readouterr().out
    os.unlink(next(Path("sweep").glob("*/done")))
    assert sweep.main(["delete_incomplete", *folder, "--skip_confirmation"]) == 0
    assert rows(capsys, "status", *folder)["ERM"] == ["2", "0", "0", "0", "1"]


def test_flags_that_say_which_runs_there_are_mean_what_they_meant(launched, capsys):
    launch()
    assert rows(capsys, "status", *SMALL, "--n_trials", "2", "--output_dir", "sweep")["ERM"] == [
        "2", "0", "1", "0", "3"]
    assert rows(capsys, "status", "sweep", *SMALL, "--steps", "4")["ERM"] == [
        "0", "0", "0", "0", "3"]
    assert len(launched) == 3


def test_a_folder_and_half_a_description_of_other_runs_are_refused(launched, capsys):
    launch()
    refused(["status", "sweep", "--fast"],
            "sweep says which runs its sweep has, and --fast asks for others", capsys)


def test_flags_that_do_not_say_it_are_taken_in_place_of_the_launchs(launched, capsys):
    launch("--wandb", "--image_cache", "pixels", "--save_logits")
    assert sweep.main(["launch", "sweep", "--skip_confirmation", "--image_cache", "other",
                       "--diagnostics"]) == 0
    words = words_of(launched[3])
    assert words["--image_cache"] == "other" and words["--output_dir"].startswith("sweep/")
    assert {"--wandb", "--diagnostics", "--save_logits"} <= set(workers.words(launched[3]))


def test_a_sweep_is_all_that_was_ever_launched_in_its_folder(launched, capsys):
    launch()
    launch("--algorithms", "SWAD", "KDDG", "--n_trials", "2")
    launch("--save_logits")  # nothing is left to launch
    found = rows(capsys, "status", "sweep")
    assert found["ERM"][0] == "6" and sum(map(int, found["ERM"])) == 6  # 3 of them are teachers
    assert sum(map(int, found["SWAD"])) == sum(map(int, found["KDDG"])) == 6
    assert len(manifest.launches("sweep")) == 2


def test_an_entry_says_when_where_and_with_what_a_sweep_was_launched(tmp_path):
    (tmp_path / "mine.py").write_text("LAUNCHERS = {'none': print}\n")
    launch("--plugin", "mine.py")
    entry, = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["launches"]
    assert entry["cwd"] == str(tmp_path) and entry["time"].endswith("+00:00")
    assert entry["versions"].keys() >= {"domainbed_kd", "python", "torch", "numpy"}
    assert entry["flags"][entry["flags"].index("--plugin") + 1] == str(tmp_path / "mine.py")
    # With all defaults, so that a later version lists the same runs.
    assert {"--n_hparams_from", "--holdout_fraction", "--task"} <= set(entry["flags"])


def test_paths_count_from_where_the_sweep_was_launched(launched, tmp_path, monkeypatch):
    launch("--data_dir", "data", "--image_cache", "/pixels")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir("below")
    assert sweep.main(["launch", "../sweep", "--skip_confirmation"]) == 0
    words = words_of(launched[3])
    assert words["--data_dir"] == str(tmp_path / "data") and words["--image_cache"] == "/pixels"
    assert words["--output_dir"].replace("../", "") == words_of(launched[0])["--output_dir"]


def test_a_launch_that_is_called_off_leaves_no_folder(monkeypatch):
    def give_up(commands):
        raise KeyboardInterrupt

    monkeypatch.setitem(command_launchers.REGISTRY, "pretend", give_up)
    with pytest.raises(KeyboardInterrupt):
        launch()
    assert not Path("sweep").exists()


def test_folders_without_a_manifest_work_by_flags_and_say_so_without(capsys):
    shutil.copytree(GOLDENS / "sweep_data", "theirs")
    vlcs = ["--datasets", "VLCS", "--algorithms", "ERM", "--n_hparams", "2", "--n_trials", "2",
            "--steps", "1001", "--data_dir", "elsewhere"]
    assert rows(capsys, "status", "theirs", *vlcs)["ERM"][0] == "40"
    refused(["status", "theirs"], "theirs has no sweep.json", capsys)
    refused(["launch", "theirs"], "--datasets and --algorithms", capsys)
    refused(["status", "absent"], "absent: there is no such folder", capsys)
    refused(["status"], "DIR or --output_dir", capsys)
    refused(["status", "a", "--output_dir", "b"], "Two folders are given: a and --output_dir b.",
            capsys)


@pytest.mark.parametrize("text, message", [
    ("", "is damaged"), ("[" * 10000, "nested too deeply"), ("{}", "is damaged"), ("3", "damaged"),
    ('{"launches": 3}', "damaged"), ('{"launches": [{"flags": [1], "cwd": ""}]}', "does not list"),
    ('{"launches": [{"flags": ["@/etc/passwd"], "cwd": "/"}]}', "does not list"),
    ('{"launches": [{"flags": ["--steps", "ten"], "cwd": "/"}]}', "sweep.json: argument --steps"),
    ('{"launches": [{"flags": ["--n_trials", "9999999999"], "cwd": "/"}]}', "--n_trials 9999"),
    ('{"launches": [{"flags": ["--nonsense"], "cwd": "/"}]}', "sweep.json: unrecognized")])
def test_a_manifest_that_is_damaged_or_hostile_is_one_line(text, message, capsys):
    Path("sweep").mkdir()
    Path("sweep/sweep.json").write_text(text)
    for command in ("status", "launch", "plan", "delete_incomplete"):
        refused([command, "sweep"], message, capsys)


def test_what_completes_a_sweep_is_its_folder():
    assert manifest.completing_command("sweep") is None
    launch()
    assert manifest.completing_command("sweep") == (
        "python -m domainbed_kd.scripts.sweep launch sweep")
    Path("sweep/sweep.json").write_text("{")
    assert manifest.completing_command("sweep") is None


def test_launchers_side_by_side_each_leave_their_entry():
    Path("sweep").mkdir()
    code = ("from domainbed_kd.folder import manifest\n"
            "for i in range(10): manifest.add_launches('sweep', [{'flags': ['--steps', str(i)]}])")
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(manifest.launches("sweep")) == 20


@pytest.mark.slow
def test_status_of_a_folder_alone_takes_a_second_of_a_core(tmp_path):
    sweep.main(["launch", *SMALL, "--output_dir", "sweep", "--datasets", "DigitsDG",
                "--algorithms", "ERM", "KD", "RISE", "--n_trials", "3"])
    best = 9.0
    for _ in range(3):
        before = os.times()
        ran = subprocess.run([sys.executable, "-m", "domainbed_kd.scripts.sweep", "status", "sweep",
                              "--command_launcher", "local"], capture_output=True, text=True)
        after = os.times()
        best = min(best, after.children_user + after.children_system
                   - before.children_user - before.children_system)
        assert ran.returncode == 0, ran.stderr
    assert best < 1, best


# Plug-ins that a folder names.

PLUGIN = '''
from pathlib import Path
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.datasets import Debug28

Path("ran").touch()


class Pupil(ERM):
    learns_from_run = True


class Three(Debug28):
    N_STEPS = 7
'''


@pytest.fixture
def as_anew(monkeypatch):
    """A function that forgets which plug-ins were loaded, as a new process would."""
    registries = [(module, name, getattr(module, name)) for module, name in (
        (algorithms, "ALGORITHMS"), (algorithms, "_REGISTERED"), (datasets, "DATASETS"),
        (datasets, "_CLASSES"))]

    def forget():
        for module, name, found in registries:
            monkeypatch.setattr(module, name, found.copy())
        for name in [name for name in sys.modules if name.startswith("plugin ")]:
            del sys.modules[name]
        Path("ran").unlink(missing_ok=True)

    yield forget
    forget()


@pytest.fixture
def with_plugin(as_anew):
    """A sweep of the method and the dataset of a plug-in, launched in `sweep`."""
    Path("mine.py").write_text(PLUGIN)
    as_anew()
    sweep.main(["launch", *SMALL, "--output_dir", "sweep", "--plugin", "mine.py",
                "--algorithms", "Pupil", "--datasets", "Three"])
    assert Path("ran").exists()
    as_anew()


@pytest.mark.parametrize("command", ["status", "plan", "delete_incomplete"])
def test_what_trains_nothing_runs_no_code_that_a_folder_names(command, with_plugin, capsys):
    assert sweep.main([command, "sweep", "--skip_confirmation"]) == 0
    out = capsys.readouterr().out
    assert not Path("ran").exists()
    if command == "status":  # three students and, as the method says, their three teachers
        assert ["Pupil", "2", "0", "0", "0", "1"] in [line.split() for line in out.splitlines()]
        assert ["Three", "4", "0", "1", "0", "1"] in [line.split() for line in out.splitlines()]


def test_what_trains_runs_it(with_plugin):
    assert sweep.main(["launch", "sweep", "--skip_confirmation"]) == 0
    assert Path("ran").exists()


def test_a_plugin_on_the_command_line_is_loaded(with_plugin):
    assert sweep.main(["status", "sweep", "--plugin", "mine.py"]) == 0
    assert Path("ran").exists()


def test_a_launch_says_what_its_plugins_names_mean(with_plugin):
    found = json.loads(Path("sweep", "sweep.json").read_text())
    assert found["launches"][0]["of_plugins"] == {
        "algorithms": {"Pupil": {"learns_from_run": True}},
        "datasets": {"Three": {"n_envs": 3, "N_STEPS": 7, "CHECKPOINT_FREQ": 100}}}


@pytest.mark.parametrize("facts", [
    [], {"algorithms": []}, {"algorithms": {"Pupil": {}}}, {"datasets": {"Three": None}},
    {"algorithms": {"Pupil": {"learns_from_run": 1}}},
    {"algorithms": {"Pupil": {"learns_from_run": True, "__init__": 1}}},
    {"datasets": {"Three": {"n_envs": 10**8, "N_STEPS": 1, "CHECKPOINT_FREQ": 1}}},
    {"datasets": {"Three": {"n_envs": 3, "N_STEPS": "1", "CHECKPOINT_FREQ": 1}}}])
def test_what_a_folder_says_of_plugins_is_checked(facts, with_plugin, capsys):
    path = Path("sweep", "sweep.json")
    found = json.loads(path.read_text())
    found["launches"][0]["of_plugins"] = facts
    path.write_text(json.dumps(found))
    refused(["status", "sweep"], "sweep.json", capsys)
