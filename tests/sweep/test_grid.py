"""`sweep --grid`: every run with each of a list of hparams."""

import json

import pytest
from conftest import ROOT

from domainbed_kd.folder import manifest
from domainbed_kd.scripts import sweep
from domainbed_kd.sweep import flags, jobs

SWEEP = ["--datasets", "Debug28", "--algorithms", "ERM", "--single_test_envs", "--n_trials", "1",
         "--n_hparams", "1"]


def hparams_of(folder, *words):
    """The hparams, as recorded, of the runs that hold out the first domain."""
    _, launches = flags.parse(sweep.build_parser(), ["plan", "--output_dir", str(folder), *words])
    sweep.load_names(launches)
    return [job.train_args.get("hparams") for job in jobs.plan(launches)
            if job.train_args["test_envs"] == [0]]


def test_an_object_of_lists_is_all_its_combinations_over_hparams(tmp_path):
    grid = {"lr": [0.1, 0.2], "averaging": [None, "sma"]}
    found = hparams_of(tmp_path, *SWEEP, "--hparams", '{"lr": 1, "batch_size": 4}', "--grid",
                       json.dumps(grid))
    assert [json.loads(text) for text in found] == [
        {"lr": lr, "batch_size": 4} | ({"averaging": average} if average else {})
        for lr in (0.1, 0.2) for average in (None, "sma")]


def test_a_list_is_its_objects_and_one_without_hparams_is_the_plain_run(tmp_path):
    (tmp_path / "grid.json").write_text('[{"lr": null}, {"lr": 0.5}]')
    found = hparams_of(tmp_path, *SWEEP, "--grid", str(tmp_path / "grid.json"))
    assert found == [None, '{"lr": 0.5}']


@pytest.mark.parametrize("grid, words", [
    ("nowhere.json", "there is no such file"), ("{", "is not JSON"), ("[]", "no combination"),
    ('{"lr": []}', "no combination"), ('{"lr": 1}', "whose values are lists"),
    ("[3]", "no combination")])
def test_what_is_no_grid_is_refused_in_one_line(grid, words, tmp_path):
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        hparams_of(tmp_path, *SWEEP, "--grid", grid)
    assert "\n" not in str(error.value)


def test_a_sweeps_folder_knows_its_grid_without_the_file(tmp_path):
    (tmp_path / "grid.json").write_text('{"lr": [0.1, 0.2]}')
    args, _ = flags.parse(sweep.build_parser(), [
        "plan", "--output_dir", str(tmp_path), *SWEEP, "--grid", str(tmp_path / "grid.json")])
    manifest.add_launches(tmp_path, [{"flags": flags.for_manifest(args), "of_plugins": {}}])
    (tmp_path / "grid.json").unlink()
    assert hparams_of(tmp_path) == ['{"lr": 0.1}', '{"lr": 0.2}']


def test_hparams_of_a_grid_that_nothing_reads_are_named(tmp_path, capsys):
    args, _ = flags.parse(sweep.build_parser(), [
        "plan", "--output_dir", str(tmp_path), *SWEEP, "--grid", '{"lrr": [1]}'])
    sweep.launch.warn_of_unread(args)
    assert "nothing here reads 'lrr'. Did you mean lr?" in capsys.readouterr().err


def test_a_table_of_short_runs_averages_from_the_update_that_its_page_states(tmp_path):
    n = {}
    for name in ("composition", "composition_lite", "digits_since"):
        _, launches = flags.parse(sweep.build_parser(), [
            "plan", "--output_dir", str(tmp_path), f"@{ROOT / 'sweeps' / name}.args", "--data_dir",
            "d"])
        found = jobs.plan(launches)
        for job in found:
            hparams = json.loads(job.train_args["hparams"])
            if hparams.get("averaging") == "sma" or job.train_args["algorithm"] == "SMA":
                assert hparams["sma_start"] == 100
        n[name] = len(found)
    assert n == {"composition": 252, "composition_lite": 32, "digits_since": 96}
