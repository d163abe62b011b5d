"""Sweeps whose students have teachers on top: who is trained, when, and how often."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from domainbed_kd import command_launchers
from domainbed_kd.folder import claims, composition
from domainbed_kd.scripts import collect_results, sweep, train
from domainbed_kd.sweep import flags, jobs
from domainbed_kd.sweep.plan import wall_seconds

SWAPPED = {"run": "ERM", "swapped": True}
TARGET = {"run": "FourDs", "hparams": {"fourds_protocol": "target", "teacher": SWAPPED}}


def args_of(folder, algorithms, hparams=None, *more):
    """The flags of a sweep on Debug28."""
    return ["--output_dir", str(folder), "--datasets", "Debug28", "--single_test_envs",
            "--n_trials", "1", "--n_hparams", "1", "--skip_confirmation", "--algorithms",
            *algorithms, *(["--hparams", json.dumps(hparams)] if hparams else []), *more]


def planned(folder, *launches):
    """The jobs of launches, the last of which is the newest."""
    parsed = []
    for words in launches:
        args, _ = flags.parse(sweep.build_parser(), ["plan", *words])
        sweep.load_names([args])
        parsed.append(args)
    return jobs.plan(parsed)


def told(some):
    """(algorithm, hparams, generation) of the jobs that hold out the first domain."""
    return [(job.train_args["algorithm"], json.loads(job.train_args.get("hparams", "{}")),
             job.generation) for job in some if job.train_args["test_envs"] == [0]]


def test_teachers_come_first_and_share_what_is_not_their_students_own(tmp_path):
    found = planned(tmp_path, args_of(tmp_path, ["CORAL"], {
        "lr": 0.1, "teachers": ["run:SWAD", "clip", "run:4Ds"], "averaging": "sma"}))
    student = {"lr": 0.1, "teachers": ["run:SWAD", "clip", "run:4Ds"], "averaging": "sma"}
    assert told(found) == [("SWAD", {"lr": 0.1}, 0), ("ERM", {"lr": 0.1}, 0),
                           ("FourDs", {"lr": 0.1}, 1), ("CORAL", student, 2)]
    [*_, last] = found
    command = last.command_str
    names = [teacher.train_args["algorithm"] for teacher in last.teachers]
    assert names == ["SWAD", "FourDs"]
    assert f"--teacher {last.teachers[0].output_dir} {last.teachers[1].output_dir}" in command


def test_a_teacher_is_trained_once_for_all_and_is_the_plain_row_if_there_is_one(tmp_path):
    on_top = {"batch_size": 4, "teachers": ["run:ERM"]}
    found = planned(
        tmp_path, args_of(tmp_path, ["ERM", "CORAL", "KD"], {"batch_size": 4}),
        args_of(tmp_path, ["ERM", "CORAL"], on_top),
        args_of(tmp_path, ["CORAL"], on_top | {"averaging": "sma"}))
    assert len(told(found)) == 6
    taught = [job for job in found if job.teachers]
    assert len({id(teacher) for job in taught for teacher in job.teachers}) == 3  # a test env each
    assert {job.teachers[0].train_args["hparams"] for job in taught} == {'{"batch_size": 4}'}


def test_without_hparams_of_its_own_a_teacher_has_the_folder_of_a_plain_run(tmp_path):
    [plain, *_] = planned(tmp_path, args_of(tmp_path, ["SWAD"]))
    [teacher, *_] = planned(tmp_path, args_of(tmp_path, ["ERM"], {"teachers": ["run:SWAD"]}))
    assert teacher.output_dir == plain.output_dir


def test_chains_are_planned_from_their_first_link(tmp_path):
    chain = {"run": "CORAL", "hparams": {"teachers": [{"run": "ERM", "steps": 7}]}}
    found = planned(tmp_path, args_of(tmp_path, ["KD"], {"lr": 0.1, "teacher": chain}))
    assert told(found) == [
        ("ERM", {"lr": 0.1}, 0), ("CORAL", {"lr": 0.1} | chain["hparams"], 1),
        ("KD", {"lr": 0.1, "teacher": chain}, 2)]
    assert found[0].train_args["steps"] == 7 and "steps" not in found[-1].train_args
    seconds = {id(job): 10.0 for job in found}
    assert wall_seconds(found, seconds, slots=100, once={}) == 30


def test_a_swapped_teacher_trains_on_what_its_student_holds_out(tmp_path):
    teacher = {"run": "ERM", "swapped": True, "hparams": {"batch_size": 2}}
    found = planned(tmp_path, args_of(tmp_path, ["4Ds"], {"lr": 0.1, "teacher": teacher}))
    students = [job for job in found if job.teachers]
    assert [(job.train_args["test_envs"], job.teachers[0].train_args["test_envs"])
            for job in students] == [([0], [1, 2]), ([1], [0, 2]), ([2], [0, 1])]
    assert {job.teachers[0].train_args["hparams"] for job in students} == {
        '{"lr": 0.1, "batch_size": 2}'}
    assert composition.row("KD", {"teacher": teacher}) == "KD(ERM, batch_size 2, swapped)"
    with pytest.raises(ValueError, match="is not a teacher; a teacher is"):
        planned(tmp_path, args_of(tmp_path, ["KD"], {"teacher": teacher | {"swapped": 1}}))


def test_a_timm_network_is_taught_by_its_linear_probe(tmp_path):
    hparams = {"resnet18": True, "weights": "none", "lr": 0.1, "teachers": ["timm:test_vit"]}
    found = planned(tmp_path, args_of(tmp_path, ["ERM"], hparams))
    assert told(found)[0] == ("LinearProbe", {"lr": 0.1, "backbone": "test_vit"}, 0)


@pytest.mark.parametrize("algorithms, hparams, words", [
    (["ERM", "Fish"], {"teachers": ["run:ERM"]}, "Fish: teachers do not go with this"),
    (["ERM"], {"teachers": ["run:ERN"]}, "Did you mean ERM?"),
    (["ERM"], {"distill": "logit"}, "distill needs teachers"),
    (["ERM"], {"teachers": [{"run": "Fish", "hparams": {"teachers": ["clip"]}}]}, "Fish: teachers"),
    (["SCMD"], {"teachers": ["run:ERM"]}, "brings its own teacher"),
    (["CORAL"], {"teacher": "run:ERM"}, "CORAL does not learn from a run"),
    (["CORAL"], {"teachers": [TARGET]}, "target learns from a teacher"),
    (["KD"], {"teacher": {"run": "CORAL", "hparams": {"teachers": [TARGET]}}}, "learns from a"),
    (["KD", "4Ds"], {"teacher": "run:4Ds", "fourds_protocol": "target"}, "KD: the teacher 4Ds "),
    (["ERM"], {"teachers": ["run:MosaicKD"], "mosaic_role": "ood"}, "MosaicKD learns from a"),
    (["CORAL"], {"teachers": [SWAPPED]}, "ERM, swapped trains on the domains on which CORAL is"),
    (["4Ds"], {"teacher": SWAPPED}, "4Ds: the teacher ERM, swapped trains on the domains"),
    (["ERM", "CORAL"], {"label_smoothing": 0.5}, "CORAL does not read the hparam label_smoothing"),
    (["ERM"], {"teachers": [{"run": "CORAL", "hparams": {"label_smoothing": 0.5}}]}, "CORAL does"),
    (["ERM"], {"base_weight": 0.5}, "base_weight needs teachers"),
    (["ERM"], {"averaging": "ema"}, "'ema'; known are sma, swad, beta"),
    (["ERM"], {"averaging": ["sma"]}, "['sma']; known are sma, swad, beta"),
    (["SMA"], {"averaging": "sma"}, "SMA averages its weights already"),
    (["ERM"], {"teachers": [{"run": "SMA", "hparams": {"averaging": "sma"}}]}, "SMA averages"),
    (["ERM"], {"teachers": ["clip"], "distill_weight": "x"}, "distill_weight is 'x'; it takes at"),
    (["ERM"], {"teachers": ["clip"], "distill_temperature": 0}, "distill_temperature is 0; it"),
    (["ERM"], {"teachers": ["run:SWAD"], "base_weight": -1}, "base_weight is -1; it takes at"),
    (["ERM"], {"teachers": [{"run": "SWAD", "steps": -5}]}, "steps of SWAD is -5; it takes"),
    (["KD"], {"teacher": {"run": "SWAD", "hparams": {"lr": -1}}}, "SWAD: lr is -1; it takes at"),
    (["ERM"], {"teachers": ["run:SWAD", "folder:/nowhere"]}, "/nowhere holds no finished run"),
    (["ERM"], {"teachers": ["run:SWAD", "ViT-Q-99"]}, "open_clip knows no model 'ViT-Q-99'"),
    (["ERM"], {"teachers": ["run:SWAD", "ViT-B-32/mine"]}, "ViT-B-32 has no weights 'mine'"),
    (["ERM"], {"teachers": ["run:SWAD", "timm:nonsense_net"]}, "timm has no 'nonsense_net'"),
    (["KD"], {"teacher": "timm:nonsense_net"}, "timm has no 'nonsense_net'"),
])
@pytest.mark.parametrize("command", ["launch", "plan"])
def test_what_has_no_meaning_is_refused_before_any_teacher_is_trained(
        command, algorithms, hparams, words, tmp_path):
    with pytest.raises((ValueError, OSError, NotImplementedError)) as error:
        sweep.main([command, *args_of(tmp_path / "new", algorithms, hparams)])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_folder_is_refused_in_a_sweep_that_holds_out_a_domain_that_its_run_saw(tmp_path):
    saw = tmp_path / "run"
    assert train.main(["--dataset", "Debug28", "--steps", "1", "--test_envs", "0", "--output_dir",
                       str(saw), "--hparams", '{"batch_size": 4}']) == 0
    words = ["plan", "--output_dir", str(tmp_path / "sweep"), "--datasets", "Debug28",
             "--algorithms", "CORAL", "--n_trials", "1", "--n_hparams", "1", "--hparams",
             json.dumps({"teachers": [f"folder:{saw}"]}), "--test_envs"]
    assert sweep.main([*words, "0"]) == 0
    with pytest.raises(ValueError, match=r"trained on environments \[1\], on which the student"):
        sweep.main([*words, "1"])


def test_a_teacher_listed_twice_is_named_before_anything_is_launched(tmp_path, capsys):
    twice = ["run:SWAD", {"run": "SWAD"}, "run:ERM"]
    assert sweep.main(["plan", *args_of(tmp_path, ["CORAL"], {"teachers": twice})]) == 0
    assert capsys.readouterr().err == (
        "teachers: SWAD is listed more than once, and each time adds to its weight.\n")


def test_a_finished_sweep_is_priced_whatever_its_hparams(tmp_path, monkeypatch):
    monkeypatch.setattr(jobs.Job, "is_done", lambda self: True)
    for job in planned(tmp_path, words := args_of(tmp_path, ["SMA"], {"averaging": "sma"})):
        Path(job.output_dir).mkdir()
    assert sweep.main(["plan", *words]) == 0


def test_waves_are_launched_until_all_teachers_are_done(tmp_path, monkeypatch):
    waves = []

    def finish(commands):
        waves.append([word for command in commands for word in command.split() if word in (
            "ERM", "CORAL", "KD")])
        for command in commands:
            folder = train.build_parser().parse_args(sys_words(command)).output_dir
            Path(folder, "done").write_text("done")

    monkeypatch.setitem(command_launchers.REGISTRY, "finish", finish)
    chain = {"run": "CORAL", "hparams": {"teachers": ["run:ERM"]}}
    assert sweep.main(["launch", *args_of(
        tmp_path, ["KD"], {"teacher": chain}, "--command_launcher", "finish")]) == 0
    assert waves == [["ERM"] * 3, ["CORAL"] * 3, ["KD"] * 3]


def sys_words(command):
    return shlex.split(command)[3:]


def run_sweep(folder, hparams):
    """The command of a sweep of CORAL."""
    return [sys.executable, "-m", "domainbed_kd.scripts.sweep", "launch", *args_of(
        folder, ["CORAL"], hparams, "--steps", "40", "--checkpoint_freq", "10")]


def results(folder):
    """{algorithm, test env: its records, without times, memory and folders}."""
    found = {}
    for path in Path(folder).glob("*/results.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            for name in ("step_time", "mem_gb"):
                record.pop(name)
            record["args"] = {name: value for name, value in record["args"].items()
                              if name not in ("output_dir", "teacher")}
        args = records[0]["args"]
        found[args["algorithm"], args.get("hparams"), tuple(args["test_envs"])] = records
    return found


@pytest.mark.slow
def test_a_sweep_with_teachers_that_is_killed_goes_on_to_the_same_bits(tmp_path, capsys):
    hparams = {"teachers": ["run:SWAD"], "distill": ["logit", "feature"], "averaging": "sma",
               "sma_start": 5, "batch_size": 4, "swad_interval": 5}
    flags = ["--allow_bad_teacher"]  # Debug28's labels are noise
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(run_sweep(whole, hparams) + flags, check=True, capture_output=True)
    n_kills = 0
    while n_kills < 3:
        process = subprocess.Popen(run_sweep(killed, hparams) + flags, start_new_session=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before = {path: path.stat().st_size for path in killed.glob("*/results.jsonl")}
        while process.poll() is None and before == {
                path: path.stat().st_size for path in killed.glob("*/results.jsonl")}:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        n_kills += 1
    deadline = time.monotonic() + 60
    while any(claims.holder(out.parent) for out in killed.glob("*/out.txt")):  # its workers end
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(run_sweep(killed, hparams) + flags, check=True, capture_output=True)
    assert results(killed) == results(whole) and len(results(whole)) == 6
    assert collect_results.main(["--input_dir", str(killed)]) == 0
    out = capsys.readouterr().out
    assert "CORAL + KD+Feature(SWAD) + SMA" in out and "another protocol" not in out


def test_without_teachers_in_the_list_the_losses_are_the_algorithms_own(tmp_path):
    for name, hparams in (("plain", {"batch_size": 4}),
                          ("none", {"batch_size": 4, "teachers": []})):
        assert train.main(["--dataset", "Debug28", "--algorithm", "CORAL", "--steps", "3",
                           "--output_dir", str(tmp_path / name), "--hparams",
                           json.dumps(hparams)]) == 0
    losses = [[json.loads(line)["loss"] for line in
               (tmp_path / name / "results.jsonl").read_text().splitlines()]
              for name in ("plain", "none")]
    assert losses[0] == losses[1]
