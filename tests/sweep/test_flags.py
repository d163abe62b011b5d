import json
import os

import pytest
from conftest import GOLDENS
from launches import command_of, flags

from domainbed_kd import algorithms, command_launchers, datasets
from domainbed_kd.console import run_main
from domainbed_kd.scripts import sweep


def test_further_flags_reach_train(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend", "--checkpoint_freq", "2",
                     "--uda_holdout_fraction", "0.5", "--skip_model_save", "--task",
                     "domain_adaptation"))
    given = command_of(launched[0])
    assert (given["checkpoint_freq"], given["uda_holdout_fraction"]) == (["2"], ["0.5"])
    assert given["skip_model_save"] == [] and given["task"] == ["domain_adaptation"]


def test_launcher_options_reach_the_launcher_that_takes_them(tmp_path, monkeypatch):
    received = {}
    monkeypatch.setitem(command_launchers.REGISTRY, "mine", lambda commands, *, jobs_per_device=1:
                        received.update(jobs_per_device=jobs_per_device))
    args = flags("launch", tmp_path, "--command_launcher", "mine")
    assert sweep.main([*args, "--jobs_per_device", "3"]) == 0
    assert received == {"jobs_per_device": 3}
    with pytest.raises(ValueError, match="mine does not take --threads_per_job"):
        sweep.main([*args, "--threads_per_job", "3"])


def test_a_name_given_twice_or_in_its_other_form_is_one_job(tmp_path, launched):
    sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend",
                     "--algorithms", "ERM", "ERM", "--datasets", "Debug28", "Debug28"))
    assert len(launched) == len(set(launched)) == 6


def test_flags_stand_in_a_file_with_comments_and_quotes(tmp_path, launched):
    (tmp_path / "my sweep.args").write_text(
        "# What we ran in May.\n--datasets Debug28 --algorithms ERM  # one method\n\n"
        "--hparams '{\"batch_size\": 4, \"a\": \"b c\"}'\n--n_hparams 5 --n_trials 1\n"
        "--single_test_envs --skip_confirmation --command_launcher pretend\n")
    sweep.main(["launch", f"@{tmp_path / 'my sweep.args'}", "--n_hparams", "1",
                "--output_dir", str(tmp_path / "sweep")])
    assert len(launched) == 3
    assert command_of(launched[0])["hparams"] == ['{"batch_size": 4, "a": "b c"}']


def test_defaults_are_domainbeds():
    args = sweep.build_parser().parse_args(["launch", "--output_dir", "x"])
    full = json.loads((GOLDENS / "jobs_full_default.json").read_text())
    assert args.datasets == full["sweep_DATASETS"]
    assert args.algorithms == list(algorithms.ALGORITHMS)
    assert (args.task, args.n_hparams_from, args.n_hparams, args.n_trials, args.steps,
            args.hparams, args.holdout_fraction, args.single_test_envs, args.skip_confirmation) == (
        "domain_generalization", 0, 20, 3, None, None, 0.2, False, False)


@pytest.mark.parametrize("change, message", [
    (["--n_trials", "-1"], "--n_trials is -1"),
    (["--n_trials", "0"], "--n_trials is 0"),
    (["--n_trials", "two"], "invalid int value: 'two'"),
    (["--n_hparams_from", "-1"], "--n_hparams_from is -1"),
    (["--n_hparams_from", "3", "--n_hparams", "3"], "not a count"),
    (["--steps", "-5"], "--steps is -5"),
    (["--checkpoint_freq", "-5"], "--checkpoint_freq is -5"),
    (["--holdout_fraction", "0"], "--holdout_fraction is 0"),
    (["--holdout_fraction", "1.5"], "--holdout_fraction is 1.5"),
    (["--uda_holdout_fraction", "1"], "--uda_holdout_fraction is 1"),
    (["--hparams", '{"lr": 1'], "--hparams is not JSON"),
    (["--hparams", "[1]"], "--hparams takes a JSON object"),
    (["--task", "domain_generalisation"], "invalid choice"),
    (["--task", "domain_adaptation"], "--uda_holdout_fraction"),
    (["--algorithms", "SWADD"], "Algorithm not found: SWADD. Did you mean SWAD?"),
    (["--datasets", "Debug28", "PASC"], "Dataset not found: PASC. Did you mean PACS?"),
    (["--datasets", "Folder:../x"], "without a path"),
    (["--datasets", "Folder:x"], "--data_dir"),
    (["--datasets", "Folder:x", "--data_dir", "."], "Folder:x"),
    (["--datasets", "PACS"], "PACS: no data directory is given"),
    (["--datasets", "RotatedMNIST"], "RotatedMNIST: no data directory is given"),
    (["--datasets", "PACS", "--data_dir", "/no/such"], "no folder /no/such/PACS"),
    (["--datasets", "RotatedMNIST", "--data_dir", "/no/such"], "no folder /no/such"),
    (["--command_launcher", "locl"], "Launcher not found: locl. Did you mean local?"),
    (["--command_launcher", "no_module:f"], "Launcher not found: no_module:f"),
    (["--command_launcher", "os:getcwd", "--jobs_per_device", "2"], "does not take"),
    (["--test_envs", "3"], "Debug28 has environments 0 to 2"),
    (["--test_envs", "0", "1", "2"], "holds out all of Debug28"),
    (["--test_envs", "0", "1", "1"], "names an environment twice"),
    (["--test_envs", "0", "1"], "Name one, or three or more"),
    (["--test_envs", "0", "--single_test_envs"], "Leave one out"),
    (["--retry", "-1"], "--retry is -1"),
    (["--slurm_gpus", "-1"], "--slurm_gpus is -1"),
    (["--slurm_time", "0"], "--slurm_time is 0"),
    (["--slurm_cluster", "lsf"], "invalid choice"),
    (["--slurm_time", "5"], "local does not take --slurm_time"),
    (["--ray_gpus", "nan"], "--ray_gpus is nan"),
    (["--ray_cpus", "inf"], "--ray_cpus is inf"),
    (["--budget", "0"], "--budget is 0"),
    (["--hours_per_run", "-1"], "--hours_per_run is -1"),
    (["--watch", "0"], "--watch is 0"),
    (["--watch", "nan"], "--watch is nan"),
    (["--jobs_per_device", "0"], "--jobs_per_device is 0"),
    (["--threads_per_job", "0"], "--threads_per_job is 0"),
    (["--loader_processes", "-1"], "--loader_processes is -1"),
    (["--plugin", "no_such_module"], "--plugin no_such_module"),
    (["--output_dir", __file__], "is a file"),
    (["--output_dir", f"{__file__}/x"], "Not a directory"),
    (["@no_such_file"], "No such file"),
    (["--nonsense"], "--nonsense")])
def test_misuse_is_said_in_one_line_before_anything_is_written(
        change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run_main(lambda: sweep.main([*flags("launch", "sweep"), *change]))
    assert ended.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and message in err
    assert os.listdir(tmp_path) == []


def test_every_data_set_without_files_can_be_swept_without_data_dir(tmp_path, launched):
    fileless = [name for name in datasets.DATASETS if not datasets.facts(name).NEEDS_FILES]
    assert "DigitsDG" in fileless
    for name in fileless:
        assert sweep.main(flags("launch", tmp_path, "--command_launcher", "pretend",
                                "--datasets", name)) == 0
