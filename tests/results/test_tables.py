import csv
import io
import re
import shutil
import subprocess

import numpy as np
import pytest

from domainbed_kd import algorithms, datasets
from domainbed_kd.results import formats, tables
from domainbed_kd.results.records import Coverage, Grid
from domainbed_kd.results.selection import IIDAccuracySelectionMethod as IID
from domainbed_kd.results.selection import Outcome

USUAL = ("11", "None", "None")


def outcome(*accs, finished=None, expected=None, settings=(USUAL,)):
    expected = len(accs) if expected is None else expected
    return Outcome(dict(enumerate(accs)), Coverage(
        expected if finished is None else finished, expected, frozenset(settings)))


def build(outcomes, names=("ERM", "CORAL", "MMD"), on=("Debug28",), n_envs=3):
    return tables.build(IID, outcomes, list(names), list(on), dict.fromkeys(on, n_envs))


def row(outcomes, algorithm, dataset="Debug28"):
    table = next(t for t in build(outcomes) if t.dataset == dataset)
    return table.rows[algorithm]


def everywhere(algorithm, *accs, dataset="Debug28", **more):
    return {(dataset, algorithm, env): outcome(*accs, **more) for env in range(3)}


# The numbers.

def test_a_cell_is_the_mean_over_trials_and_its_standard_error():
    accs = [.5, .625, .8]
    cell = row({("Debug28", "ERM", 1): outcome(*accs)}, "ERM")[1]
    assert cell.mean == pytest.approx(100 * sum(accs) / 3)
    assert cell.stderr == pytest.approx(100 * np.std(accs, ddof=0) / np.sqrt(3))
    assert cell.number("+/-") == "64.2 +/- 7.1"


def test_one_trial_has_no_error_and_no_trial_is_an_x():
    cells = row({("Debug28", "ERM", 0): outcome(.5)}, "ERM")
    assert [cell.number("+/-") for cell in cells] == ["50.0 +/- 0.0", "X", "X", "X"]


def test_the_average_of_a_row_is_of_unrounded_means_and_has_no_error():
    outcomes = {("Debug28", "ERM", env): outcome(acc) for env, acc in enumerate((.1004, .1004, .1))}
    assert row(outcomes, "ERM")[-1].number("+/-") == "10.0"
    assert row(outcomes, "ERM")[-1].mean == pytest.approx(10.02666)


def test_averages_are_over_the_test_envs_that_a_trial_has():
    outcomes = {("Debug28", "ERM", 0): outcome(.2, .4), ("Debug28", "ERM", 1): outcome(.6),
                ("Debug28", "ERM", 2): outcome(finished=0, expected=2)}
    averages = build(outcomes)[-1]
    # Trial 0 has (.2 + .6) / 2, trial 1 has .4 alone.
    assert averages.rows["ERM"][0].mean == pytest.approx(40)
    assert averages.rows["ERM"][0].stderr == pytest.approx(0)
    assert averages.rows["ERM"][1].number("+/-") == "40.0"
    assert averages.rows["ERM"][0].incomplete  # as env 2 has nothing at all


# Rows and columns.

def test_rows_are_domainbeds_then_ours_then_strangers_as_they_come():
    seen = ["zeta", "SWAD", "CORAL", "alpha", "ANDMask", "ERM", "CORAL"]
    assert tables.row_order(seen) == ["ERM", "CORAL", "ANDMask", "SWAD", "zeta", "alpha"]


def test_the_algorithms_of_the_package_keep_their_order():
    assert tables.row_order(reversed(algorithms.ALGORITHMS)) == algorithms.ALGORITHMS


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_columns_of_registered_datasets_are_their_domains(name):
    assert tables.environments(name, 99) == datasets.environments(name)


def test_columns_of_other_datasets_are_numbers():
    assert tables.environments("Folder:mine", 3) == ["0", "1", "2"]


def test_display_names_are_those_of_the_classes():
    for name in algorithms.ALGORITHMS:
        shown = algorithms.get_algorithm_class(name).display_name
        assert algorithms.display_name(name) == (shown or name)


# Best and second.

def ranks(outcomes):
    return [cells[0].rank for cells in build(outcomes)[0].rows.values()]


