import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import GOLDENS, golden

from domainbed_kd import datasets
from domainbed_kd.folder import claims, files
from domainbed_kd.sweep import jobs, listing
from domainbed_kd.sweep.jobs import Job

CASES = golden("jobs.json")["cases"]
SHIPPED = next(case for case in CASES if case["label"] == "test_sweep_data")


def make(case, sweep_output_dir, **changes):
    args_list = listing.make_args_list(**case["make_args_list"] | changes)
    return [Job(args, str(sweep_output_dir)) for args in args_list]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["label"])
def test_jobs_have_domainbeds_arguments_folders_commands_and_texts(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args_list = listing.make_args_list(**case["make_args_list"])
    assert args_list == [job["train_args"] for job in case["jobs"]]
    for args, theirs in zip(args_list, case["jobs"]):
        job = Job(args, case["output_dir"])
        assert job.output_dir == theirs["output_dir"]
        assert job.command_str == theirs["command"].replace(
            "-m domainbed.scripts.train", "-m domainbed_kd.scripts.train")
        assert str(job).split(": ", 1)[1] == theirs["str"].split(": ", 1)[1]
        assert job.state == "Not launched"


@pytest.mark.slow
def test_the_whole_default_sweep_has_domainbeds_folders_in_domainbeds_order():
    full = golden("jobs_full_default.json")
    sizes = {}
    for single in (True, False):
        args_list = listing.make_args_list(
            n_trials=3, dataset_names=full["sweep_DATASETS"], algorithms=full["ALGORITHMS"],
            n_hparams_from=0, n_hparams=20, steps=None, data_dir=full["data_dir"],
            task="domain_generalization", holdout_fraction=0.2, single_test_envs=single,
            hparams=None)
        sizes[single] = len(args_list)
    assert sizes == {True: full["n_jobs_single_test_envs"], False: full["n_jobs_default"]}
    runs, digest = jobs.Runs(full["output_dir"]), hashlib.sha256()
    for args in args_list:
        digest.update(f"{Job(args, full['output_dir'], runs).output_dir}\n".encode())
    assert digest.hexdigest() == full["sha256_of_output_dirs_newline_terminated"]


@pytest.mark.parametrize("n_envs, single, expected", [
    (3, False, [[0], [0, 1], [0, 2], [1], [1, 2], [2]]),
    (3, True, [[0], [1], [2]]),
    (2, True, [[0], [1]])])
def test_held_out_sets_are_single_domains_and_each_followed_by_its_pairs(n_envs, single, expected):
    assert listing.test_env_sets(n_envs, single) == expected


def test_a_data_set_of_two_domains_has_no_pairs_to_hold_out(monkeypatch):
    monkeypatch.setattr(datasets.get_dataset_class("Debug28"), "ENVIRONMENTS", ["0", "1"])
    case = CASES[1] | {"make_args_list": CASES[1]["make_args_list"] | {
        "dataset_names": ["Debug28"]}}
    with pytest.raises(ValueError, match="Debug28 has 2 domains.*--single_test_envs"):
        make(case, "o", single_test_envs=False)
    assert {tuple(job.train_args["test_envs"]) for job in make(case, "o")} == {(0,), (1,)}


def test_further_flags_rename_the_folder_only_when_they_are_given():
    plain = make(CASES[0], "o")[0]
    none = make(CASES[0], "o", checkpoint_freq=None, skip_model_save=None)[0]
    given = make(CASES[0], "o", checkpoint_freq=7, skip_model_save=True)[0]
    assert none.output_dir == plain.output_dir != given.output_dir
    assert " --checkpoint_freq 7 " in given.command_str
    assert " --skip_model_save --task " in given.command_str


def test_what_is_not_on_record_is_in_the_command_but_not_in_the_folders_name():
    args = CASES[0]["jobs"][0]["train_args"]
    job = Job(args, "o", flags=["--plugin", "my methods.py", "--wandb"])
    assert job.command_str.endswith(" --plugin 'my methods.py' --wandb")
    assert job.output_dir == Job(args, "o").output_dir


def test_a_sweep_that_domainbed_made_is_recognized_by_its_folders(tmp_path):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    assert {job.state for job in make(SHIPPED, tmp_path / "sweep")} == {"Done"}


def test_a_sweep_is_recognized_when_its_data_have_moved(tmp_path):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    here = make(SHIPPED, tmp_path / "sweep")
    moved = make(SHIPPED, tmp_path / "sweep", data_dir="/elsewhere")
    assert [job.output_dir for job in moved] == [job.output_dir for job in here]
    assert {job.state for job in moved} == {"Done"}
    os.remove(os.path.join(moved[3].output_dir, "done"))
    moved = make(SHIPPED, tmp_path / "sweep", data_dir="/elsewhere")
    assert [i for i, job in enumerate(moved) if job.state == "Interrupted"] == [3]


@pytest.mark.parametrize("change", [
    {"steps": 7}, {"hparams": '{"lr": 1}'}, {"holdout_fraction": 0.3},
    {"task": "domain_adaptation"}, {"uda_holdout_fraction": 0.5}, {"checkpoint_freq": 7}])
def test_a_run_that_trained_something_else_is_another_run(change, tmp_path):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    others = make(SHIPPED, tmp_path / "sweep", **change, data_dir="/elsewhere")
    assert {job.state for job in others} == {"Not launched"}


def test_a_torn_first_record_belongs_to_no_job(tmp_path):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    job = make(SHIPPED, tmp_path / "sweep")[0]
    for torn in ('{"args": {"algo', "[]\n", "\n", "null\n", '{"args": 3}\n',
                 '{"args": {"seed": {}}}\n'):
        with open(os.path.join(job.output_dir, "results.jsonl"), "w") as file:
            file.write(torn)
        moved = make(SHIPPED, tmp_path / "sweep", data_dir="/elsewhere")[0]
        assert moved.state == "Not launched"


def test_a_finished_run_is_preferred_to_an_unfinished_one_of_the_same_arguments(tmp_path):
    args = make(SHIPPED, tmp_path)[0].train_args
    for name, left in (("a", []), ("b", ["done"]), ("c", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.jsonl").write_text(json.dumps({"args": args}) + "\n")
        for file in left:
            (tmp_path / name / file).write_text("done")
    job = make(SHIPPED, tmp_path, data_dir="/elsewhere")[0]
    assert (job.output_dir, job.state) == (str(tmp_path / "b"), "Done")


def test_launching_makes_the_folders_and_returns_what_failed(tmp_path, capsys):
    todo, received = make(CASES[1], tmp_path)[:3], []

    def launcher(commands):
        assert all(os.path.isdir(job.output_dir) for job in todo)
        received.extend(commands)
        return [0, 2, -9]

    assert Job.launch(todo, launcher) == todo[1:]
    assert received == [job.command_str for job in todo]
    # One that returned nothing of its own keeps the reason that its launcher knows.
    assert not any(job.state == "Done" for job in make(CASES[1], tmp_path))
    assert make(CASES[1], tmp_path)[2].why_failed().startswith("killed by SIGKILL")
    assert capsys.readouterr().out == (
        "Launching...\nMaking job directories:\nLaunched 3 jobs!\n")


def test_a_launcher_of_domainbeds_kind_returns_nothing_and_nothing_counts_as_failed(tmp_path):
    assert Job.launch(make(CASES[1], tmp_path)[:3], lambda commands: None) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_jobs_that_a_launcher_did_not_begin_can_be_launched_again(error, tmp_path):
    todo = make(CASES[1], tmp_path)[:2]

    def launcher(commands):
        with open(os.path.join(todo[0].output_dir, "out.txt"), "w"):
            raise error

    with pytest.raises(error):
        Job.launch(todo, launcher)
    assert [job.state for job in make(CASES[1], tmp_path)[:2]] == ["Interrupted", "Not launched"]


def test_deleting_removes_the_folders_of_these_jobs_only(tmp_path, capsys):
    todo = make(CASES[1], tmp_path)[:3]
    Job.launch(todo, lambda commands: None)
    Job.delete(todo[:2])
    assert [job.has_folder for job in make(CASES[1], tmp_path)[:3]] == [False, False, True]
    assert capsys.readouterr().out.endswith("Deleting...\nDeleted 2 jobs!\n")


def test_the_last_error_is_the_last_line_with_something_in_it(tmp_path):
    job = make(CASES[1], tmp_path)[0]
    assert files.last_error(job.output_dir) == ""
    os.makedirs(job.output_dir)
    with open(os.path.join(job.output_dir, "err.txt"), "w") as file:
        file.write("Traceback\n  deep\nerror: no such thing\n\n")
    assert files.last_error(job.output_dir) == "error: no such thing"


def test_a_job_that_found_no_space_to_say_why_says_that(tmp_path):
    job = make(CASES[1], tmp_path)[0]
    os.makedirs(job.output_dir)
    (Path(job.output_dir) / "out.txt").touch()
    (Path(job.output_dir) / "failed").touch()
    assert job.state_now() == "Failed"
    assert job.why_failed() == "the disk was too full to write the reason"


@pytest.mark.parametrize("status, reason", [
    (-9, "killed by SIGKILL, as happens when a machine runs out of memory"),
    (-15, "killed by SIGTERM"), (2, "error: no such thing"), (3, "exit status 3, no message")])
def test_a_job_tells_why_it_failed(status, reason, tmp_path):
    def launcher(commands):
        if status != 3:
            (Path(job.output_dir) / "err.txt").write_text("error: no such thing\n")
        return [status]

    job, = make(CASES[1], tmp_path)[:1]
    assert Job.launch([job], launcher) == [job]
    assert job.why_failed() == reason


def test_a_job_is_in_one_of_five_states(tmp_path):
    def state():
        return make(CASES[1], tmp_path)[0].state

    folder = Path(make(CASES[1], tmp_path)[0].output_dir)
    assert state() == "Not launched"
    folder.mkdir()
    assert state() == "Not launched"  # it waits for its launcher
    (folder / "out.txt").touch()
    assert state() == "Interrupted"
    with claims.held(folder):
        assert state() == "Running"
    (folder / "failed").write_text("error: no\n")
    assert state() == "Failed"
    (folder / "done").touch()
    assert state() == "Done"


def test_a_job_that_was_told_to_stop_is_interrupted_not_failed(tmp_path):
    def stopped(commands):
        (Path(job.output_dir) / "out.txt").touch()
        return [143]

    job = make(CASES[1], tmp_path)[0]
    assert Job.launch([job], stopped) == [job]
    assert make(CASES[1], tmp_path)[0].state == "Interrupted"


def test_what_another_launcher_has_or_has_done_is_no_failure(tmp_path):
    todo = make(CASES[1], tmp_path)[:2]

    def beaten(commands):
        for job in todo:
            (Path(job.output_dir) / "out.txt").touch()
        (Path(todo[0].output_dir) / "done").touch()
        return [2, 2]

    with contextlib.ExitStack() as stack:
        todo_folder = Path(todo[1].output_dir)
        todo_folder.mkdir(parents=True)
        stack.enter_context(claims.held(todo_folder))
        assert Job.launch(todo, beaten) == []


def test_a_job_wrote_lately_if_anything_in_its_folder_changed(tmp_path):
    assert not make(CASES[1], tmp_path)[0].wrote_within(100)
    Job.launch(make(CASES[1], tmp_path)[:1], lambda commands: None)
    job = make(CASES[1], tmp_path)[0]
    assert job.wrote_within(100)
    for name in ("", "args.json", "out.txt"):
        path = os.path.join(job.output_dir, name)
        if name:
            open(path, "w").close()
        os.utime(path, (0, 0))
    assert not job.wrote_within(100)


def test_a_folder_says_what_its_job_trains_until_the_launcher_gives_up(tmp_path):
    def give_up(commands):
        assert all(Path(job.output_dir, "args.json").exists() for job in todo)
        raise ValueError("no GPU")

    todo = make(CASES[1], tmp_path / "sweep")
    Job.launch(todo[:1], lambda commands: None)
    kept = json.loads(Path(todo[0].output_dir, "args.json").read_text())
    assert kept == todo[0].train_args
    assert make(CASES[1], tmp_path / "sweep")[0].state == Job.NOT_LAUNCHED
    Path(todo[0].output_dir, "out.txt").touch()
    with pytest.raises(ValueError, match="no GPU"):
        Job.launch(todo, give_up)
    assert os.listdir(tmp_path / "sweep") == [os.path.basename(todo[0].output_dir)]
