import io
import json
import os
import pty
import shlex
import subprocess
import sys

import pytest

from domainbed_kd import command_launchers, console, datasets
from domainbed_kd.folder import args
from domainbed_kd.sweep import workers

TRAIN = [sys.executable, "-m", "domainbed_kd.scripts.train", "--dataset", "Debug28", "--steps", "4",
         "--checkpoint_freq", "2", "--hparams", '{"batch_size": 8}']


class Terminal(io.StringIO):
    def isatty(self):
        return True


def see(monkeypatch):
    """Puts a screen in the place of stderr; no fixture, as pytest puts its own back after those."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "__stderr__", screen)
    return screen


def read_all(fd):
    parts = []
    while True:
        try:
            data = os.read(fd, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not data:
            break
        parts.append(data)
    return b"".join(parts).decode()


def test_a_run_shows_a_bar_on_a_terminal_and_none_in_its_files(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen([*TRAIN, "--output_dir", str(tmp_path)], stderr=theirs,
                               stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    shown = read_all(ours)
    rows, _ = process.communicate()
    os.close(ours)
    assert process.returncode == 0
    assert "4/4" in shown and "step/s" in shown
    assert "step/s" not in rows and "env0_in_acc" in rows
    assert "step/s" not in (tmp_path / "err.txt").read_text()


def test_where_stderr_is_no_terminal_there_is_no_bar(capfd):
    assert list(console.bar(range(3))) == [0, 1, 2]
    with console.lifted():
        print("row")
    assert capfd.readouterr() == ("row\n", "")


def test_a_line_tells_how_far_a_run_is(tmp_path, monkeypatch):
    terminal = see(monkeypatch)
    run = args.of_words(["--dataset", "Debug28", "--output_dir", str(tmp_path), "--steps", "12"])
    line = workers.JobLine(run, position=1)
    assert "ERM Debug28" in terminal.getvalue() and "0/12" in terminal.getvalue()
    with (tmp_path / "results.jsonl").open("w") as file:
        file.write(json.dumps({"step": 0, "hparams": {"steps": 7}}) + "\n")
        file.write(json.dumps({"step": 5, "hparams": {"steps": 7}}) + "\n" + '{"torn')
    line.refresh()
    assert "6/12" in terminal.getvalue()
    line.close()


@pytest.mark.parametrize("words, expected", [
    (["--dataset", "DomainNet"], datasets.get_dataset_class("DomainNet").N_STEPS), ([], 5001),
    (["--steps", "0"], 5001), (["--dataset", "SomebodysOwn"], None),
    (["--dataset", "SomebodysOwn", "--steps", "3"], 3)])
def test_a_command_without_steps_makes_its_datasets_number(words, expected):
    assert workers.n_steps(args.of_words(words)) == expected


def test_jobs_side_by_side_have_a_line_each(tmp_path, monkeypatch):
    terminal = see(monkeypatch)
    commands = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        words = [*TRAIN, "--trial_seed", str(i), "--output_dir", str(tmp_path / str(i))]
        commands.append(shlex.join(["python", *words[1:]]))
    assert command_launchers.local(commands, jobs_per_device=2) == [0, 0]
    shown = terminal.getvalue()
    for i in range(2):
        assert f"ERM Debug28 test env 0, trial {i}, hparams 0:" in shown  # the line
        assert f"done  ERM Debug28 test env 0, trial {i}, hparams 0  (" in shown  # the outcome
    assert "2/2" in shown
