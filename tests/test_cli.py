import importlib
import subprocess
import sys
import time

import pytest

import domainbed_kd
from domainbed_kd import __main__ as cli


def run(*args):
    return subprocess.run(
        [sys.executable, "-m", "domainbed_kd", *args], capture_output=True, text=True)


def test_help_lists_each_command_in_a_line():
    out = run("--help").stdout
    for name in cli.COMMANDS:
        assert f"\n    {name} " in out or f"\n    {name}\n" in out
    assert run("-h").stdout == out


def test_the_version_is_the_packages():
    assert run("--version").stdout == f"{domainbed_kd.__version__}\n"


@pytest.mark.parametrize("args, message", [
    ([], "COMMAND"), (["sweeep"], "invalid choice: 'sweeep'"),
    (["sweep", "launch"], "--output_dir"), (["sweep", "lunch", "--output_dir", "x"], "lunch")])
def test_misuse_is_said_in_one_line(args, message):
    ran = run(*args)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and message in ran.stderr


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_is_a_script_that_gets_the_flags_after_its_name(name, monkeypatch):
    script = importlib.import_module(f"domainbed_kd.scripts.{name}")
    received = []
    monkeypatch.setattr(script, "main", lambda argv: received.append(argv) or 1)
    assert cli.dispatch([name, "--help", "x"]) == 1
    assert received == [["--help", "x"]]


def test_the_package_is_imported_at_once():
    # `python -X importtime` reports microseconds, without the start of the interpreter.
    ran = subprocess.run([sys.executable, "-X", "importtime", "-c", "import domainbed_kd"],
                         capture_output=True, text=True, check=True)
    line = next(line for line in ran.stderr.splitlines() if line.endswith("| domainbed_kd"))
    assert int(line.split("|")[1]) < 50_000


@pytest.mark.parametrize("args", [["--help"], ["sweep", "launch", "--help"]])
def test_help_comes_at_once(args):
    def seconds():
        start = time.perf_counter()
        assert run(*args).returncode == 0
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.3  # the least, as other tests run beside
