import importlib
import subprocess
import sys

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


def test_help_states_defaults_that_are_values():
    out = " ".join(run("train", "--help").stdout.split())
    assert "seed of everything else; default: 0 " in out and "default: RotatedMNIST" in out
    assert not any(f"default: {nothing}" in out for nothing in (None, False, []))


def imported_by(*words):
    """The modules that a Python command line imports (`-X importtime` names them on stderr)."""
    ran = subprocess.run([sys.executable, "-X", "importtime", *words],
                         capture_output=True, text=True, check=True)
    return {line.split("|")[-1].strip() for line in ran.stderr.splitlines() if "|" in line}


def test_the_package_imports_nothing_of_its_own_nor_others():
    without = imported_by("-c", "pass")
    assert imported_by("-c", "import domainbed_kd") - without == {"domainbed_kd"}


def test_the_public_names_are_imported_when_they_are_used():
    assert domainbed_kd.losses.kd_loss and domainbed_kd.teachers.from_run
    assert all(getattr(domainbed_kd, name) for name in domainbed_kd.__all__)
    assert set(domainbed_kd.__all__) <= set(dir(domainbed_kd))
    with pytest.raises(AttributeError, match="no attribute 'teacher'"):
        domainbed_kd.teacher  # noqa: B018


def test_a_run_is_trained_from_python_with_the_flags_of_train(tmp_path):
    records = domainbed_kd.train(
        tmp_path, dataset="Debug28", test_envs=(0, 1), steps=2, checkpoint_freq=1,
        hparams={"batch_size": 4}, skip_model_save=True, teacher=None)
    assert list(records["step"]) == [0, 1] and set(records["args.test_envs"]) == {(0, 1)}
    assert set(records["hparams.batch_size"]) == {4} and (tmp_path / "done").exists()
    assert not (tmp_path / "model.pkl").exists()
    with pytest.raises(SystemExit):
        domainbed_kd.train(tmp_path, algoritm="ERM")


@pytest.mark.parametrize("args", [["--help"], ["sweep", "launch", "--help"]])
def test_help_needs_no_library_that_is_slow_to_import(args):
    modules = imported_by("-m", "domainbed_kd", *args)
    assert "argparse" in modules
    assert not modules & {"torch", "torchvision", "numpy", "pandas", "timm", "open_clip", "tqdm"}