def test_the_best_and_the_second_of_a_column_are_ranked():
    assert ranks({("Debug28", "ERM", 0): outcome(.5), ("Debug28", "CORAL", 0): outcome(.7),
                  ("Debug28", "MMD", 0): outcome(.6)}) == [0, 1, 2]


def test_numbers_that_print_alike_rank_alike():
    assert ranks({("Debug28", "ERM", 0): outcome(.7001), ("Debug28", "CORAL", 0): outcome(.7),
                  ("Debug28", "MMD", 0): outcome(.6)}) == [1, 1, 2]


def test_a_hundred_beats_ninety_nine():
    assert ranks({("Debug28", "ERM", 0): outcome(.99), ("Debug28", "CORAL", 0): outcome(1.0)}
                 ) == [2, 1, 0]


def test_a_lonely_cell_is_not_best():
    assert ranks({("Debug28", "ERM", 0): outcome(.7)}) == [0, 0, 0]


def test_incomplete_cells_do_not_compete():
    assert ranks({("Debug28", "ERM", 0): outcome(.9, finished=1, expected=3),
                  ("Debug28", "CORAL", 0): outcome(.7), ("Debug28", "MMD", 0): outcome(.6)}
                 ) == [0, 1, 2]


def test_cells_of_another_protocol_are_marked_and_do_not_compete():
    outcomes = {("Debug28", "ERM", 0): outcome(.9, settings=[("5", "None", "None")]),
                ("Debug28", "CORAL", 0): outcome(.7), ("Debug28", "MMD", 0): outcome(.6)}
    assert ranks(outcomes) == [0, 1, 2]
    assert [cells[0].differs for cells in build(outcomes)[0].rows.values()] == [True, False, False]


def test_a_cell_that_mixes_protocols_is_marked_wherever_it_counts():
    outcomes = {**everywhere("ERM", .5), **everywhere("CORAL", .6),
                ("Debug28", "ERM", 1): outcome(.9, settings=[USUAL, ("5", "None", "None")])}
    table, averages = build(outcomes)
    assert [cell.differs for cell in table.rows["ERM"]] == [False, True, False, True]
    assert [cell.differs for cell in averages.rows["ERM"]] == [True, True]
    assert not any(cell.differs for cell in table.rows["CORAL"] + averages.rows["CORAL"])


def test_datasets_trained_for_different_steps_compare_in_the_averages():
    outcomes = {**everywhere("ERM", .5), **everywhere("CORAL", .6)}
    for name, acc in (("ERM", .5), ("CORAL", .6)):
        outcomes |= everywhere(name, acc, dataset="Debug224", settings=[("5", "None", "None")])
    averages = build(outcomes, names=("ERM", "CORAL"), on=("Debug28", "Debug224"))[-1]
    assert [cell.rank for cell in averages.rows["CORAL"]] == [1, 1, 1]


# Text.

def test_upstream_text_cuts_cells_and_ours_does_not():
    name = "AnAlgorithmWithAnUncommonlyLongName"
    table = build({("Debug28", name, 0): outcome(.5)}, names=[name])[0]
    cut = formats.upstream_text(table).splitlines()
    assert cut[0] == "" and cut[1] == ("-------- Dataset: Debug28, model selection method: "
                                       "training-domain validation set")
    assert cut[3].startswith(name[:20] + "  50.0 +/- 0.0 ") and cut[3].endswith(" X" + 20 * " ")
    lines = formats.text(table).splitlines()
    assert name in lines[3] and len(lines[2]) == len(lines[3])


def test_text_without_marks_equals_upstreams():
    for table in build({**everywhere("ERM", .5, .7), **everywhere("MMD", .1)}):
        assert formats.text(table) == formats.upstream_text(table)


def test_marks_say_what_a_cell_lacks_and_that_it_is_mixed():
    table = build({("Debug28", "ERM", 0): outcome(.5, finished=3, expected=60),
                   ("Debug28", "CORAL", 0): outcome(.5, settings=[USUAL, ("5", "x", "None")]),
                   ("Debug28", "MMD", 0): outcome(.5)})[0]
    lines = formats.text(table).splitlines()
    assert "50.0 +/- 0.0 *3/60 " in lines[3] and "50.0 +/- 0.0 ! " in lines[4]
    assert "*" not in lines[5] and "!" not in lines[5]
    assert "*" not in formats.upstream_text(table) and "!" not in formats.upstream_text(table)


