import contextlib
import json
import multiprocessing
import os
import pickle
from collections import Counter

import numpy as np
import PIL
import pytest
from PIL import Image

from domainbed_kd import datasets, machine
from domainbed_kd.folder import files
from domainbed_kd.run import evaluation, image_cache
from domainbed_kd.scripts import sweep, train

FLAGS = ["--dataset", "Folder:shapes", "--test_envs", "1", "--steps", "3", "--checkpoint_freq", "2",
         "--hparams", '{"batch_size": 4, "image_size": 32, "class_balanced": true}',
         "--skip_model_save"]


def save(path, seed, mode="RGB"):
    """A small image of noise, of a size that depends on the seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (34 + seed % 5, 40, 3)).astype(np.uint8)
    Image.fromarray(noise).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """A data directory: two domains of two classes of JPEG, gray, palette and torn images."""
    for d, domain in enumerate("ab"):
        for c, cls in enumerate(("disc", "ring")):
            folder = tmp_path / "data" / "shapes" / domain / cls
            for k in range(5):
                save(folder / f"{k}.jpg", 100 * d + 10 * c + k)
            save(folder / "gray.png", d, "L")
            save(folder / "palette.png", d, "P")
            whole = (folder / "0.jpg").read_bytes()
            (folder / "torn.jpg").write_bytes(whole[:len(whole) // 2])
    return tmp_path / "data"


def read(root, folder=None, test_envs=(), augment=False):
    """The dataset, through a cache if its folder is given."""
    dataset = datasets.get_dataset_class("Folder:shapes")(
        root, test_envs, {"data_augmentation": augment, "image_size": 32})
    if folder:
        image_cache.attach(dataset, folder)
    return dataset


def pictures(dataset):
    """{path: pixels} as the dataset's loaders give them."""
    return {path: np.asarray(domain.loader(path)) for domain in dataset
            for path, _ in domain.samples}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for path, pixels in one.items():
        assert np.array_equal(pixels, other[path]), path


def test_cached_images_are_those_of_the_files(root, tmp_path):
    plain, cold, warm = read(root), read(root, tmp_path / "cache"), read(root, tmp_path / "cache")
    assert len({pixels.shape for pixels in pictures(plain).values()}) > 2
    assert_same(pictures(cold), pictures(plain))
    assert_same(pictures(warm), pictures(plain))
    path, _ = warm[0].samples[0]
    image = warm[0].loader(path)
    assert (image.mode, image.size) == ("RGB", datasets.load_image(path).size)
    assert_same(pictures(pickle.loads(pickle.dumps(list(warm)))), pictures(plain))


def test_a_second_look_decodes_only_what_has_changed(root, tmp_path):
    before = pictures(read(root, tmp_path / "cache"))
    a, b = list(before)[:2]
    stat = os.stat(a)
    with open(a, "r+b") as file:  # not an image, but nothing tells that it changed
        file.write(b"x" * 100)
    os.utime(a, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    Image.fromarray(np.zeros((5, 6, 3), np.uint8)).save(b)
    after = pictures(read(root, tmp_path / "cache"))
    assert after[b].shape == (5, 6, 3) and not after[b].any()
    assert_same({k: v for k, v in after.items() if k != b},
                {k: v for k, v in before.items() if k != b})


def test_an_image_that_was_added_is_found(root, tmp_path):
    read(root, tmp_path / "cache")
    save(root / "shapes" / "a" / "disc" / "new.png", 7)
    assert_same(pictures(read(root, tmp_path / "cache")), pictures(read(root)))


def test_images_decoded_by_another_pillow_are_decoded_again(root, tmp_path, monkeypatch, capsys):
    for version, builds in (("1", 1), ("1", 0), ("2", 1)):
        monkeypatch.setattr(PIL, "__version__", version)
        read(root, tmp_path / "cache")
        assert capsys.readouterr().err.count("Decoding") == builds


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 1000, b'[]' + (2).to_bytes(8, "little"),
                                     b'{"images": 0}' + (13).to_bytes(8, "little")])
def test_a_damaged_cache_is_made_again(root, tmp_path, content):
    read(root, tmp_path / "cache")
    file, = (tmp_path / "cache").glob("*.images")
    file.write_bytes(content)
    assert_same(pictures(read(root, tmp_path / "cache")), pictures(read(root)))


def test_builders_at_the_same_time_decode_once(root, tmp_path):
    def build(start, sent):
        start.wait()
        with (tmp_path / "said").open("a") as said, contextlib.redirect_stderr(said):
            sent.send(pictures(read(root, tmp_path / "cache")))

    context = multiprocessing.get_context("fork")
    start, pipes = context.Barrier(4), [context.Pipe(duplex=False) for _ in range(4)]
    builders = [context.Process(target=build, args=(start, sent)) for _, sent in pipes]
    for builder in builders:
        builder.start()
    for received, _ in pipes:
        assert_same(received.recv(), pictures(read(root)))
    for builder in builders:
        builder.join()
    assert (tmp_path / "said").read_text().count("Decoding the images") == 1
    assert sorted(p.suffix for p in (tmp_path / "cache").iterdir()) == [".images", ".lock"]


def test_a_file_that_is_no_image_is_named_and_nothing_is_left_half_built(root, tmp_path):
    bad = root / "shapes" / "b" / "ring" / "bad.png"
    bad.write_text("not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image\. Replace it\."):
        read(root, tmp_path / "cache")
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] == [".lock"]


