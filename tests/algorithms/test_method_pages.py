"""Every method has a page, and its page says what the code does."""

import csv
import re

import method_pages
import pytest
from conftest import ROOT

from domainbed_kd import algorithms
from domainbed_kd.results import published

HEADINGS = ["What it does", "Command", "Equations", "Hparams", "Logged values",
            "Departures from the paper", "Published numbers", "Results here", "Cost"]


@pytest.fixture(params=algorithms.SHIPPED)
def method(request):
    return request.param


@pytest.fixture
def page(method):
    return method_pages.page_of(method).read_text(encoding="utf-8")


def section(page, heading):
    return re.search(rf"(?ms)^## {heading}\n(.*?)(?=^## |\Z)", page)[1].strip()


def test_a_page_has_the_headings_of_all_and_something_below_each(method, page):
    assert re.findall(r"(?m)^## (.*)", page) == HEADINGS
    assert all(section(page, heading) for heading in HEADINGS)
    name = method_pages.name_of(method)
    assert re.search(rf"--algorithms (ERM )?{name} ", section(page, "Command"))


def test_hparams_defaults_and_draws_are_those_of_the_code(method, page):
    words = method_pages.words_of(page)
    assert all(words.values()), f"{method}: an hparam is not explained"
    assert words.keys() == {row[0] for row in method_pages.rows(method)}
    if words:
        assert method_pages.table(method, words).strip() in section(page, "Hparams")


def test_published_numbers_are_those_of_the_file_with_its_sources(method, page):
    found = re.findall(r"\d+\.\d(?: ± \d\.\d)?(?= \|)", section(page, "Published numbers"))
    with published.PATH.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    known = {f"{float(line['mean']):.1f}"
             + (f" ± {float(line['stderr']):.1f}" if line["stderr"] else "")
             for line in lines if not line["domain"]}
    assert set(found) <= known
    assert method_pages.numbers(method).strip() in page


def test_results_are_those_of_the_page_on_results(method, page):
    results = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    own, erm = ([line for line in results.splitlines() if line.startswith(f"| {name} |")]
                for name in (method_pages.name_of(method), "ERM"))
    for ours, theirs in re.findall(r": (\d+\.\d.*?)(?:; ERM (\d.*?))?\.(?:\s|$)",
                                   section(page, "Results here")):
        assert any(line.endswith(f"| {ours} |") for line in own), ours
        assert not theirs or any(line.endswith(f"| {theirs} |") for line in erm), theirs


def column_of(text, corner, column):
    """{first cell, without its link: cell of the column} of the table with that first cell."""
    lines = text[text.index(f"\n|{corner}|") + 1:].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    return {re.sub(r"\[`?(.*?)`?\]\(.*\)", r"\1", row[0]): row[head.index(column)]
            for row in rows if row[head.index(column)]}


@pytest.mark.parametrize("column, study", [
    ("1,200 steps", "DigitsDG and the tiny CLIP, three trials"), ("200 steps", "Methods since")])
def test_a_column_of_readme_has_the_averages_of_a_study_on_the_page_on_results(column, study):
    results = section((ROOT / "docs" / "results.md").read_text(encoding="utf-8"), study)
    readme = (ROOT / "README.md").read_text(encoding="utf-8").replace("&nbsp;", " ")
    averages = column_of(results, " ", "average")
    assert len(averages) >= 4
    assert column_of(readme, " `--algorithm` ", column) == averages


def test_a_method_that_keeps_a_defect_of_domainbeds_says_how_to_repair_it(method, page):
    keeps = getattr(algorithms.get_algorithm_class(method), "mends", False)
    assert ('`"mended": true`' in section(page, "Departures from the paper")) == keeps


def test_torchvisions_weights_are_named_beside_what_they_need():
    """With resnet50_augmix true, its default, they are refused."""
    named = []
    for path in (ROOT / "docs").rglob("*.md"):
        named += re.findall(r"`[^`]*IMAGENET1K_V[^`]*`", path.read_text(encoding="utf-8"))
    for path in (ROOT / "domainbed_kd" / "algorithms").glob("*.py"):
        named += re.findall(r"[^.:]*IMAGENET1K_V[^.]*", path.read_text(encoding="utf-8"))
    assert named
    assert [words for words in named if '"weights"' in words or "`weights`" in words
            if "resnet50_augmix" not in words] == []


def test_the_index_leads_to_every_page():
    index = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs" / "methods").glob("*.md")}
    assert pages == {method_pages.page_of(method).name for method in algorithms.SHIPPED}
    assert set(re.findall(r"\(methods/(\w+\.md)\)", index)) == pages
    assert method_pages.navigation(index) in method_pages.SITE.read_text(encoding="utf-8")


def test_readme_leads_to_every_distillation_method():
    index = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    distillation = index.split("## DomainBed's own")[0]
    pages = set(re.findall(r"\(methods/(\w+\.md)\)", distillation))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(pages) > 15
    assert pages <= set(re.findall(r"\(docs/methods/(\w+\.md)\)", readme))


@pytest.mark.parametrize("source, formula", [
    ("10 ** r.uniform(-1, 0.5)", "10^U(−1, 0.5)"), ("r.choice([1.0, 2.0])", "{1.0, 2.0}"),
    ("int(2 ** r.uniform(3, 9))", "⌊2^U(3, 9)⌋"), ("int(r.choice([1, 3]))", "{1, 3}"),
    ("str(r.choice(['both', 'ce']))", "{both, ce}"), ("r.uniform(low, high)", "U(0.1, 0.3)")])
def test_draws_are_printed_as_formulas(source, formula):
    assert method_pages.formula(source, {"low": 0.1, "high": 0.3}) == formula
