import json

import pytest

from domainbed_kd.folder import files

ARGS = {"algorithm": "KDDG", "checkpoint_freq": None, "data_dir": "./my: data", "dataset": "PACS",
        "fast": True, "holdout_fraction": 0.2, "hparams": '{"lr": 1, "name": null}',
        "hparams_seed": 3, "output_dir": "elsewhere/run", "seed": 4, "skip_model_save": False,
        "steps": 12, "task": "domain_generalization", "teacher": "sweep/teacher",
        "test_envs": [1, 3], "trial_seed": 2, "uda_holdout_fraction": 0}


def found(sweep):
    return files.without_results(sweep, sorted(path.name for path in sweep.iterdir()))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def printed(args, capsys):
    from domainbed_kd.run import records

    records.print_settings("Environment", {"Python": "3"})
    records.print_settings("Args", args)
    records.print_settings("HParams", {"lr": 1})
    return capsys.readouterr().out


def test_what_a_job_is_to_train_is_read_back(folder):
    files.leave_args(folder, ARGS)
    assert found(folder.parent) == [ARGS | {"output_dir": str(folder)}]


def test_what_a_run_printed_last_tells_where_no_sweep_did(folder, capsys):
    out = printed(ARGS | {"steps": 5}, capsys) + printed(ARGS, capsys)
    (folder / "out.txt").write_text(out)
    assert found(folder.parent) == [ARGS | {"output_dir": str(folder)}]
    files.leave_args(folder, ARGS | {"steps": 7})
    assert found(folder.parent)[0]["steps"] == 7
    (folder / "args.json").write_text("")  # as a full disk leaves it
    assert found(folder.parent)[0]["steps"] == 12


@pytest.mark.parametrize("text", [
    "", "[]", "null", "{}", json.dumps(ARGS | {"test_envs": []}),
    json.dumps(ARGS | {"dataset": ["PACS"]}), json.dumps(ARGS | {"steps": "12"})])
def test_what_does_not_tell_it_counts_for_nothing(folder, text):
    for name in ("args.json", "out.txt"):
        (folder / name).write_text(text)
    (folder.parent / "notes.txt").write_text(text)
    assert found(folder.parent) == []


@pytest.mark.parametrize("old, new", [
    ("\tsteps: 12\n", "\tsteps: 1 2\n"), ("\ttest_envs: [1, 3]\n", ""), ("Args:", "Arguments:")])
def test_damaged_output_counts_for_nothing(folder, capsys, old, new):
    (folder / "out.txt").write_text(printed(ARGS, capsys).replace(old, new))
    assert found(folder.parent) == []


def test_the_reason_of_a_failure_is_a_line_even_if_the_disk_was_full(folder):
    assert files.failure(folder) is None
    (folder / "failed").write_text("error: No memory.\n")
    assert files.failure(folder) == "error: No memory."
    (folder / "failed").write_text("")
    assert "the disk was too full" in files.failure(folder)
