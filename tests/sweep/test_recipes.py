"""Published experiments as files of flags, and the flags that they need."""

import itertools
import json
import re
import shlex
import warnings
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torchvision
from conftest import ROOT
from PIL import Image

from domainbed_kd import hparams_registry
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.folder import curves
from domainbed_kd.results import records
from domainbed_kd.run import build
from domainbed_kd.scripts import collect_results, sweep, train
from domainbed_kd.sweep import flags, jobs

RECIPES = sorted((ROOT / "recipes").glob("*.args"))


def planned(folder, *words):
    _, launches = flags.parse(sweep.build_parser(), ["plan", "--output_dir", str(folder), *words])
    sweep.load_names(launches)
    return jobs.plan(launches)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


@pytest.fixture
def data(tmp_path):
    """A data directory with images of four digits in domains of 20, 24 and 28."""
    pixels = np.random.RandomState(0)
    for dataset, domains in (("digits", "abc"), ("ArtClipart", ("Art", "Clipart"))):
        for i, domain in enumerate(domains):
            for label in ("one", "two", "three", "four"):
                folder = tmp_path / "data" / dataset / domain / label
                folder.mkdir(parents=True)
                for k in range(5 + i):
                    Image.fromarray(pixels.randint(0, 255, (70, 70, 3), dtype=np.uint8)).save(
                        folder / f"{k}.png")
    return tmp_path / "data"


def test_there_are_recipes():
    assert len(RECIPES) >= 11


def test_a_recipe_states_its_command_source_table_cost_and_what_is_not_known(recipe):
    head = recipe.read_text().split("--recipe")[0]
    for words in (f"sweep launch @recipes/{recipe.name}", "code at", "Reproduces:", "Cost:",
                  "Not known:"):
        assert words in head, words
    assert f"--recipe {recipe.stem}\n" in recipe.read_text()
    assert f"`{recipe.stem}`" in (ROOT / "docs" / "recipes.md").read_text()


def test_every_hparam_of_a_recipe_is_read_and_taken_by_its_methods(recipe, tmp_path, data):
    found = planned(tmp_path, f"@{recipe}", "--data_dir", str(data))
    asked = {(job.train_args["algorithm"], job.train_args["dataset"], job.train_args["hparams"])
             for job in found if not any(job in other.teachers for other in found)}
    for algorithm, dataset, text in asked:
        cls, hparams = get_algorithm_class(algorithm), json.loads(text)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            whole = hparams_registry.override(
                hparams_registry.default_hparams(algorithm, dataset), text, cls.takes)
        assert all(whole[name] == value for name, value in hparams.items())
        assert all(cls.takes[name].fits(whole[name]) for name in cls.takes.keys() & whole.keys())


def test_a_recipe_has_as_many_runs_as_its_head_says(recipe, tmp_path, data):
    head = recipe.read_text()
    n = int(re.search(r"= (\d+) (?:runs|students)", head)[1])
    found = planned(tmp_path, f"@{recipe}", "--data_dir", str(data))
    students = [job for job in found if not any(job in other.teachers for other in found)]
    assert len(students) == n
    assert {curves.row(job.train_args).endswith(" (authors' protocol)") for job in found} == {True}


@pytest.mark.filterwarnings("ignore:--hparams. nothing here reads")  # of a teacher
def test_a_recipe_resolves_to_the_published_constants(recipe, tmp_path, data):
    """tests/data/recipes.json has them as they stand in the papers and in the authors' code.

    Lengths of 5,000 and 50,000 steps are those plus 1, as DomainBed counts.
    """
    wanted = json.loads((ROOT / "tests" / "data" / "recipes.json").read_text())[recipe.stem]
    _, [args] = flags.parse(sweep.build_parser(), [
        "plan", "--output_dir", str(tmp_path), f"@{recipe}", "--data_dir", str(data)])
    sweep.load_names([args])
    assert {name: getattr(args, name) for name in wanted["flags"]} == wanted["flags"]
    assert json.loads(args.draws or "{}") == wanted.get("draws", {})
    axes = [dict(zip(wanted.get("grid", {}), point))
            for point in itertools.product(*wanted.get("grid", {}).values())]
    assert json.loads(args.grid or "[{}]") == axes
    datasets, teachers = set(), []
    for job in jobs.plan([args]):
        teachers += job.teachers
        if job.train_args["algorithm"] not in wanted["flags"]["algorithms"] or (
                job.train_args["hparams_seed"] > 0):
            continue
        found = build.choose_hparams(job.train_args)
        of_dataset = wanted.get("by_dataset", {}).get(job.train_args["dataset"], {})
        for name, value in (wanted["hparams"] | of_dataset).items():
            assert found[name] == value, name
        datasets.add(job.train_args["dataset"])
    assert datasets == set(args.datasets) and datasets >= wanted.get("by_dataset", {}).keys()
    assert bool(teachers) == ("teacher" in wanted)
    for job in teachers:
        of_teacher = wanted["teacher"]
        assert job.train_args["algorithm"] == of_teacher["algorithm"]
        assert job.train_args["steps"] == of_teacher.get("steps", job.train_args["steps"])
        found = build.choose_hparams(job.train_args)
        for name, value in of_teacher["hparams"].items():
            assert found[name] == value, name


