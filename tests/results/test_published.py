import json
import shutil
import subprocess

import pytest
from conftest import GOLDENS

from domainbed_kd import datasets
from domainbed_kd.results import published, tables
from domainbed_kd.results.protocols import Protocol
from domainbed_kd.results.records import Coverage
from domainbed_kd.results.selection import METHODS, Outcome
from domainbed_kd.results.selection import IIDAccuracySelectionMethod as IID
from domainbed_kd.scripts import collect_results, report

# That of DomainBed's own table.
UPSTREAM = Protocol("ResNet-50 with frozen BatchNorm", "ImageNet", 5001, None, False)
SEARCHED = published.search(20, 3)
PARTS = ["network", "initial weights", "steps", "selection", "search", "exact mode"]


def table(acc=.5, dataset="PACS", names=("ERM", "CORAL"), average=False):
    usual = Coverage(1, 1, frozenset({("5001",)}))
    outcomes = {(dataset, name, env): Outcome({0: acc}, usual) for name in names
                for env in range(4)}
    return tables.build(IID, outcomes, list(names), [dataset], {dataset: 4})[average]


def merged(protocol=UPSTREAM, searched=SEARCHED, **how):
    made = table(**how)
    dataset = how.get("dataset", "PACS")
    return published.merge(made, {(dataset, name): {protocol} for name in made.rows}, searched)


def test_every_line_is_of_a_known_data_set_domain_and_selection_method():
    rows = published.load(unverified=True)
    assert len({row[:3] for row in rows}) == len(rows) > 100
    for row in rows:
        assert row.dataset in datasets.DATASETS and 10 < row.mean < 100 and row.source
        assert row.domain in ("", *datasets.environments(row.dataset))
        assert row.stderr is None or 0 <= row.stderr < 3
        assert row.selection in ("", *(method.name for method in METHODS))


@pytest.mark.parametrize("method, average", [
    ("ERM", 63.3), ("CORAL", 64.6), ("SWAD", 66.9), ("MIRO + SWAD", 68.1), ("SCMD", 69.1),
    ("QT-DoG", 66.2), ("EoQ (5 models)", 68.4), ("VL2V-ADiP", 75.5), ("VL2V-SD", 77.7),
    ("CLIPood", 78.6), ("CLIPCEIL++", 79.1), ("SPG", 74.7)])
def test_the_averages_are_those_that_the_sources_print(method, average):
    rows = published.load(unverified=True)
    means = [r.mean for r in rows if r.method == method and not r.domain]
    assert len(means) == 5 and sum(means) / 5 == pytest.approx(average, abs=.06)


def test_domains_average_to_the_data_sets_number():
    rows = published.load()
    checked = 0
    for whole in (row for row in rows if not row.domain):
        parts = [r.mean for r in rows if r.domain and r[:2] == whole[:2]]
        if parts:
            assert sum(parts) / len(parts) == pytest.approx(whole.mean, abs=.06)
            checked += 1
    assert checked == 10


def test_unverified_numbers_are_left_out():
    rows = published.load()
    assert not [row for row in rows if row.method == "KDDG"]
    assert [row.dataset for row in rows if row.method == "RISE"] == ["VLCS"]
    assert not [row for row in rows if row.method in ("CLIPood", "WAKD", "VL2V-SD", "LFME")]
    assert [(row.dataset, row.mean) for row in published.load(unverified=True)
            if row.method == "LFME"] == [("TerraIncognita", 53.4)]
    assert len([row for row in published.load(unverified=True) if row.method == "CLIPood"]) == 5


def test_rows_of_the_same_protocol_are_not_marked_and_compete():
    cells = merged(acc=.86).rows
    ours, theirs = cells["ERM"][-1], cells["CORAL, published"][-1]
    assert ours.number("±") == "86.0" and theirs.number("±") == "86.2 ± 0.3"
    assert cells["SagNet, published"][-1].number("±") == "86.3 ± 0.2"
    assert not theirs.differs and not ours.differs
    assert [cells["SagNet, published"][-1].rank, theirs.rank, ours.rank] == [1, 2, 0]
    assert cells["CORAL, published"][0].number("±") == "88.3"  # art painting
    assert cells["SagNet, published"][0].number("±") == "-"
    assert cells["MIRO, published"][-1].differs and cells["MIRO, published"][-1].rank == 0


@pytest.mark.parametrize("change, what", [
    ({"backbone": "ResNet-18"}, "network"), ({"weights": "AugMix"}, "initial weights"),
    ({"steps": 300}, "steps"), ({"is_fast": True}, "exact mode")])
def test_rows_of_another_protocol_are_marked_and_do_not_compete(change, what):
    other = UPSTREAM._replace(**change)
    cells = merged(protocol=other)
    assert cells.rows["CORAL, published"][-1].differs
    assert not cells.rows["ERM"][-1].differs and cells.rows["ERM"][-1].rank == 1
    erm = next(row for row in published.load() if row.method == "ERM")
    ours = {("PACS", "ERM"): {other}}
    assert published.differences(erm, IID.name, ours, SEARCHED) == [what]
    assert published.differences(erm, IID.name, ours, "1 draws, 1 trials") == sorted(
        [what, "search"], key=PARTS.index)
    assert published.differences(erm, "another", ours, SEARCHED) == sorted(
        [what, "selection"], key=PARTS.index)


