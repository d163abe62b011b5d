import html.parser
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import GOLDENS

from domainbed_kd.results import pages, plots, tables
from domainbed_kd.scripts import collect_results, report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def made_up(folder, algorithms=("ERM", "KDDG", "MosaicKD"), dataset="PACS"):
    """A sweep with everything that a report can show, in numbers that follow from its seeds."""
    for name in algorithms:
        for env, trial, draw in ((e, t, d) for e in range(4) for t in range(2) for d in range(3)):
            run = folder / f"{name}{env}{trial}{draw}"
            run.mkdir(parents=True)
            args = {"dataset": dataset, "algorithm": name, "test_envs": [env], "steps": 11,
                    "trial_seed": trial, "hparams_seed": draw, "hparams": None,
                    "task": "domain_generalization"}
            if name != "ERM":
                args["teacher"] = str(folder / f"ERM{env}{trial}0")
            lines = []
            for step in (0, 5, 10):
                acc = .3 + .04 * step + .03 * draw + .02 * env + .01 * trial + .01 * len(name)
                lines.append({
                    "args": args, "step": step, "step_time": .1 * len(name), "loss": 1 - acc,
                    "hparams": {"lr": .1 * draw + .01 * trial, "weight": 1 / (draw + trial + 1)},
                    **{f"env{i}_{split}_acc": acc for i in range(4) for split in ("in", "out")},
                    "diagnostics": {"weight_distance": .1 * step, "env0_ece": .1,
                                    "env1_ece": .1, "env2_ece": .1, "env3_ece": .2}})
            (run / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    made_up(folder / "sweep")
    assert report.main(["--input_dir", str(folder / "sweep"), "--output",
                        str(folder / "page.html")]) == 0
    return folder / "page.html"


def test_a_dataset_whose_runs_measured_nothing_has_no_plot_of_it(tmp_path):
    made_up(tmp_path / "sweep", ["ERM"])
    for run in made_up(tmp_path / "more", ["KDDG"], "VLCS").iterdir():
        plain = run.rename(tmp_path / "sweep" / run.name) / "results.jsonl"
        plain.write_text(re.sub(r', "diagnostics": {[^}]*}', "", plain.read_text()))
    assert report.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    drawn = {path.stem for path in (tmp_path / "sweep" / "report").iterdir()}
    assert "PACS_diagnostics" in drawn and "VLCS_curves" in drawn
    assert "VLCS_diagnostics" not in drawn


class Reader(html.parser.HTMLParser):
    """Tags with their attributes, and the rows of all tables."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.rows, self.in_cell = [], [], False
        self.feed(text)

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.in_cell = False

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


def test_the_page_is_one_file_that_refers_to_nothing_outside(page):
    text = page.read_text()
    assert not re.search(r"https?://|<script|@import|url\(", text)
    for tag, attrs in Reader(text).tags:
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith(("data:", "#")), (tag, attrs)


def test_each_picture_says_in_words_what_it_shows_and_lies_beside_as_png_and_pdf(page):
    images = [attrs for tag, attrs in Reader(page.read_text()).tags if tag == "img"]
    names = ("ranks", "PACS_domains", "PACS_curves", "PACS_cost", "PACS_hparams", "PACS_teachers",
             "PACS_diagnostics")
    assert len(images) == len(names)
    for image, name in zip(images, names):
        assert len(image["alt"]) > 40 and (name == "ranks" or "PACS" in image["alt"])
        assert (page.with_suffix("") / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (page.with_suffix("") / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_the_same_sweep_gives_the_same_bytes(page, tmp_path):
    again = tmp_path / "page.html"
    report.main(["--input_dir", str(page.parent / "sweep"), "--output", str(again)])
    for path in page.with_suffix("").iterdir():
        assert path.read_bytes() == (tmp_path / "page" / path.name).read_bytes(), path.name
    assert page.read_text().replace(str(page.parent), "") == again.read_text().replace(
        str(page.parent), "").replace(str(tmp_path), "")


def test_the_tables_are_those_of_collect_results(tmp_path, capsys):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    sweep = str(tmp_path / "sweep")
    collect_results.main(["--input_dir", sweep])
    printed = [line.replace("+/-", "±").split() for line in capsys.readouterr().out.splitlines()
               if line.startswith("ERM")]
    report.main(["--input_dir", sweep])
    rows = Reader((tmp_path / "sweep" / "report.html").read_text()).rows
    # Of one dataset the averages say nothing new, and are left out of the page.
    assert [" ".join(row).split() for row in rows if row[0] == "ERM" and len(row) == 6
            ] == printed[::2]
    assert (tmp_path / "sweep" / "report" / "VLCS_domains.png").exists()


def test_the_page_compares_with_erm_or_with_what_is_asked_for(page, tmp_path):
    def compared(path):
        rows = Reader(path.read_text()).rows
        start = next(i for i, row in enumerate(rows) if "p (Holm)" in row)
        return [row[:3] for row in rows[start + 1:start + 3]]

    # `made_up` adds 0.01 for each letter of the name; 4 domains of 2 trials.
    assert compared(page) == [["KDDG", "8", "+1.0"], ["MosaicKD", "8", "+5.0"]]
    report.main(["--input_dir", str(page.parent / "sweep"), "--output", str(tmp_path / "a.html"),
                 "--compare", "MosaicKD"])
    assert compared(tmp_path / "a.html") == [["ERM", "8", "-5.0"], ["KDDG", "8", "-4.0"]]


def test_flags_stay_whole_at_the_ends_of_lines_and_text_is_escaped(page):
    assert pages._whole_flags("<b> without --single_test_envs & so on") == (
        "&lt;b&gt; without <span class=flag>--single_test_envs</span> &amp; so on")
    assert "domainbed-kd report <span class=flag>--input_dir</span>" in page.read_text()


def test_a_single_trial_has_no_standard_error(tmp_path):
    for run in made_up(tmp_path / "sweep").iterdir():
        if run.name[-2] == "1":
            shutil.rmtree(run)
    report.main(["--input_dir", str(tmp_path / "sweep")])
    page = (tmp_path / "sweep" / "report.html").read_text()
    assert 'class="best" aria-label=' in page and "±" not in page


def answer_of(folder, *flags):
    report.main(["--input_dir", str(folder), *flags])
    text = (folder / "report.html").read_text()
    start = text.index('<section id="answer"')
    assert start < text.index('<nav')  # before everything else
    return text[start:text.index("</section>", start)]


def test_the_page_first_says_which_method_is_best_by_how_much_and_how_sure(page):
    text = page.read_text()
    said = text[text.index('<section id="answer"'):text.index("<nav")]
    # `made_up` adds 0.01 for each letter of the name, so MosaicKD is 5 points above ERM in each of
    # 8 pairs: p = 2 / 2^8 = 0.0078, times 2 comparisons.
    best = "MosaicKD has the best average accuracy on held-out domains of PACS: 87.5 %, +5.0 points"
    assert best in said
    assert "Sure, at the 5 % level: p = 0.016 after Holm&#39;s correction for 2 comparisons" in said
    assert [row[:3] + row[4:] for row in Reader(said).rows] == [
        ["Method", "average, %", "points", "sure?"], ["MosaicKD", "87.5 ± 0.4", "+5.0", "better"],
        ["KDDG", "83.5 ± 0.4", "+1.0", "better"], ["ERM", "82.5 ± 0.4", "", "the reference"]]


def test_few_pairs_are_said_to_show_nothing_before_the_test_that_they_are_in(tmp_path):
    for run in made_up(tmp_path / "sweep").iterdir():
        if run.name[-2] == "1":
            shutil.rmtree(run)
    said = answer_of(tmp_path / "sweep")
    limit = ("With 4 pairs and 2 comparisons no difference can be significant: p (Holm) cannot be "
             "below 0.250.")
    assert f"Not sure. {limit}" in said and said.count("too few pairs") == 2
    text = (tmp_path / "sweep" / "report.html").read_text()
    section = text[text.index('id="significance"'):]
    assert section.index(limit) < section.index("<table")


def test_a_best_method_without_all_its_runs_is_preliminary(tmp_path):
    made_up(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "MosaicKD110")
    said = answer_of(tmp_path / "sweep")
    assert "KDDG has the best average accuracy" in said and "Preliminary" in said


def test_of_one_dataset_each_table_stands_once(page, tmp_path):
    assert page.read_text().count("<caption>") == 2  # two selection methods
    for name in ("PACS", "VLCS"):
        made_up(tmp_path / "sweep", ["ERM"], name) if name == "PACS" else [
            shutil.move(run, tmp_path / "sweep" / f"{run.name}v")
            for run in made_up(tmp_path / "other", ["ERM"], name).iterdir()]
    report.main(["--input_dir", str(tmp_path / "sweep")])
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert text.count("<caption>") == 6 and text.count("Averages over datasets") == 2


@pytest.mark.parametrize("hparam", [
    {"stages": [[1, 2], [3, 4]]}, {"stages": [{"depth": 2}, {"depth": [3]}]}, {"a.b": [None]},
    {"image_size": "big", "backbone": ["x"], "weights": {"x": [1]}, "rise_teachers": 3}])
def test_nested_hparams_are_no_reason_to_lose_the_report(tmp_path, hparam):
    made_up(tmp_path / "sweep", algorithms=["ERM", "KDDG"])
    for path in (tmp_path / "sweep").glob("*/results.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(
            json.dumps(r | {"hparams": r["hparams"] | hparam}) + "\n" for r in lines))
    report.main(["--input_dir", str(tmp_path / "sweep")])
    assert (tmp_path / "sweep" / "report" / "PACS_hparams.png").exists()


def test_names_with_dollars_and_line_breaks_are_drawn_as_they_are(tmp_path):
    made_up(tmp_path / "sweep", algorithms=["ERM", "$\\frac{$", "b\n$x", "$a$"], dataset="$\\bad{")
    report.main(["--input_dir", str(tmp_path / "sweep")])
    plots = {path.suffix for path in (tmp_path / "sweep" / "report").iterdir()}
    assert plots == {".png", ".pdf"}


@pytest.mark.parametrize("low, high", [
    (1, 11), (3, 45), (.2, 90), (.011, 12), (1e-3, 1e6), (5, 5e12)])
def test_labels_of_the_cost_plot_do_not_touch(low, high):
    cells = {name: [tables.Cell(mean=50.0)] for name in ("A", "B", "C")}
    table = tables.Table("m", "D", ["Avg"], cells)
    plot = plots.costs("D", {"A": low, "B": (low * high) ** .5, "C": high}, table,
                       plots.Looks(cells))
    axis = plot.figure.axes[0]
    plot.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axis.xaxis.get_ticklabels(which="both")
             if label.get_text()]
    assert len(boxes) >= 2
    assert all(left.x1 + 2 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_an_unknown_reference_is_refused_even_where_there_is_nothing_to_compare(tmp_path):
    sweep = made_up(tmp_path / "sweep", algorithms=["ERM"])
    with pytest.raises(ValueError, match="--compare EMR: there are no results of it, but of ERM"):
        report.main(["--input_dir", str(sweep), "--compare", "EMR"])


def test_a_report_among_the_runs_is_taken_for_none(tmp_path, capsys):
    shutil.copytree(GOLDENS / "sweep_data", tmp_path / "sweep")
    for _ in range(2):
        report.main(["--input_dir", str(tmp_path / "sweep")])
        assert "skipped" not in capsys.readouterr().err


def test_what_a_sweep_lacks_is_on_the_page(tmp_path):
    made_up(tmp_path / "sweep")
    shutil.rmtree(tmp_path / "sweep" / "KDDG110")
    report.main(["--input_dir", str(tmp_path / "sweep")])
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert "5/6</sup>" in text and "PACS, KDDG, test envs 1: trial 1, hparams 0" in text
    assert "71 of 72 runs finished" in text


def test_a_method_that_failed_throughout_has_its_row_and_is_counted(tmp_path):
    made_up(tmp_path / "sweep", algorithms=["ERM", "KDDG"])
    for run in (tmp_path / "sweep").glob("KDDG*"):
        record = json.loads((run / "results.jsonl").read_text().splitlines()[0])
        (run / "results.jsonl").unlink()
        (run / "args.json").write_text(json.dumps(record["args"]))
        (run / "failed").write_text("error: The teacher is <b>near</b> chance.\n")
    report.main(["--input_dir", str(tmp_path / "sweep")])
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert "2 algorithms (ERM, KDDG)" in text
    assert "24 of 48 runs finished, 24 failed, with 72 records." in text
    assert ["KDDG", *"XXXXX"] in Reader(text).rows and "X: no result" in text
    assert "hparams 0-2: failed: The teacher is &lt;b&gt;near&lt;/b&gt; chance." in text


def test_a_sweep_without_any_result_yet_is_told_from_a_folder_without_runs(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out.txt").touch()
    with pytest.raises(ValueError, match="it holds no results yet; collect_results says"):
        report.main(["--input_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_teacher_that_failed_its_audit_is_marked_on_the_page(tmp_path):
    made_up(tmp_path / "sweep", algorithms=["ERM", "KDDG"])
    for path in (tmp_path / "sweep").glob("KDDG*/results.jsonl"):
        path.write_text(path.read_text().replace(
            '{"args"', '{"teacher": {"problem": "is near chance: 9%."}, "args"', 1))
    report.main(["--input_dir", str(tmp_path / "sweep")])
    text = (tmp_path / "sweep" / "report.html").read_text()
    rows = [row for row in Reader(text).rows
            if row[0] == "KDDG" and len(row) == 6 and "±" in row[1]]
    assert rows and all(cell.endswith("?") for row in rows for cell in row[1:])
    assert not any("?" in cell for row in Reader(text).rows if row[0] == "ERM" for cell in row)
    assert "(--allow_bad_teacher): near chance." in text
    assert "teacher another run, near chance (KDDG)" in text


@pytest.mark.skipif(not shutil.which("setpriv") and os.geteuid() == 0,
                    reason="root reads everything, and there is no setpriv")
def test_what_cannot_be_read_is_named_once_and_the_page_made_of_the_rest(tmp_path):
    sweep = made_up(tmp_path / "sweep", algorithms=["ERM", "KDDG"])
    broken, refused, closed = (sweep / name for name in ("ERM000", "ERM001", "KDDG002"))
    text = (broken / "results.jsonl").read_text()
    text = re.sub('"step_time": [^,]*', '"step_time": "slow"', text)
    (broken / "results.jsonl").write_text(text.replace('"step": 5,', '"step": "x",'))
    (refused / "results.jsonl").chmod(0)
    closed.chmod(0)
    rights = "-dac_override,-dac_read_search"
    drop = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] * (os.geteuid() == 0)
    ran = subprocess.run([*drop, sys.executable, "-m", "domainbed_kd.scripts.report",
                          "--input_dir", str(sweep)], capture_output=True, text=True)
    closed.chmod(0o700)
    assert ran.returncode == 0, ran.stderr
    said = [line for line in ran.stderr.splitlines() if line.startswith("skipped")]
    assert said == [f"skipped {broken}/results.jsonl: line 2: not a record like DomainBed's",
                    f"skipped {refused}/results.jsonl: Permission denied",
                    f"skipped {closed}/results.jsonl: Permission denied"]
    assert "46 of 48 runs finished" in (sweep / "report.html").read_text()


def test_runs_with_nothing_to_draw_still_give_tables(tmp_path):
    """Records with no more than model selection needs."""
    sweep = made_up(tmp_path / "sweep", algorithms=["ERM"])
    for path in sweep.glob("*/results.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        kept = [{k: v for k, v in r.items() if k in ("args", "step") or k.endswith("_acc")}
                | {"hparams": {}} for r in lines]
        path.write_text("".join(json.dumps(r) + "\n" for r in kept))
    report.main(["--input_dir", str(sweep)])
    names = {path.stem for path in (sweep / "report").iterdir()}
    assert names == {"PACS_domains", "PACS_curves"}


def test_names_are_shown_as_they_are_not_read_as_html(tmp_path):
    made_up(tmp_path / "sweep", algorithms=["<b>&amp;"], dataset="Folder:<i>x")
    report.main(["--input_dir", str(tmp_path / "sweep")])
    reader = Reader((tmp_path / "sweep" / "report.html").read_text())
    assert any(row[0] == "<b>&amp;" for row in reader.rows)
    assert not any(tag == "i" for tag, _ in reader.tags)


@pytest.mark.parametrize("flags, words", [
    (["--input_dir", "no/such/folder"], "no such folder"),
    (["--input_dir", "EMPTY"], "it holds no runs"),
    (["--input_dir", "EMPTY", "--output", "page.pdf"], "ends in .html"),
    (["--input_dir", "EMPTY", "--output", "EMPTY.html"], "plots would lie among the runs"),
    (["--input_dir", "SWEEP", "--compare", "CORAL"], "no results of it, but of ERM, KDDG")])
def test_misuse_is_an_error_of_one_line(flags, words, page, tmp_path):
    places = {"EMPTY": str(tmp_path), "EMPTY.html": f"{tmp_path}.html",
              "SWEEP": str(page.parent / "sweep")}
    flags = [places.get(flag, flag) for flag in flags]
    with pytest.raises((ValueError, OSError), match=words) as error:
        report.main(flags)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_named_with_what_to_install(tmp_path):
    code = ("import sys; sys.modules['matplotlib'] = None\n"
            "from domainbed_kd.console import run_main\n"
            "from domainbed_kd.scripts import report\n"
            f"run_main(lambda: report.main(['--input_dir', {str(tmp_path)!r}]))")
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 2 and ran.stderr == (
        "error: The report needs matplotlib: pip install 'domainbed_kd[report]'\n")


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is here")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_opens_in_a_browser_without_an_error_a_request_or_sideways_scrolling(
        width, page, browser):
    tab = browser.new_page(viewport={"width": width, "height": 900})
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(page.as_uri())
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # Neither do tables have to be scrolled, and every picture is drawn within the page.
    assert tab.evaluate("[...document.querySelectorAll('.wide')]"
                        ".every(e => e.scrollWidth <= e.clientWidth)")
    sizes = tab.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
    assert sizes and all(natural > 0 and 0 < shown <= width for natural, shown in sizes)
    tab.close()