def test_fourds_is_shown_as_the_paper_prints_it():
    table = build({}, names=["FourDs"])[0]
    assert formats.text(table).splitlines()[3].startswith("4Ds ")
    assert "FourDs" in formats.upstream_text(table)


# LaTeX.

NASTY = r"a_b %c &d #e ~f ^g \h $i {j} <k> |l"


def latex(outcomes, names=("ERM", "CORAL", "MMD"), on=("Debug28",)):
    parts = [formats._latex_section(IID.name), *map(formats.latex, build(outcomes, names, on))]
    return formats._latex_document(parts, 7)


def unescaped(character, text):
    return re.findall(rf"(?<!\\){re.escape(character)}", text)


def nasty_document():
    outcomes = {**everywhere(NASTY, .5, .6, dataset=f"Folder:{NASTY}"),
                **everywhere("ERM", .4, dataset=f"Folder:{NASTY}"),
                **everywhere("ERM", .4, dataset="ColoredMNIST", finished=1, expected=2),
                ("ColoredMNIST", NASTY, 0): outcome(.9, settings=[USUAL, ("5", "x", "None")])}
    return latex(outcomes, names=[NASTY, "ERM", "FourDs"], on=["ColoredMNIST", f"Folder:{NASTY}"])


def test_every_latex_row_has_as_many_cells_as_the_header():
    document = nasty_document()
    found = re.findall(r"\\begin\{tabular\}\{(l c*|lc*)\}\n\\toprule\n(.*?)\\bottomrule", document,
                       re.DOTALL)
    assert len(found) == 3
    for columns, body in found:
        for line in body.replace("\\midrule\n", "").splitlines():
            assert line.endswith(r" \\")
            assert len(unescaped("&", line)) == len(columns) - 1


def test_latex_escapes_names_and_balances_braces():
    document = nasty_document()
    assert len(unescaped("{", document)) == len(unescaped("}", document))
    for line in document.splitlines():
        assert not unescaped("#", line)
        assert not [m for m in unescaped("%", line.removeprefix("% "))
                    if line != r"\adjustbox{max width=\textwidth}{%"]
        assert not re.search(r"(?<!\\)_", line)
    assert formats.escape_latex(r"_%&#~^\$") == (
        r"\_\%\&\#\textasciitilde{}\textasciicircum{}\textbackslash{}\$")


def test_latex_prints_best_bold_second_underlined_and_marks():
    document = latex({("Debug28", "ERM", 0): outcome(.5, .5), ("Debug28", "CORAL", 0): outcome(.7),
                      ("Debug28", "MMD", 0): outcome(.9, finished=1, expected=8),
                      ("Debug28", "MMD", 1): outcome(.9, settings=[USUAL, ("5", "x", "None")])})
    assert r"CORAL & \textbf{70.0}$^{\circ}$ & X & X & X \\" in document
    assert r"ERM & \underline{50.0 $\pm$ 0.0} & X & X & X \\" in document
    assert (r"MMD & 90.0$^{\circ}$$^{*1/8}$ & 90.0$^{\circ}$$^{\dagger}$ & X & X \\"
            in document)
    assert r"$^{\circ}$ one trial, so no standard error." in document
    assert "finished runs / runs of a whole sweep" in document
    assert "another protocol" in document


