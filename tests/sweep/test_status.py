import json
import os
import shutil
from pathlib import Path

from conftest import GOLDENS
from launches import args_list_of, flags

from domainbed_kd.folder import claims
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep.jobs import Job


def test_a_sweep_of_domainbeds_is_seen_as_done_wherever_its_data_lie(tmp_path, capsys):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    args = ["status", "--datasets", "VLCS", "--algorithms", "ERM", "--n_hparams", "2",
            "--n_trials", "2", "--steps", "1001", "--output_dir", str(tmp_path / "sweep")]
    assert sweep.main([*args, "--data_dir", "elsewhere"]) == 0
    first = capsys.readouterr().out.splitlines()[:2]
    assert [line.split() for line in first] == [
        ["algorithm", "done", "running", "interrupted", "failed", "not", "launched"],
        ["ERM", "40", "0", "0", "0", "0"]]


def test_plan_and_status_name_algorithms_as_tables_do(tmp_path, capsys):
    for command in ("plan", "status"):
        assert sweep.main(flags(command, tmp_path, "--algorithms", "VL2VADiP", "4Ds")) == 0
        found = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line]
        assert {"VL2V-ADiP", "4Ds"} <= set(found) and not {"VL2VADiP", "FourDs"} & set(found)


def test_status_counts_states_by_algorithm_and_by_data_set(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28",
                 "DigitsDG", "--single_test_envs")
    parsed = sweep.build_parser().parse_args(args)
    todo = [Job(train_args, str(tmp_path)) for train_args in args_list_of(parsed)]
    folders = [Path(job.output_dir) for job in todo]
    for folder, *files in ((folders[0], "out.txt", "done"), (folders[1], "out.txt"),
                           (folders[2], "out.txt", "failed"), (folders[3], "out.txt"),
                           (folders[4],)):
        folder.mkdir()
        for file in files:
            (folder / file).write_text("error: it is late\n")
    with claims.held(folders[1]):
        assert sweep.main(args) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert ["ERM", "1", "1", "0", "1", "4"] in rows and ["SWAD", "0", "0", "1", "0", "6"] in rows
    assert ["Debug28", "1", "1", "1", "1", "2"] in rows
    assert ["DigitsDG", "0", "0", "0", "0", "8"] in rows
    assert (f"failed: {folders[2]} (ERM Debug28 test env 2, trial 0, hparams 0): "
            "error: it is late") in lines
    assert "1 of those not launched have a folder: they wait in a queue" in lines[-1]


def test_status_tells_rate_and_time_left_from_what_jobs_took(tmp_path, capsys):
    args = flags("status", tmp_path, "--steps", "100", "--single_test_envs")
    parsed = sweep.build_parser().parse_args(args)
    folders = [Path(Job(train_args, str(tmp_path)).output_dir)
               for train_args in args_list_of(parsed)]
    for folder, cost in ((folders[0], {"seconds": 600, "steps": 100}),
                         (folders[1], {"seconds": 150, "steps": 50})):
        folder.mkdir()
        (folder / "memory.json").write_text(json.dumps({"rss_mb": 1, "gpu_mb": 0} | cost))
        (folder / "out.txt").touch()
    (folders[0] / "done").touch()
    with claims.held(folders[1]):
        assert sweep.main(args) == 0
    out = capsys.readouterr().out
    assert "running: 1 jobs, 0.333 updates a second together\n" in out
    # 50 updates at its own 3 s, and 100 at the 5 s that the 150 measured ones took on average.
    assert "left: 10.8 minutes with 1 at a time\n" in out


def test_status_reckons_with_the_jobs_at_a_time_that_the_launcher_would_have(tmp_path, capsys):
    args = flags("status", tmp_path, "--steps", "100", "--single_test_envs", "--jobs_per_device",
                 "2")
    done = Path(Job(args_list_of(sweep.build_parser().parse_args(args))[0],
                    str(tmp_path)).output_dir)
    done.mkdir()
    (done / "memory.json").write_text(json.dumps({"seconds": 600, "steps": 100}))
    (done / "done").touch()
    assert sweep.main(args) == 0
    assert "left: 10.0 minutes with 2 at a time\n" in capsys.readouterr().out + "\n"
    assert sweep.main([*args, "--jobs_per_device", "9"]) == 0  # of which two are left
    assert "left: 10.0 minutes with 2 at a time\n" in capsys.readouterr().out + "\n"


def test_status_counts_the_jobs_that_diverged(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28")
    jobs_listed = args_list_of(sweep.build_parser().parse_args(args))
    for train_args in jobs_listed[:2] + jobs_listed[-1:]:
        folder = Path(Job(train_args, str(tmp_path)).output_dir)
        folder.mkdir()
        (folder / "memory.json").write_text('{"diverged": "loss is nan since step 3"}')
    assert sweep.main(args) == 0
    assert ("diverged: the losses of 3 jobs are not finite (ERM 2, SWAD 1); their err.txt says "
            "since which step") in capsys.readouterr().out.splitlines()


def test_status_is_shown_again_until_all_jobs_are_done(tmp_path, launched, monkeypatch, capsys):
    waited = []

    def finish(seconds):
        waited.append(seconds)
        if len(waited) == 2:
            sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend"))

    monkeypatch.setattr(sweep.status.time, "sleep", finish)
    assert sweep.main(flags("status", tmp_path, "--watch", "7")) == 0
    assert waited == [7, 7]
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line[:3] == "ERM"]
    assert rows == [["ERM", "0", "0", "0", "0", "6"]] * 2 + [["ERM", "6", "0", "0", "0", "0"]]


def test_status_shows_the_most_memory_that_a_job_of_each_algorithm_held(tmp_path, capsys):
    args = flags("status", tmp_path, "--algorithms", "ERM", "SWAD", "--datasets", "Debug28")
    assert sweep.main(args) == 0
    assert "memory" not in capsys.readouterr().out
    parsed = sweep.build_parser().parse_args(args)
    folders = [Job(train_args, str(tmp_path)).output_dir for train_args in args_list_of(parsed)
               if train_args["algorithm"] == "ERM"]
    for folder, content in zip(folders, ('{"rss_mb": 400.4, "gpu_mb": 0.0}',
                                         '{"rss_mb": 300.0, "gpu_mb": 70.6}', "damaged")):
        os.makedirs(folder)
        with open(os.path.join(folder, "memory.json"), "w") as file:
            file.write(content)
    assert sweep.main(args) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        "most memory of a job, MiB of process + GPU: ERM 400 + 71")
