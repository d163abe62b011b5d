import functools
import json
import os
import types

import numpy as np
import pytest
import torch
from clips import Teacher
from PIL import Image

from domainbed_kd import datasets, networks
from domainbed_kd.algorithms.base import Algorithm
from domainbed_kd.run import canonical_view, evaluation, loaders, splits
from domainbed_kd.run.canonical_view import CanonicalViews
from domainbed_kd.scripts import sweep, train

HPARAMS = {"wrn_depth": 10, "wrn_widen": 1, "batch_size": 8}
IN_ORDER = functools.partial(evaluation.Evaluator.in_order, types.SimpleNamespace(
    run=types.SimpleNamespace(to_device=tuple)))


class Student(types.SimpleNamespace):
    part = Algorithm.part


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of ERM, for the methods that learn from one."""
    folder = tmp_path_factory.mktemp("teacher")
    run("ERM", folder)
    return folder


def run(name, folder, *flags, **hparams):
    assert train.main([
        "--dataset", "DigitsDG", "--algorithm", name, "--test_envs", "1", "--steps", "3",
        "--checkpoint_freq", "3", "--hparams", json.dumps(HPARAMS | hparams),
        "--output_dir", str(folder), "--allow_bad_teacher", *flags]) == 0
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def without_times(lines):
    return [{k: v for k, v in line.items() if k not in ("args", "step_time", "mem_gb")}
            for line in lines]


@pytest.mark.parametrize("name", ["KD", "KDDG", "SCMD", "RISE"])
def test_without_augmentation_the_view_is_what_the_student_sees(name, teacher, tmp_path):
    flags = ["--teacher", str(teacher)] if name.startswith("KD") else []
    plain = run(name, tmp_path / "plain", *flags)
    viewed = run(name, tmp_path / "viewed", *flags, canonical_view=True)
    assert viewed[0]["hparams"]["canonical_view"] and "canonical_view" not in plain[0]["hparams"]
    for one, other in zip(plain, viewed, strict=True):
        assert other["distill"] == pytest.approx(one["distill"], rel=1e-3)
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)


def test_kept_views_move_no_bit_and_serve_the_next_run_and_another_student(tmp_path, monkeypatch):
    found, look = [], canonical_view._outputs
    monkeypatch.setattr(canonical_view, "_outputs", lambda *a: found.append(a[1]) or look(*a))
    cache = ["--teacher_cache", str(tmp_path / "cache")]
    first = run("RISE", tmp_path / "1", canonical_view=True)
    again = [run("RISE", tmp_path / str(i), *cache, canonical_view=True) for i in (2, 3)]
    run("SCMD", tmp_path / "4", *cache, "--trial_seed", "1", canonical_view=True)
    assert without_times(first) == without_times(again[0]) == without_times(again[1])
    assert len(found) == 2 * 3  # three training domains, in the first run and in the second
    assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.fixture
def domains(tmp_path):
    """Folders of noise, augmented, whose last domain is held out."""
    random = np.random.RandomState(0)
    for domain in "abc":
        for label in ("cat", "dog"):
            folder = tmp_path / "data" / "noise" / domain / label
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = random.randint(0, 256, (40, 40, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    cls = datasets.get_dataset_class("Folder:noise")
    return lambda: cls(tmp_path / "data", [2], {"data_augmentation": True, "image_size": 32})


def views_of(domains, folder=None, seed=1):
    dataset = domains()
    parts = splits.make_splits(dataset, [2], 0, 0.2).in_[:2]
    student = Student(
        teacher=networks.Frozen(Teacher(n_classes=2, seed=seed).eval()), teacher_logits=None)
    return student.teacher, parts, CanonicalViews(student, parts, IN_ORDER, folder)


def test_each_row_is_the_teachers_for_that_image_without_augmentation(domains):
    teacher, splits, views = views_of(domains)
    endless = [iter(loaders.InfiniteDataLoader(split, None, 4, 8)) for split in splits]
    for _ in range(3):
        x, y = (torch.cat(part) for part in zip(*map(next, endless)))
        naive = []
        for split, loader in zip(splits, endless):
            plain = datasets.plain(split)
            naive += [teacher.module(plain[i][0][None])[0] for i in loader.indices]
            assert [plain[i][1] for i in loader.indices] == y[:4].tolist()
            y = y[4:]
        seen = teacher(x)
        with views.recalled(endless):
            assert torch.allclose(teacher(x), torch.stack(naive), atol=1e-5)
            kept = torch.tensor([5, 0])
            teacher.keep(kept)
            assert torch.allclose(teacher(x[kept]), torch.stack(naive)[kept], atol=1e-5)
        assert torch.equal(teacher(x), seen) and not torch.allclose(seen, torch.stack(naive))


def test_one_of_several_teachers_may_have_it(domains):
    parts = splits.make_splits(domains(), [2], 0, 0.2).in_[:2]
    student = Student(teacher_logits=None, teachers=[
        networks.Frozen(Teacher(n_classes=2, seed=seed).eval()) for seed in (1, 2)])
    views = CanonicalViews(student, parts, IN_ORDER, which=[False, True])
    endless = [iter(loaders.InfiniteDataLoader(split, None, 4, 8)) for split in parts]
    x = torch.cat([next(loader)[0] for loader in endless])
    first, second = (teacher(x) for teacher in student.teachers)
    with views.recalled(endless):
        assert torch.equal(student.teachers[0](x), first)
        assert not torch.allclose(student.teachers[1](x), second)
    with pytest.raises(ValueError, match="list of true and false for 2 teachers"):
        CanonicalViews(student, parts, IN_ORDER, which=[True])


def test_recalled_outputs_and_selected_rows_stay_on_the_students_device(domains):
    parts = splits.make_splits(domains(), [2], 0, 0.2).in_[:2]
    teacher, meta = networks.Frozen(Teacher(n_classes=2).eval()), torch.device("meta")
    views = CanonicalViews(
        Student(teacher=teacher, teacher_logits=None), parts, IN_ORDER, device=meta)
    endless = [iter(loaders.InfiniteDataLoader(split, None, 4, 8)) for split in parts]
    x = torch.cat([next(loader)[0] for loader in endless]).to(meta)
    with views.recalled(endless):
        assert teacher(x).device == meta and teacher(x).shape == (8, 2)
        teacher.keep(torch.tensor([5, 0], device=meta))  # reading these rows would fail
        assert teacher(x).device == meta and teacher(x).shape == (2, 2)


def test_a_changed_image_or_teacher_is_looked_at_again(domains, tmp_path):
    folder = tmp_path / "cache"
    views_of(domains, folder)
    assert len(list(folder.iterdir())) == 2
    os.utime(next(tmp_path.glob("data/noise/a/*/0.png")), (1, 1))
    views_of(domains, folder)
    assert len(list(folder.iterdir())) == 3
    views_of(domains, folder, seed=2)
    assert len(list(folder.iterdir())) == 5


def test_a_damaged_file_is_named(domains, tmp_path):
    views_of(domains, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        os.truncate(path, 150)
    with pytest.raises(ValueError, match=r"cache/.*\.npy is damaged .* Delete it"):
        views_of(domains, tmp_path / "cache")
    for path in (tmp_path / "cache").iterdir():
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(OSError, match="Not a regular file"):
        views_of(domains, tmp_path / "cache")


@pytest.mark.parametrize("name, reason", [("MosaicKD", "generator has just made"),
                                          ("4Ds", "adapters learn")])
def test_methods_that_need_the_students_view_refuse_with_the_reason(name, reason, teacher,
                                                                    tmp_path):
    with pytest.raises(ValueError, match=f"canonical_view must be left out, as .*{reason}"):
        run(name, tmp_path, "--teacher", str(teacher), canonical_view=True)


def test_a_teacher_that_has_yet_to_be_trained_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs a teacher that is trained already"):
        run("KD", tmp_path, canonical_view=True, teacher_steps=2)


@pytest.mark.parametrize("main", [train.main, lambda argv: sweep.main(["launch", *argv])])
def test_a_cache_without_the_view_is_refused(main, tmp_path):
    with pytest.raises(ValueError, match='--hparams .{"canonical_view": true}'):
        main(["--output_dir", str(tmp_path), "--teacher_cache", str(tmp_path)])


def test_a_sweep_hands_the_folder_on_and_its_jobs_keep_their_names(tmp_path, capsys):
    flags = ["launch", "--datasets", "DigitsDG", "--algorithms", "RISE", "--n_trials", "1",
             "--n_hparams", "1", "--single_test_envs", "--output_dir", str(tmp_path),
             "--command_launcher", "dummy", "--skip_confirmation",
             "--hparams", '{"canonical_view": true}']
    sweep.main(flags)
    before = capsys.readouterr().out
    sweep.main([*flags, "--teacher_cache", str(tmp_path / "cache")])
    assert capsys.readouterr().out.replace(f" --teacher_cache {tmp_path / 'cache'}", "") == before