def test_latex_explains_no_mark_that_is_not_there():
    document = latex(everywhere("ERM", .5, .6))
    assert r"\footnotesize" not in document and "circ" not in document


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_compiles_as_it_stands(tmp_path):
    (tmp_path / "results.tex").write_text(nasty_document())
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "results.tex"],
                          cwd=tmp_path, capture_output=True, text=True)
    if "adjustbox.sty' not found" in done.stdout or "booktabs.sty' not found" in done.stdout:
        pytest.skip("this TeX lacks adjustbox or booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "results.pdf").stat().st_size > 0


def test_upstream_latex_wraps_labels_before_it_cuts_them():
    table = build({}, names=["ERM"], on=["ColoredMNIST"])[0]
    assert r"\textbf{+90\%}       & " in formats.upstream_latex(table)
    table = build({}, names=["ERM"], on=["SpawriousO2O_medium"])[-1]
    assert r"\textbf{SpawriousO2O_medi & " in formats.upstream_latex(table)


def test_flags_in_latex_keep_their_two_hyphens():
    # Without braces between them LaTeX sets an en dash.
    assert formats.escape_latex("--single_test_envs ---") == r"-{}-single\_test\_envs -{}-{}-"


# Names from folders that anybody may have made.

LIVE = "x\n\\input{/etc/passwd}\r\x85\u2028\x1b[31m"


@pytest.mark.parametrize("style", ["text", "latex", "markdown", "csv"])
def test_a_name_with_line_breaks_stays_in_its_line(style):
    outcomes = everywhere(LIVE, .5, .6, dataset=LIVE)
    made = {IID: build(outcomes, names=[LIVE], on=[LIVE])}
    plain = {IID: build(everywhere("a", .5, .6, dataset="b"), names=["a"], on=["b"])}
    grid = Grid([])
    found, expected = (
        formats.document(style, tables_, {}, grid, 1, ["", f"{name}, {name}: failed: {name}"])
        for tables_, name in ((made, LIVE), (plain, "a")))
    assert len(found.splitlines()) == len(expected.splitlines())
    assert all(line.isprintable() for line in found.split("\n"))
    if style == "latex":
        assert r"\input" not in re.sub("(?m)^%.*", "", found)
        assert not any(line.lstrip().startswith("\\input") for line in found.splitlines())


def test_a_name_cannot_leave_the_code_block_of_markdown():
    text = formats.document("markdown", {}, {}, Grid([]), 1, ["", "run ```` <b>"])
    assert text.endswith("\n`````text\nrun ```` <b>\n`````\n")


# Markdown and CSV.

@pytest.mark.parametrize("start", "=+-@")
def test_csv_quotes_what_a_spreadsheet_takes_for_a_formula(start):
    name = f"{start}cmd|' /C calc'!A0"
    made = build(everywhere(name, .5, dataset=name), names=[name], on=[name])
    first = list(csv.DictReader(io.StringIO(formats.as_csv(made))))[0]
    assert first["dataset"] == first["algorithm"] == f"'{name}" and first["environment"] == "0"


def test_markdown_escapes_what_would_break_a_row():
    text = formats.markdown(build(everywhere(NASTY, .5, dataset=f"Folder:{NASTY}"),
                                 names=[NASTY], on=[f"Folder:{NASTY}"])[0])
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert lines[1] == "| --- | --- | --- | --- | --- |"
    assert {len(unescaped("|", line)) for line in lines} == {6}


def test_markdown_prints_best_bold_and_marks():
    text = formats.markdown(build({
        ("Debug28", "ERM", 0): outcome(.5), ("Debug28", "CORAL", 0): outcome(.7),
        ("Debug28", "MMD", 0): outcome(.9, finished=1, expected=8)})[0])
    assert "| CORAL | **70.0 ± 0.0** | X | X | X |" in text
    assert r"| MMD | 90.0 ± 0.0 \*1/8 | X | X | X |" in text


def test_csv_has_a_line_per_number_with_all_its_digits():
    made = build({("Debug28", "ERM", 0): outcome(1 / 3, .5, finished=2, expected=4),
                  ("Debug28", "CORAL", 2): outcome(.5, settings=[USUAL, ("5", "x", "None")])})
    found = list(csv.DictReader(io.StringIO(formats.as_csv(made))))
    assert [(r["dataset"], r["algorithm"], r["environment"]) for r in found] == [
        ("Debug28", "ERM", "0"), ("Debug28", "CORAL", "2"),
        ("Debug28", "ERM", "all"), ("Avg", "ERM", "all"),
        ("Debug28", "CORAL", "all"), ("Avg", "CORAL", "all")]
    assert float(found[0]["mean"]) == 100 * np.mean([1 / 3, .5])
    assert [found[0][k] for k in ("n_trials", "runs_finished", "runs_expected", "other_protocol")
            ] == ["2", "2", "4", "0"]
    assert found[1]["other_protocol"] == "1"
