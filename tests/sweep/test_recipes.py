"""Published experiments as files of flags, and the flags that they need."""

import json
import re
import warnings

import pytest
from conftest import ROOT

from domainbed_kd import hparams_registry
from domainbed_kd.algorithms import get_algorithm_class
from domainbed_kd.folder import curves
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import flags, jobs

RECIPES = sorted((ROOT / "recipes").glob("*.args"))


def planned(folder, *words):
    _, launches = flags.parse(sweep.build_parser(), ["plan", "--output_dir", str(folder), *words])
    sweep.load_names(launches)
    return jobs.plan(launches)


@pytest.fixture(params=RECIPES, ids=lambda path: path.stem)
def recipe(request):
    return request.param


def test_there_are_recipes():
    assert len(RECIPES) >= 7


def test_a_recipe_states_its_command_source_table_cost_and_what_is_not_known(recipe):
    head = recipe.read_text().split("--recipe")[0]
    for words in (f"sweep launch @recipes/{recipe.name}", "code at", "Reproduces:", "Cost:",
                  "Not known:"):
        assert words in head, words
    assert f"--recipe {recipe.stem}\n" in recipe.read_text()
    assert f"`{recipe.stem}`" in (ROOT / "docs" / "recipes.md").read_text()


def test_every_hparam_of_a_recipe_is_read_and_taken_by_its_methods(recipe, tmp_path):
    found = planned(tmp_path, f"@{recipe}", "--data_dir", "d")
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


def test_a_recipe_has_as_many_runs_as_its_head_says(recipe, tmp_path):
    head = recipe.read_text()
    n = int(re.search(r"= (\d+) (?:runs|students)", head)[1])
    found = planned(tmp_path, f"@{recipe}", "--data_dir", "d")
    students = [job for job in found if not any(job in other.teachers for other in found)]
    assert len(students) == n
    assert {curves.row(job.train_args).endswith(" (authors' protocol)") for job in found} == {True}


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


@pytest.mark.parametrize("more, words", [
    (["--epochs", "3"], "needs the hparam batch_size"),
    (["--epochs", "0"], "a number above 0"),
    (["--epochs", "2", "--steps", "5"], "without --steps"),
    (["--draws", '{"lr": 3}'], "whose values are lists"),
    (["--draws", '{"lr": []}'], "whose values are lists")])
def test_what_cannot_be_drawn_or_counted_is_refused(more, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        planned(tmp_path, *SWEEP, "--n_hparams", "1", *more)


def test_rows_of_a_recipe_are_apart_and_its_grid_is_one_protocol():
    args = {"algorithm": "RISE", "hparams": '{"averaging": "sma"}', "recipe": "rise_iccv2023"}
    assert curves.row(args) == "RISE + SMA (authors' protocol)"
    assert curves.row(args | {"recipe": None}) == "RISE + SMA"