def small(hparams):
    """A recipe's hparams on images of 64 pixels, networks at random, a CLIP that ships."""
    changes = {"weights": "none", "image_size": 64, "batch_size": 4}
    if "clip_backbone" in hparams:
        changes["clip_backbone"] = "tiny"
    if hparams.get("backbone") == "deit_small_patch16_224":
        changes |= {"backbone": "test_vit", "image_size": 160}
    if isinstance(teacher := hparams.get("teacher"), dict):
        own = {name: value for name, value in teacher["hparams"].items() if name != "batch_size"}
        changes["teacher"] = teacher | {"hparams": own | {"weights": "none"}} | (
            {"steps": 2} if "steps" in teacher else {})
    return hparams | changes


@pytest.fixture
def cifar(monkeypatch):
    """CIFAR-100 and CIFAR-10 of 40 training and 10 test images each."""
    def made(n_classes):
        def part(root, train, download):
            pixels = np.random.RandomState(n_classes + train)
            n = 40 if train else 10
            return SimpleNamespace(data=pixels.randint(0, 255, (n, 32, 32, 3), dtype=np.uint8),
                                   targets=pixels.randint(n_classes, size=n).tolist())
        return part

    for n_classes in (10, 100):
        monkeypatch.setattr(torchvision.datasets, f"CIFAR{n_classes}", made(n_classes))


def curves_by_row(folder):
    """How many runs a folder's tables have in each row."""
    return Counter(curves.row(curve.args) for curve in records.Folder(folder).curves())


@pytest.mark.slow
def test_a_recipe_trains_and_its_row_says_whose_protocol_it_is(
        recipe, tmp_path, data, cifar):
    text = recipe.read_text()
    hparams = json.loads(shlex.split(re.search(r"^--hparams (.*)$", text, re.M)[1])[0])
    dataset = {"mosaickd_neurips2021": "CIFAR", "fourds_eccv2024": "Folder:ArtClipart"}.get(
        recipe.stem, "Folder:digits")
    hparams = small(hparams)
    if dataset == "CIFAR":
        hparams = {name: value for name, value in hparams.items() if name != "image_size"}
    length = ["--epochs", "1"] if "--epochs" in text else ["--steps", "2", "--checkpoint_freq", "1"]
    found = planned(tmp_path / "sweep", f"@{recipe}", "--data_dir", str(data), "--datasets",
                    dataset, "--n_trials", "1", "--n_hparams", "1", "--allow_bad_teacher", *length,
                    "--hparams", json.dumps(hparams))
    student = next(job for job in found if not any(job in other.teachers for other in found))
    for job in (*student.teachers, student):
        assert train.main(shlex.split(job.command_str)[3:]) == 0
    plain = [word for word in shlex.split(student.command_str)[3:] if word != recipe.stem]
    plain.remove("--recipe")
    assert train.main([*plain, "--output_dir", str(tmp_path / "sweep" / "plain")]) == 0
    found = curves_by_row(tmp_path / "sweep")
    name = curves.row(student.train_args)
    assert name.endswith(" (authors' protocol)")
    assert {name, name.removesuffix(" (authors' protocol)")} <= found.keys()
    assert found[name] == found[name.removesuffix(" (authors' protocol)")] == 1


SWEEP = ["--datasets", "PACS", "--algorithms", "ERM", "--single_test_envs", "--n_trials", "2",
         "--data_dir", "d"]


