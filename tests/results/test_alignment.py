"""Shares by alignment with CLIP, and calibration, against loops that count image by image."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from domainbed_kd import datasets, teachers
from domainbed_kd.console import run_main
from domainbed_kd.results import alignment, calibration, logits, records
from domainbed_kd.scripts import collect_results, report, train


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Runs of ERM and RISE on digits, one test domain, with the tiny CLIP."""
    folder = tmp_path_factory.mktemp("sweep")
    hparams = {"wrn_depth": 10, "wrn_widen": 1, "batch_size": 16, "lr": 0.01}
    for name in ("ERM", "RISE"):
        assert train.main(["--dataset", "DigitsDG", "--algorithm", name, "--test_envs", "3",
                           "--steps", "13", "--checkpoint_freq", "6", "--save_logits", "--hparams",
                           json.dumps(hparams), "--output_dir", str(folder / name)]) == 0
    return folder


@pytest.fixture(scope="module")
def counted(sweep):
    """{row: [(cosine, the row is right, CLIP is right) of each test image]}."""
    data = datasets.get_dataset_class("DigitsDG")(None, [3], {"data_augmentation": False})
    clip = teachers.clip({"clip_backbone": "tiny", "normalization": data.NORMALIZATION},
                         data.input_shape)
    sentences = [clip.sentences(["a photo of a {}"], [name])[0, 0].double().numpy()
                 for name in data.class_names]
    found = {}
    for row in ("ERM", "RISE"):
        kept = logits.load_logits(sweep / row)["env3_in"]
        found[row] = []
        for values, label, number in zip(kept.logits, kept.labels, kept.index):
            x, y = datasets.plain(data[3])[int(number)]
            assert y == label
            with torch.no_grad():
                image = clip.look(x[None])[0].double().numpy()
            cosines = [float(image @ s / math.sqrt((image @ image) * (s @ s))) for s in sentences]
            found[row].append((cosines[label], values.argmax() == label,
                               np.argmax(cosines) == label))
    return found


def share(values):
    values = list(values)
    return f"{100 * sum(values) / len(values):.1f}" if values else "-"


def cells(out, title):
    """{row: its cells} of a table in text."""
    lines = out.partition(title)[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("Algorithm"))
    rows = {}
    for line in lines[start + 1:]:
        name, *values = [cell.strip() for cell in line.split("  ") if cell.strip()]
        if not values:
            break
        rows[name] = values
    return rows


def test_shares_are_those_that_one_counts_image_by_image(sweep, counted, capsys):
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(sweep), "--alignment"]) == 0
    out = capsys.readouterr().out
    rows = cells(out, "Alignment with CLIP tiny, DigitsDG")
    assert list(rows) == ["ERM", "RISE"]
    middle = np.median([c for images in counted.values() for c, *_ in images])
    assert f"By the split at median {middle:.2f} its pre-training knows 50." in out
    gains = {}
    for name, images in counted.items():
        n, every, *halves, right, wrong, shared = rows[name]
        assert int(n) == len(images)
        assert every == share(hit for _, hit, _ in images)
        assert right.split()[0] == share(hit for *_, hit, clip in images if clip)
        assert wrong.split()[0] == share(hit for *_, hit, clip in images if not clip)
        assert shared == share(not clip for _, hit, clip in images if not hit)
        hits = [hit for *_, hit, clip in images if not clip]
        gains[name] = sum(hits) / len(hits)
    assert rows["RISE"][5].endswith(f"({100 * (gains['RISE'] - gains['ERM']):+.1f})")
    split = cells(out, "Known / unknown by where they are split, DigitsDG")
    for name, images in counted.items():
        for cell, at in zip(split[name], (0.19, 0.21, 0.23)):
            assert cell == " / ".join((share(hit for c, hit, _ in images if at <= c <= 0.40),
                                       share(hit for c, hit, _ in images if 0.15 <= c < at)))
        assert split[name][3].split(" / ") == rows[name][2:4]
        for cell, is_part in zip(rows[name][2:4], (lambda c: c >= middle, lambda c: c < middle)):
            hits = [hit for c, hit, _ in images if is_part(c)]  # one image may be the median
            assert float(cell) == pytest.approx(100 * sum(hits) / len(hits), abs=0.6)


def test_all_of_a_single_run_is_its_accuracy_in_the_table(sweep, capsys):
    capsys.readouterr()
    collect_results.main(["--input_dir", str(sweep), "--alignment"])
    out = capsys.readouterr().out
    table = cells(out, "Dataset: DigitsDG, model selection method: training-domain validation set")
    rows = cells(out, "Alignment with CLIP tiny, DigitsDG")
    for name in rows:
        in_table = next(cell for cell in table[name] if "+/-" in cell).split()[0]
        assert rows[name][1] == in_table


def test_clips_scores_are_kept_beside_the_runs_and_made_again_if_damaged(
        sweep, tmp_path, monkeypatch):
    where = tmp_path / "alignment"
    first = alignment.kept_scores(where, "DigitsDG", None, 3, "tiny")
    path, = where.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(alignment, "scores", None)
        again = alignment.kept_scores(where, "DigitsDG", None, 3, "tiny")
    for damage in (b"", b"PK", path.read_bytes()[:100]):
        path.write_bytes(damage)
        anew = alignment.kept_scores(where, "DigitsDG", None, 3, "tiny")
        assert all((a == b).all() and (a == c).all() for a, b, c in zip(first, again, anew))