def test_images_that_are_cut_short_are_counted_once_and_read_as_without_a_cache(
        root, tmp_path, capsys):
    noise = Image.effect_noise((120, 90), 80).convert("RGB")
    cut = root / "shapes" / "b" / "ring"
    for torn in root.rglob("torn.jpg"):
        torn.unlink()
    for name in ("cut.jpg", "cut.png"):
        noise.save(cut / name)
        content = (cut / name).read_bytes()
        (cut / name).write_bytes(content[:len(content) // 3])
    n_images = sum(1 for path in (root / "shapes").rglob("*.*") if path.is_file())
    plain = pictures(read(root))
    for _ in range(2):
        assert_same(pictures(read(root, tmp_path / "cache")), plain)
    _, line = capsys.readouterr().err.splitlines()
    assert line == (
        f"2 of its {n_images} image files are truncated or damaged. The part that can be read is "
        f"used, as in DomainBed: {cut / 'cut.jpg'}, {cut / 'cut.png'}.")


def test_a_file_in_place_of_the_folder_is_refused(root, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file; it takes a folder"):
        read(root, tmp_path / "cache")


def test_data_sets_without_files_need_no_cache(tmp_path):
    dataset = datasets.get_dataset_class("DigitsDG")(None, [], {})
    image_cache.attach(dataset, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def records_in(folder):
    """What a run recorded, without times and places."""
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    for record in records:
        del record["step_time"], record["args"]["output_dir"]
    return records


def run(folder, root, *more):
    assert train.main([*FLAGS, "--data_dir", str(root), "--output_dir", str(folder), *more]) == 0
    return records_in(folder)


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 8)


def test_a_run_is_the_same_to_the_bit_with_1_2_or_8_workers_and_with_a_cache(
        root, tmp_path, eight_cores):
    cache = ["--image_cache", str(tmp_path / "cache")]
    without = run(tmp_path / "without", root)
    assert len(without) == 2
    assert run(tmp_path / "one", root, "--loader_processes", "1") == without
    assert run(tmp_path / "cold", root, *cache, "--loader_processes", "8") == without
    assert run(tmp_path / "warm", root, *cache, "--loader_processes", "2") == without


@pytest.mark.slow
def test_a_sweep_is_the_same_to_the_bit_with_1_2_or_8_jobs_at_once_and_with_a_cache(
        root, tmp_path):
    cache = ["--image_cache", str(tmp_path / "cache")]
    cores_here = str(machine.available())

    def launched(name, n_jobs, *more):
        assert sweep.main([
            "launch", "--datasets", "Folder:shapes", "--algorithms", "ERM", "CORAL",
            "--single_test_envs", "--n_trials", "2", "--n_hparams", "1", "--data_dir", str(root),
            "--steps", "3", "--checkpoint_freq", "2", "--skip_model_save", "--skip_confirmation",
            "--hparams", json.dumps({"batch_size": 4, "image_size": 32, "wrn_depth": 10,
                                     "wrn_widen": 1}),
            "--command_launcher", "local", "--threads_per_job", "1", "--jobs_per_device", n_jobs,
            "--output_dir", str(tmp_path / name), *more]) == 0
        return {path.parent.name: records_in(path.parent)
                for path in (tmp_path / name).glob("*/results.jsonl")}

    plain = launched("plain", "1", "--loader_processes", "0")
    assert len({repr([r["loss"] for r in records]) for records in plain.values()}) == 8
    assert launched("cold", "8", *cache, "--loader_processes", cores_here) == plain
    assert launched("warm", "2", *cache, "--loader_processes", "1") == plain


def test_an_evaluation_reads_every_image_once_whatever_its_split(root, tmp_path, monkeypatch):
    load, measure = datasets.load_image, evaluation.measure
    read, evaluations, at_it = Counter(), [], []

    def counted(path):
        read[path] += bool(at_it)
        return load(path)

    def noted(*args):
        at_it.append(True)
        try:
            return measure(*args)
        finally:
            at_it.clear()

    monkeypatch.setattr(datasets.image_folders, "load_image", counted)
    monkeypatch.setattr(evaluation, "measure", noted)
    monkeypatch.setattr(files, "append_record", lambda *args: (
        evaluations.append(dict(read)), read.clear()))
    train.main([*FLAGS, "--data_dir", str(root), "--output_dir", str(tmp_path / "run")])
    everything = {path for domain in datasets.get_dataset_class("Folder:shapes")(root, [], {
        "data_augmentation": False, "image_size": 32}) for path, _ in domain.samples}
    assert len(evaluations) == 2
    for found in evaluations:
        assert {path for path, n in found.items() if n} == everything
        assert max(found.values()) == 1


def test_a_sweep_passes_the_flags_on_and_names_no_run_by_them(tmp_path, capsys):
    flags = ["launch", "--datasets", "Debug28", "--algorithms", "ERM", "--n_trials", "1",
             "--n_hparams", "1", "--command_launcher", "dummy", "--output_dir", str(tmp_path)]
    sweep.main(flags)
    without = [c for c in capsys.readouterr().out.splitlines() if c.startswith("Dummy")]
    sweep.main([*flags, "--image_cache", "a folder", "--loader_processes", "3"])
    with_ = [c for c in capsys.readouterr().out.splitlines() if c.startswith("Dummy")]
    assert without and with_ == [
        f"{c} --image_cache 'a folder' --loader_processes 3" for c in without]