def test_draws_are_from_their_lists_by_seed_and_trial_and_seed_0_draws_nothing(tmp_path):
    found = planned(tmp_path, *SWEEP, "--n_hparams", "30", "--draws", '{"lr": [3e-5, 5e-5]}',
                    "--hparams", '{"batch_size": 8}')
    drawn = {}
    for job in found:
        args = job.train_args
        seed = args["hparams_seed"], args["trial_seed"]
        hparams = json.loads(args["hparams"])
        assert hparams["batch_size"] == 8
        drawn.setdefault(seed, set()).add(hparams.get("lr"))
    assert all(len(values) == 1 for values in drawn.values())  # the same for every test env
    assert drawn[0, 0] == drawn[0, 1] == {None}
    values = [next(iter(v)) for (seed, _), v in drawn.items() if seed]
    assert set(values) == {3e-5, 5e-5} and 15 < values.count(3e-5) < 43
    assert [drawn[seed, 0] for seed in range(30)] != [drawn[seed, 1] for seed in range(30)]


def test_epochs_are_passes_over_the_training_domains_in_whole_batches(tmp_path):
    images = {0: 2048, 1: 2344, 2: 1670, 3: 3929}  # of PACS's art, cartoon, photo, sketch
    found = planned(tmp_path, *SWEEP, "--n_hparams", "1", "--epochs", "20", "--holdout_fraction",
                    "0.1", "--hparams", '{"batch_size": 43}')
    for job in found:
        [held_out] = job.train_args["test_envs"]
        kept = sum(n - int(0.1 * n) for env, n in images.items() if env != held_out)
        assert job.train_args["checkpoint_freq"] == kept // 129
        assert job.train_args["steps"] == 20 * (kept // 129)


def test_epochs_of_a_users_own_folder_are_counted_there_for_teachers_too(tmp_path, data):
    teacher = {"run": "ERM", "swapped": True, "hparams": {"batch_size": 2}}
    found = planned(
        tmp_path, "--datasets", "Folder:ArtClipart", "--algorithms", "4Ds", "--single_test_envs",
        "--n_trials", "1", "--n_hparams", "1", "--data_dir", str(data), "--epochs", "3",
        "--hparams", json.dumps({"batch_size": 4, "teacher": teacher}))
    # Of 20 and 24 images a fifth is held out: 16 and 20 are 4 and 5 batches of 4, 8 and 10 of 2.
    lengths = {(job.train_args["algorithm"], *job.train_args["test_envs"]):
               (job.train_args["steps"], job.train_args["checkpoint_freq"]) for job in found}
    assert lengths == {("ERM", 1): (24, 8), ("ERM", 0): (30, 10),
                       ("FourDs", 0): (15, 5), ("FourDs", 1): (12, 4)}


@pytest.mark.parametrize("more, words", [
    (["--epochs", "3"], "needs the hparam batch_size"),
    (["--epochs", "0"], "a number above 0"),
    (["--epochs", "2", "--steps", "5"], "without --steps"),
    (["--draws", '{"lr": 3}'], "whose values are lists"),
    (["--draws", '{"lr": []}'], "whose values are lists")])
def test_what_cannot_be_drawn_or_counted_is_refused(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        planned(tmp_path, *SWEEP, "--n_hparams", "1", *more)


def test_a_table_parts_the_authors_protocol_from_domainbeds_and_selects_within_each(
        tmp_path, capsys):
    def record(env, seed, accuracy, recipe):
        args = {"algorithm": "RISE", "dataset": "Debug28", "test_envs": [env], "trial_seed": 0,
                "hparams_seed": seed, "hparams": None, "steps": 5,
                "task": "domain_generalization"} | ({"recipe": "rise_iccv2023"} if recipe else {})
        return {"step": 4, "args": args, "hparams": {}, **{
            f"env{i}_{split}_acc": accuracy for i in range(3) for split in ("in", "out")}}

    runs = [record(env, seed, accuracy, recipe) for env in range(3)
            for seed, accuracy, recipe in (
                (0, 0.5, False), (1, 0.25, False), (0, 0.75, True), (1, 0.9, True))]
    for i, made in enumerate(runs):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "results.jsonl").write_text(json.dumps(made) + "\n")
    collect_results.main(["--input_dir", str(tmp_path)])
    table = capsys.readouterr().out.partition("Averages")[0]
    plain, theirs = (line for line in table.splitlines() if line.startswith("RISE"))
    assert theirs.startswith("RISE (authors' protocol) ") and "authors" not in plain
    assert "50.0" in plain and "90.0" in theirs and "75.0" not in table


def test_rows_of_a_recipe_are_apart_and_its_grid_is_one_protocol():
    args = {"algorithm": "RISE", "hparams": '{"averaging": "sma"}', "recipe": "rise_iccv2023"}
    assert curves.row(args) == "RISE + SMA (authors' protocol)"
    assert curves.row(args | {"recipe": None}) == "RISE + SMA"
