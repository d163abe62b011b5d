"""Runs on labels that are one per pixel: DigitsSeg, from `train` to the table."""

import hashlib
import json

import numpy as np
import pytest
import torch

from domainbed_kd.datasets import looks
from domainbed_kd.folder import curves
from domainbed_kd.run import training
from domainbed_kd.scripts import collect_results, report, sweep, train
from domainbed_kd.tasks import IGNORED

SHORT = ["--dataset", "DigitsSeg", "--steps", "4", "--checkpoint_freq", "2", "--hparams",
         '{"batch_size": 2, "mosaic_kd_steps": 1, "mosaic_width": 8}', "--allow_bad_teacher"]


CANVASES = looks.canvases()


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Ten canvases a domain, so that evaluations take no time."""
    monkeypatch.setattr(looks, "canvases", lambda: [(x[:10], y[:10]) for x, y in CANVASES])


def run(folder, *flags):
    assert train.main([*SHORT, *flags, "--output_dir", str(folder)]) == 0
    return records_in(folder)


def records_in(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_the_canvases_are_the_same_on_every_machine():
    digest = hashlib.sha256()
    for images, masks in CANVASES:
        digest.update(images.tobytes() + masks.astype(np.uint8).tobytes())
    assert digest.hexdigest()[:16] == "5eeda980bbdf2921"


def test_a_canvas_shows_four_digits_and_each_digit_is_used_once():
    (_, masks), (_, labels) = CANVASES[0], looks.domains()[0]  # later ones are shuffled otherwise
    for mask, digits in zip(masks, labels[:448].reshape(112, 4), strict=True):
        assert set(np.unique(mask)) == {0, *(digits + 1)}
    for _, masks in CANVASES:
        assert all(2 <= len(np.unique(mask)) <= 5 for mask in masks)
        assert 0.41 < (masks == 0).mean() < 0.43


def test_a_record_says_that_its_accuracies_are_miou(tmp_path):
    records = run(tmp_path)
    assert [record["metric"] for record in records] == ["miou"] * 3
    assert "env0_in_iou" not in records[0]
    last = records[-1]
    ious = [iou for iou in last["env0_in_iou"] if iou is not None]
    assert last["env0_in_acc"] == pytest.approx(np.mean(ious)) and len(last["env1_out_iou"]) == 11


TWO_TEACHERS = {"batch_size": 2, "teachers": ["run:ERM", "run:ERM"], "teacher_mix": "accuracy",
                "averaging": "sma", "sma_start": 1}


@pytest.mark.parametrize("name, n_teachers", [
    ("ERM", 0), ("KDDG", 1), ("MosaicKD", 1), ("SWAD", 0), ("VREx", 2)])
def test_a_run_resumed_at_any_record_ends_in_the_same_bits(name, n_teachers, tmp_path, monkeypatch):
    flags = ["--algorithm", name]
    if n_teachers:
        run(tmp_path / "teacher")
        flags += ["--teacher", *n_teachers * [str(tmp_path / "teacher")]]
    if n_teachers == 2:
        flags += ["--hparams", json.dumps(TWO_TEACHERS)]
    run(tmp_path / "whole", *flags)
    update, n_updates = training.update, []

    def stop_after_three(*args):
        n_updates.append(1)
        if len(n_updates) == 4:
            raise KeyboardInterrupt
        return update(*args)

    monkeypatch.setattr(training, "update", stop_after_three)
    with pytest.raises(KeyboardInterrupt):
        train.main([*SHORT, *flags, "--output_dir", str(tmp_path / "cut")])
    monkeypatch.setattr(training, "update", update)
    run(tmp_path / "cut", *flags)
    whole, cut = (torch.load(tmp_path / name / "model.pkl", weights_only=True)["model_dict"]
                  for name in ("whole", "cut"))
    assert all(tensor.equal(cut[name]) for name, tensor in whole.items() if torch.is_tensor(tensor))
    for one, other in zip(records_in(tmp_path / "whole"), records_in(tmp_path / "cut")):
        assert {k: v for k, v in one.items() if k not in ("args", "step_time", "mem_gb")} == {
            k: v for k, v in other.items() if k not in ("args", "step_time", "mem_gb")}


def test_the_loss_that_swad_compares_is_the_mean_over_labelled_pixels(tmp_path):
    args = vars(train.build_parser().parse_args([*SHORT, "--output_dir", str(tmp_path)]))
    made = training.build(args)
    for domain in made.dataset:
        domain.tensors[1][:, :20] = IGNORED
    evaluator = training.Evaluator(made)
    wanted = []
    for i in made.training:
        terms = []
        for x, y in (made.splits.out[i][k] for k in range(len(made.splits.out[i]))):
            log_p = made.algorithm.eval().predict(x[None])[0].log_softmax(0)
            terms.append(-log_p.gather(0, y.clamp(min=0)[None])[0][y != IGNORED])
        wanted.append(torch.cat(terms).mean().item())
    found = evaluator.validation_loss(made.algorithm.predict)
    assert found == pytest.approx(np.mean(wanted), rel=1e-4)


@pytest.mark.parametrize("flags, says", [
    (["--algorithm", "DANN"], "DANN: needs one label per image, and DigitsSeg has one per pixel: "),
    (["--algorithm", "4Ds"], "4Ds: needs one label per image"),
    (["--save_logits"], "--save_logits: needs one label per image"),
    (["--diagnostics"], "--diagnostics: needs one label per image"),
    (["--hparams", '{"class_balanced": true}'], "class_balanced: needs one label per image"),
    (["--hparams", '{"teachers": ["clip"]}'], "CLIP cannot teach where each pixel has a label"),
    (["--hparams", '{"teachers": ["folder:x"], "distill": "feature"}'], 'takes "logit" alone')])
def test_what_has_no_meaning_on_pixels_is_refused_in_one_line(flags, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        train.main([*SHORT, *flags, "--output_dir", str(tmp_path)])
    assert "\n" not in str(error.value)


def test_a_sweep_trains_teachers_of_pixels_first_and_names_the_row(tmp_path, capsys):
    flags = ["launch", *SHORT, "--algorithms", "SD", "--n_hparams", "1", "--n_trials", "1",
             "--test_envs", "0", "--command_launcher", "dummy", "--output_dir", str(tmp_path)]
    flags[flags.index("--dataset")] = "--datasets"
    assert sweep.main([*flags, "--hparams", '{"teachers": ["run:ERM"]}']) == 0
    commands = [line.split() for line in capsys.readouterr().out.splitlines()
                if "scripts.train" in line]
    names = [words[words.index("--algorithm") + 1] for words in commands]
    assert names == ["ERM", "SD"]
    assert curves.row({"algorithm": "SD", "hparams": '{"teachers": ["run:ERM"]}'}) == (
        "SD + KD(ERM)")
    with pytest.raises(ValueError, match="takes \"logit\" alone"):
        sweep.main([*flags, "--hparams", '{"teachers": ["run:ERM"], "distill": "relation"}'])


def test_a_teacher_of_pixels_that_guesses_is_refused(tmp_path):
    run(tmp_path / "teacher")
    with pytest.raises(ValueError, match="The teacher is near chance"):
        train.main([*SHORT[:-1], "--algorithm", "KD", "--teacher", str(tmp_path / "teacher"),
                    "--output_dir", str(tmp_path / "student")])


def test_tables_name_the_metric_and_refuse_two_in_one_folder(tmp_path, capsys):
    run(tmp_path / "sweep" / "one")
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    assert "Dataset: DigitsSeg, model selection method: training-domain validation set, mIoU in %" \
        in capsys.readouterr().out
    train.main(["--dataset", "Debug28", "--steps", "1", "--hparams", '{"batch_size": 2}',
                "--output_dir", str(tmp_path / "sweep" / "two")])
    with pytest.raises(ValueError, match="on Debug28 were measured by accuracy, some on DigitsSeg "
                                         "by mIoU|on DigitsSeg were measured by mIoU, some on "):
        collect_results.main(["--input_dir", str(tmp_path / "sweep")])


def test_the_report_shows_images_labels_and_predictions(tmp_path):
    run(tmp_path / "sweep" / "one")
    with np.load(tmp_path / "sweep" / "one" / "pictures.npz") as arrays:
        assert arrays["env0_image"].shape == (3, 64, 64, 3)
        assert arrays["env0_label"].shape == arrays["env0_guess"].shape == (3, 64, 64)
    assert report.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    text = (tmp_path / "sweep" / "report.html").read_text()
    assert "What the predictions look like" in text and "mIoU in percent on" in text
    assert "3 images of plain with their labels and the predictions of ERM." in text
    assert (tmp_path / "sweep" / "report" / "DigitsSeg_plain_pictures.png").exists()


def test_runs_that_hold_out_several_domains_are_validated_on_those_they_train_on(tmp_path, capsys):
    records = run(tmp_path / "sweep" / "one", "--test_envs", "0", "1", "3")
    best = max(records, key=lambda record: record["env2_out_acc"])
    capsys.readouterr()
    assert collect_results.main(["--input_dir", str(tmp_path / "sweep")]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if line.startswith("ERM"))
    wanted = [100 * best[f"env{i}_in_acc"] for i in (0, 1, 3)]
    assert [row[i] for i in (1, 4, 7)] == [f"{value:.1f}" for value in wanted]
    assert row[10] == f"{np.mean(wanted):.1f}" and "texture" not in out