def test_calibration_is_measured_and_scaled_as_scipy_would(sweep, capsys):
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(sweep), "--calibration"]) == 0
    rows = cells(capsys.readouterr().out, "Calibration on domains never seen, DigitsDG")
    for name, (n, before, fitted, after) in rows.items():
        kept = logits.load_logits(sweep / name)
        sources = [kept[f"env{i}_out"] for i in (0, 1, 2)]
        values = np.concatenate([p.logits for p in sources]).astype(float)
        labels = np.concatenate([p.labels for p in sources])

        def cross_entropy(log_t, values=values, labels=labels):
            scaled = values / math.exp(log_t)
            normalizer = np.log(np.exp(scaled).sum(axis=1))
            return (normalizer - scaled[np.arange(len(labels)), labels]).mean()

        bound = math.log(1000)
        best = math.exp(minimize_scalar(cross_entropy, bounds=(-bound, bound), method="bounded",
                                        options={"xatol": 1e-9}).x)
        assert n == "1" and float(fitted) == pytest.approx(best, rel=1e-2)
        assert before == f"{100 * naive_error(kept['env3_in'], 1):.1f}"
        assert after == f"{100 * naive_error(kept['env3_in'], best):.1f}"


def naive_error(kept, temperature):
    bins = [[] for _ in range(15)]
    for values, label in zip(kept.logits.astype(float) / temperature, kept.labels):
        p = np.exp(values - values.max())
        p /= p.sum()
        bins[math.ceil(p.max() * 15) - 1].append((p.max(), values.argmax() == label))
    return sum(abs(sum(p for p, _ in each) - sum(hit for _, hit in each))
               for each in bins) / len(kept.labels)


@pytest.mark.parametrize("t", [0.3, 1.0, 7.0])
def test_a_temperature_undoes_a_scale(t):
    draw = np.random.RandomState(0)
    values = draw.normal(size=(20000, 4))
    p = np.exp(values) / np.exp(values).sum(axis=1, keepdims=True)
    labels = (p.cumsum(axis=1) > draw.uniform(size=(len(p), 1))).argmax(axis=1)
    assert calibration.temperature(values * t, labels) == pytest.approx(t, rel=0.03)


@pytest.mark.parametrize("labels, expected", [([0, 0], 1e-3), ([1, 1], 1e3)])
def test_a_temperature_has_bounds(labels, expected):
    values = np.array([[2.0, 0.0], [1.0, 0.0]])
    assert calibration.temperature(values, np.array(labels)) == pytest.approx(expected)


@pytest.mark.parametrize("style", ["latex", "markdown"])
def test_both_are_written_in_every_format_that_has_more_than_cells(style, sweep, capsys):
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(sweep), "--alignment", "--calibration",
                                 "--format", style]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("Alignment with CLIP", "errors shared", "ECE scaled"))


def test_a_report_has_the_same_tables(sweep, tmp_path):
    page = tmp_path / "page.html"
    assert report.main(["--input_dir", str(sweep), "--alignment", "--calibration", "--output",
                        str(page)]) == 0
    text = page.read_text()
    assert all(f"<h2>{title}</h2>" in text for title in (
        "Alignment with CLIP tiny, DigitsDG", "Calibration on domains never seen, DigitsDG"))


@pytest.mark.parametrize("flags", [["--alignment"], ["--calibration"]])
def test_what_kept_no_logits_is_said(flags, sweep, tmp_path, capsys):
    shutil.copytree(sweep, tmp_path / "sweep")
    for run, expected in (("RISE", "1 selected runs kept no logits"), ("ERM", None)):
        shutil.rmtree(tmp_path / "sweep" / run / "logits")
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: collect_results.main(
                ["--input_dir", str(tmp_path / "sweep"), *flags]))
        out, err = capsys.readouterr()
        if expected:
            assert ended.value.code == 0 and expected in out
        else:
            assert ended.value.code == 2 and "Train with --save_logits." in err
            assert err.count("error: ") == 1


def test_a_damaged_file_of_logits_counts_as_none(sweep, tmp_path):
    shutil.copytree(sweep, tmp_path / "sweep")
    for path in Path(tmp_path, "sweep", "RISE", "logits").iterdir():
        path.write_bytes(path.read_bytes()[:200])
    found = records.Folder(tmp_path / "sweep").curves()
    chosen, left_out = logits.chosen(tmp_path / "sweep", found)
    assert [list(rows) for rows in chosen.values()] == [["ERM"]]
    assert left_out.startswith(" 1 selected runs kept no logits")


def test_the_published_split_counts_where_cosines_are_as_published():
    cosine = np.array([0.10, 0.15, 0.20, 0.21, 0.25, 0.40, 0.41], dtype=np.float32)
    right = np.array([0, 0, 1, 1, 1, 0, 0], dtype=bool)
    row = alignment.Images(cosine, right, np.ones(7, dtype=bool))
    first, second = alignment._tables("PACS", "ViT-B-16", "", {"ERM": row})
    assert "split at 0.21 its pre-training knows 42.9 % of the images, and not 28.6 %" in first.lead
    assert first.rows[1] == ["ERM", "7", "42.9", "66.7", "50.0", "42.9", "-", "0.0"]
    assert second.rows[1] == [
        "ERM", "75.0 / 0.0", "66.7 / 50.0", "50.0 / 66.7", "50.0 / 33.3"]
