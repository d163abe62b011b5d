import os
import subprocess
import sys

import pytest

from domainbed_kd import algorithms, command_launchers, datasets, extensions

PLUGIN = '''
import torch
from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.algorithms.erm import ERM
from domainbed_kd.datasets import Debug28


class Mine(ERM):
    """ERM by another name."""


class _Hidden(ERM):
    """Not public."""


class Debug29(Debug28):
    """More noise."""


def shout(commands):
    for command in commands:
        print(command.upper())


LAUNCHERS = {"shout": shout}
'''


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """Takes back what a test registers."""
    for module, name in ((algorithms, "ALGORITHMS"), (algorithms, "_REGISTERED"),
                         (datasets, "DATASETS"), (datasets, "_CLASSES"),
                         (command_launchers, "REGISTRY")):
        monkeypatch.setattr(module, name, getattr(module, name).copy())
    modules = set(sys.modules)
    yield
    for name in set(sys.modules) - modules:
        if name.startswith(("plugin ", "my_", "installed_")):
            del sys.modules[name]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", str(tmp_path))])
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package" / "__init__.py").write_text("")
    (tmp_path / "my_package" / "methods.py").write_text(PLUGIN)
    return tmp_path


def install(folder, entry_points):
    """Leaves what an installed package leaves: its module, and metadata with entry points."""
    (folder / "installed_methods.py").write_text(PLUGIN)
    info = folder / "installed_methods-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: installed-methods\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(entry_points)


@pytest.mark.parametrize("name", [
    "my_package.methods", "my_package/methods.py", "./my_package/methods.py"])
def test_a_module_adds_its_public_algorithms_data_sets_and_launchers(name, folder, capsys):
    before = list(algorithms.ALGORITHMS), list(datasets.DATASETS)
    extensions.load([name])
    assert [*before[0], "Mine"] == algorithms.ALGORITHMS
    assert [*before[1], "Debug29"] == datasets.DATASETS
    assert algorithms.get_algorithm_class("Mine").__doc__ == "ERM by another name."
    assert datasets.num_environments("Debug29") == 3
    command_launchers.get_launcher("shout")(["x"])
    assert capsys.readouterr().out == "X\n"


def test_loading_twice_is_as_loading_once(folder):
    extensions.load(["my_package.methods", "my_package.methods"])
    extensions.load(["my_package.methods"])
    assert algorithms.ALGORITHMS.count("Mine") == 1


def test_a_file_named_as_a_library_hides_nothing(folder):
    (folder / "random.py").write_text(PLUGIN)
    extensions.load(["random.py"])
    import random

    assert hasattr(random, "seed") and "Mine" in algorithms.ALGORITHMS


@pytest.mark.parametrize("name", ["my_broken", "my_broken.py"])
@pytest.mark.parametrize("content, message", [
    ("x = 1", "defines no Algorithm"),
    ("import no_such_library", "No module named 'no_such_library'"),
    ("def f(:", "invalid syntax"),
    (PLUGIN.replace("Mine", "SWAD"), "SWAD is already one of the algorithms"),
    (PLUGIN.replace("Debug29", "PACS"), "PACS is already one of the datasets"),
    (PLUGIN.replace('"shout":', '"local":'), "local is already one of the launchers"),
    ("LAUNCHERS = {'mine': 3}", "mine is not one of the launchers")])
def test_a_module_of_no_use_is_refused_by_name(content, message, name, folder):
    (folder / "my_broken.py").write_text(content)
    with pytest.raises(ValueError, match=f"--plugin {name}.*{message}"):
        extensions.load([name])


@pytest.mark.parametrize("name", ["my_nothing", "my_nothing.py", "my_package.nothing"])
def test_a_module_that_is_not_there_is_named(name, folder):
    with pytest.raises(ValueError, match=f"--plugin {name}"):
        extensions.load([name])


def test_entry_points_are_listed_without_import_and_imported_when_wanted(folder, monkeypatch):
    install(folder, "[domainbed_kd.algorithms]\nMine = installed_methods:Mine\n"
                    "Broken = no_such_library:Broken\n"
                    "[domainbed_kd.datasets]\nDebug29 = installed_methods:Debug29\n"
                    "[domainbed_kd.launchers]\nshout = installed_methods:shout\n")
    monkeypatch.syspath_prepend(folder)
    assert extensions.names("algorithms") == ["Broken", "Mine"]
    extensions.load([], ["ERM", "PACS", "Folder:x", "local", "nobody:knows"])
    assert "installed_methods" not in sys.modules
    extensions.load([], ["Mine"])
    assert "Mine" in algorithms.ALGORITHMS and "Debug29" not in datasets.DATASETS
    extensions.load([], ["Debug29", "shout"])
    assert "Debug29" in datasets.DATASETS and "shout" in command_launchers.REGISTRY
    with pytest.raises(ValueError, match="entry point Broken = no_such_library:Broken: No module"):
        extensions.load([], ["Broken"])


@pytest.mark.parametrize("entry, message", [
    ("Other = installed_methods:Mine", "must have the class's name"),
    ("Debug29 = installed_methods:Debug29", "not one of the algorithms"),
    ("Mine = installed_methods:Nothing", "Nothing")])
def test_an_entry_point_of_another_kind_is_refused_by_name(entry, message, folder, monkeypatch):
    install(folder, f"[domainbed_kd.algorithms]\n{entry}\n")
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError, match=f"entry point {entry}: .*{message}"):
        extensions.load([], [entry.split(" ")[0]])


@pytest.mark.slow
def test_train_and_sweep_find_what_an_installed_package_offers(folder):
    install(folder, "[domainbed_kd.algorithms]\nMine = installed_methods:Mine\n"
                    "[domainbed_kd.datasets]\nDebug29 = installed_methods:Debug29\n")
    ran = subprocess.run(
        [sys.executable, "-m", "domainbed_kd.scripts.sweep", "launch", "--algorithms", "Mine",
         "--datasets", "Debug29", "--single_test_envs", "--n_trials", "1", "--n_hparams", "1",
         "--steps", "1", "--hparams", '{"batch_size": 4}', "--skip_confirmation",
         "--output_dir", "sweep"],
        env=os.environ | {"PYTHONPATH": str(folder)}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(list(folder.glob("sweep/*/done"))) == 3


def test_every_sort_of_thing_has_a_group_of_entry_points():
    assert set(extensions.KINDS) == {"algorithms", "datasets", "launchers"}
    assert all(isinstance(extensions.names(kind), list) for kind in extensions.KINDS)
