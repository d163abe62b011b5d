import argparse

import pytest
from conftest import golden

from domainbed_kd.folder import args, files
from domainbed_kd.folder.args import FLAGS
from domainbed_kd.scripts import sweep, train

DEBUG = ["--dataset", "Debug28", "--steps", "6", "--checkpoint_freq", "2",
         "--hparams", '{"batch_size": 4}']
# What a run may keep beside its records, or how it is allowed to begin.
BESIDE = [["--diagnostics"], ["--save_logits"], ["--format", "safetensors"],
          ["--allow_bad_teacher"]]


def parsed(*words):
    return train.build_parser().parse_args(list(words))


def other(flag):
    """A value of a flag that is not its default."""
    if flag.type is bool:
        return True
    if "choices" in flag.options:
        return next(value for value in flag.options["choices"] if value != flag.default)
    return {int: 7, float: 0.7}.get(flag.type, "another") if "nargs" not in flag.options else [7]


def test_what_goes_on_record_of_a_plain_run_is_what_domainbed_records():
    names = golden("results_jsonl_types.json")["args"]
    assert args.on_record(parsed()).keys() == names.keys() | {"checkpoint_freq"}


@pytest.mark.parametrize("name", [name for name in FLAGS if FLAGS[name].on_record == "if given"])
def test_our_flags_go_on_record_when_they_are_given(name):
    given = args.on_record(argparse.Namespace(**{**vars(parsed()), name: other(FLAGS[name])}))
    assert given.keys() - args.on_record(parsed()).keys() == {name}


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "fork"])
def test_a_flag_says_whether_runs_that_differ_in_it_are_different(name):
    plain = vars(parsed())
    changed = args.identity(plain | {name: other(FLAGS[name])})
    assert (changed != args.identity(plain)) is FLAGS[name].is_identity


def test_a_run_is_the_same_wherever_its_files_lie_and_however_little_its_record_says():
    there = vars(parsed("--data_dir", "a", "--output_dir", "b", "--teacher", "x/teacher"))
    here = vars(parsed("--data_dir", "c", "--output_dir", "d", "--teacher", "y/teacher"))
    assert args.identity(there) == args.identity(here)
    assert args.identity(there) != args.identity(here | {"teacher": "y/another"})
    assert args.identity({}) == args.identity(vars(parsed()))
    assert args.identity({"steps": 0}) == args.identity({"steps": None})


@pytest.mark.parametrize("words", [
    [], ["--fast", "--compile", "--steps", "3"], ["--test_envs", "0", "2", "--seed", "5"],
    ["--output_dir=-dash", "--data_dir=--x y"], ["--plugin", "a b.py", "--plugin=-c.py"]])
def test_a_commands_words_say_its_args(words):
    found = args.of_words(words)
    assert args.of_words(args.words(found)) == found


def test_a_sweep_shares_flags_of_a_run_and_names_folders_by_what_is_on_record():
    given = sweep.build_parser().parse_args(
        ["launch", "--output_dir", "x", "--save_logits", "--wandb", "--plugin", "p.py"])
    assert args.of_sweep(given) == {"data_dir": None, "task": "domain_generalization",
                                    "holdout_fraction": 0.2, "save_logits": True}
    assert args.off_record(given) == ["--wandb", "--plugin", "p.py"]


@pytest.mark.parametrize("flags", BESIDE, ids=lambda flags: flags[0])
def test_a_run_that_was_interrupted_goes_on_whatever_it_is_to_keep_beside_its_records(
        flags, tmp_path, monkeypatch):
    append = files.append_record

    def append_and_die(folder, record):
        append(folder, record)
        if record["step"] == 4:
            raise KeyboardInterrupt  # after the state at step 2

    command = [*DEBUG, "--output_dir", str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(files, "append_record", append_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.main(command)
    assert train.main([*command, *flags]) == 0
    assert files.is_done(tmp_path) and files.last_record(tmp_path)["step"] == 5
    assert files.lacks(tmp_path, vars(parsed(*flags))) == []
    assert train.main(command) == 0  # it holds the run, finished
