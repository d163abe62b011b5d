import re

import pytest
from conftest import GOLDENS, golden
from test_records import line, write

from domainbed_kd.scripts import list_top_hparams

FLAGS = {"--input_dir": str(GOLDENS / "sweep_data"), "--dataset": "VLCS", "--algorithm": "ERM",
         "--test_env": "0"}


def run(**changes):
    flags = FLAGS | {f"--{name}": str(value) for name, value in changes.items()}
    return list_top_hparams.main([word for pair in flags.items() for word in pair])


def sorted_blocks(text):
    """The text with its trials and folders sorted: DomainBed has them in the disk's order."""
    def sort_folders(block):
        return re.sub(r"(?:\t\t\tdomainbed/.*\n)+",
                      lambda m: "".join(sorted(m[0].splitlines(keepends=True))), block)

    methods = re.split(r"(?=^Model selection)", text, flags=re.MULTILINE)
    return [[sort_folders(block) for block in
             sorted(re.split(r"(?=^trial_seed)", method, flags=re.MULTILINE))]
            for method in methods]


@pytest.mark.parametrize("env", [0, 3])
def test_the_golden_sweep_prints_as_domainbed_prints_it(capsys, env):
    assert run(test_env=env) == 0
    out = capsys.readouterr().out
    expected = golden(f"list_top_hparams_VLCS_ERM_{env}_numpy1_style.txt")
    assert sorted_blocks(out) == sorted_blocks(expected)
    assert len(out) == len(expected)


def test_a_whole_accuracy_is_printed_as_it_stands_in_the_record(tmp_path, capsys):
    """DomainBed prints what json.loads makes of a record: 1 for 1 and 1.0 for 1.0."""
    for seed, value in enumerate(("1", "1.0")):
        write(tmp_path / str(seed), line(trial_seed=seed).replace("0.5", value))
    run(input_dir=tmp_path)
    oracle = capsys.readouterr().out.split("(oracle)")[1]
    assert oracle.index("{'val_acc': 1, 'test_acc': 1}") < oracle.index(
        "{'val_acc': 1.0, 'test_acc': 1.0}")


def test_trials_and_folders_are_sorted(capsys):
    run()
    out = capsys.readouterr().out
    assert re.findall(r"trial_seed: (\d)", out) == ["0", "1"] * 3
    for block in re.findall(r"output_dirs:\n((?:\t\t\t.*\n)+)", out):
        assert block.splitlines() == sorted(block.splitlines())


def test_fast_and_exact_folders_of_one_draw_are_told_apart(tmp_path, capsys):
    for name, more in (("exact", {}), ("quick", {"fast": True})):
        write(tmp_path / name, line(output_dir=name, **more), line(10, output_dir=name, **more))
    run(input_dir=tmp_path)
    out = capsys.readouterr().out
    assert out.count("\t\t\texact (exact mode)\n\t\t\tquick (fast mode)\n") == 2


@pytest.mark.parametrize("changes, words", [
    ({"dataset": "PACS"}, "--dataset PACS: .* it has VLCS."),
    ({"algorithm": "CORAL"}, "--algorithm CORAL: .* it has ERM."),
    ({"test_env": 7}, "--test_env 7: .* it has 0, 1, 2, 3."),
    ({"input_dir": "no/such/folder"}, "no/such/folder: there is no such folder")])
def test_what_is_not_there_is_an_error_that_names_what_is(changes, words):
    with pytest.raises((ValueError, OSError), match=words):
        run(**changes)


def test_an_empty_sweep_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="it has none at all"):
        run(input_dir=tmp_path)


def test_4ds_is_found_by_the_name_that_tables_show(tmp_path, capsys):
    for path in (GOLDENS / "sweep_data").glob("*/results.jsonl"):
        (tmp_path / path.parent.name).mkdir()
        text = path.read_text().replace('"algorithm": "ERM"', '"algorithm": "FourDs"')
        (tmp_path / path.parent.name / "results.jsonl").write_text(text)
    assert run(input_dir=tmp_path, algorithm="4Ds") == 0
    assert run(input_dir=tmp_path, algorithm="FourDs") == 0
    first, second = capsys.readouterr().out.split("Total records: 200\n")[1:]
    assert first == second