def test_a_row_of_clip_in_a_sweep_leaves_the_other_published_rows_comparable():
    both = {("PACS", "ERM"): {UPSTREAM},
            ("PACS", "CLIP"): {UPSTREAM._replace(backbone="ViT-B-16", weights="CLIP")}}
    erm, clip = (next(row for row in published.load() if row.method == name)
                 for name in ("ERM", "CLIP ViT-B/32 zero-shot"))
    assert published.differences(erm, IID.name, both, SEARCHED) == []
    assert "network" in published.differences(clip, IID.name, both, SEARCHED)
    assert "initial weights" not in published.differences(clip, IID.name, both, SEARCHED)


def test_a_sweep_of_several_protocols_is_comparable_with_none():
    made = table()
    both = {("PACS", "ERM"): {UPSTREAM}, ("PACS", "CORAL"): {UPSTREAM._replace(steps=300)}}
    assert published.merge(made, both, SEARCHED).rows["ERM, published"][-1].differs


def test_a_column_without_runs_does_not_make_published_numbers_the_measure():
    made = table()
    for row in made.rows.values():
        row[0] = tables.Cell()
    found = published.merge(made, {("PACS", "ERM"): {UPSTREAM._replace(steps=1)}}, SEARCHED)
    assert found.rows["ERM, published"][0].differs


def test_averages_have_a_published_number_where_all_data_sets_do():
    cells = merged(average=True).rows
    assert [cell.number("±") for cell in cells["SWAD, published"]] == ["88.1 ± 0.1", "88.1"]
    assert cells["SWAD, published"][1].differs and not cells["ERM, published"][1].differs


def test_tables_without_numbers_and_unknown_data_sets_get_no_rows():
    assert published.merge(table(names=()), {}, SEARCHED).rows == {}
    assert list(merged(dataset="OfficeHome", names=["ERM"]).rows)[:2] == ["ERM", "ERM, published"]
    assert list(merged(dataset="Debug28", names=["ERM"]).rows) == ["ERM"]


# As commands.

@pytest.fixture
def vlcs(tmp_path):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    return tmp_path / "sweep"


def run(capsys, folder, *flags):
    assert collect_results.main(["--input_dir", str(folder), *flags]) == 0
    return capsys.readouterr().out


def test_published_rows_stand_below_the_sweeps_with_their_sources(vlcs, capsys):
    out = run(capsys, vlcs, "--published")
    first = out.split("Averages")[0].splitlines()
    names = [line.split("  ")[0] for line in first if line.startswith(("ERM", "SCMD"))]
    assert names == ["ERM", "ERM, published", "ERM (SWAD's run), published", "SCMD, published",
                     "ERM (CLIP ViT-B/16), published"]
    assert "80.9 +/- 0.2 !" in out and "Published rows, marked ! where" in out
    assert "ERM, published: ResNet-50 with frozen BatchNorm; initial weights ImageNet; 5,001 steps"\
        in out and "Other or not stated: steps, search. https://github.com/facebookresearch" in out
    oracle = out.split("test-domain validation set (oracle)")[1]
    assert "published" not in oracle.split("Protocol")[0]


@pytest.mark.parametrize("style, words", [
    ("latex", r"SCMD, published & - & - & - & - & 80.9 $\pm$ 0.2$^{\dagger}$ \\"),
    ("markdown", "| SCMD, published | - | - | - | - | 80.9 ± 0.2 ! |"),
    ("csv", '"SCMD, published",Avg,80.9,0.2,0,0,0,1')])
def test_published_rows_are_in_every_format(vlcs, capsys, style, words):
    assert words in run(capsys, vlcs, "--published", "--format", style)


def test_a_data_set_without_published_results_says_so(vlcs, capsys):
    for path in vlcs.glob("*/results.jsonl"):
        path.write_text(path.read_text().replace('"VLCS"', '"Debug28"'))
    assert "No published results are known on Debug28." in run(capsys, vlcs, "--published")


def test_what_domainbed_prints_has_no_published_rows(vlcs):
    with pytest.raises(ValueError, match="--published does not go with --upstream"):
        collect_results.main(["--input_dir", str(vlcs), "--published", "--upstream"])


def test_the_report_has_them_in_its_tables_only(vlcs):
    report.main(["--input_dir", str(vlcs), "--published"])
    text = (vlcs / "report.html").read_text()
    assert '<th scope="row">SCMD, published</th>' in text
    assert text.count("SCMD, published") == 2  # its table and its source


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_latex_with_published_rows_and_comparisons_compiles(vlcs, capsys, tmp_path):
    for path in list(vlcs.glob("*/results.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for i, name in enumerate(("FourDs", "a_b & c")):
            copy = vlcs / f"{path.parent.name}{i}"
            copy.mkdir()
            (copy / "results.jsonl").write_text("".join(json.dumps(
                r | {"args": r["args"] | {"algorithm": name}}) + "\n" for r in lines))
    run(capsys, vlcs, "--published", "--compare", "ERM", "--latex")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", vlcs / "results.tex"],
        cwd=tmp_path, capture_output=True, text=True)
    if "adjustbox.sty' not found" in done.stdout or "booktabs.sty' not found" in done.stdout:
        pytest.skip("this TeX lacks adjustbox or booktabs")
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "results.pdf").stat().st_size > 0
