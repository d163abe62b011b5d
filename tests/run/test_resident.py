import json
from collections import Counter

import numpy as np
import pytest
import torch
from test_image_cache import FLAGS, read, root  # noqa: F401
from torchvision import transforms as T

from domainbed_kd import datasets
from domainbed_kd.folder import files
from domainbed_kd.run import augmentation, evaluation, precision, resident
from domainbed_kd.scripts import train

CPU = torch.device("cpu")
UNLIKE = ("step_time", "mem_gb", "args")


@pytest.fixture
def on_device(monkeypatch):
    """Runs keep images in the memory of their device, as on a GPU, on whatever device there is."""
    monkeypatch.setattr(resident, "pays_on", lambda device: True)


def trained(folder, data, *flags):
    """The records of a run, but for what no two runs share."""
    assert train.main([*FLAGS, "--data_dir", str(data), "--output_dir", str(folder), *flags]) == 0
    records = [json.loads(line) for line in (folder / files.RESULTS).open()]
    return [{k: v for k, v in record.items() if k not in UNLIKE} for record in records]


def settled(data, fast, test_envs=(1,), augment=True, room=10**9):
    dataset = read(data, None, test_envs, augment)
    finish = resident.Finish(CPU, fast)
    resident.settle(dataset, finish, room)
    return dataset, finish


@pytest.mark.parametrize("flags", [
    [], ["--algorithm", "SWAD"], ["--loader_processes", "2"], ["--gpu_image_gb", "0"],
    ["--task", "domain_adaptation", "--uda_holdout_fraction", "0.5", "--algorithm", "DANN"],
    ["--hparams", '{"batch_size": 4, "image_size": 32, "data_augmentation": false}']])
def test_an_exact_run_trains_to_the_same_bits(root, tmp_path, flags, monkeypatch):  # noqa: F811
    without = trained(tmp_path / "without", root, *flags)
    monkeypatch.setattr(resident, "pays_on", lambda device: True)
    assert trained(tmp_path / "with", root, *flags) == without


def test_an_exact_run_reads_test_images_once(root, tmp_path, monkeypatch, on_device):  # noqa: F811
    n_reads, load = Counter(), datasets.load_image
    monkeypatch.setattr(datasets.image_folders, "load_image",
                        lambda path: (n_reads.update([path]), load(path))[1])
    trained(tmp_path / "run", root, "--loader_processes", "0")  # two evaluations
    counts = {domain: {n for path, n in n_reads.items() if f"/shapes/{domain}/" in path}
              for domain in "ab"}
    assert counts["b"] == {1} and min(counts["a"]) >= 2


def test_an_exact_run_reads_images_for_a_validation_loss_once(
        root, tmp_path, monkeypatch, on_device):  # noqa: F811
    whole, read_splits = evaluation._whole, []
    monkeypatch.setattr(evaluation, "_whole",
                        lambda split: (read_splits.append(id(split)), whole(split))[1])
    flags = ("--algorithm", "SWAD", "--hparams", json.dumps(
        {"batch_size": 4, "image_size": 32, "weights": "none", "swad_interval": 1}))
    trained(tmp_path / "kept", root, *flags)
    assert read_splits and len(read_splits) == len(set(read_splits))
    read_splits.clear()
    trained(tmp_path / "read", root, *flags, "--gpu_image_gb", "0")
    assert len(read_splits) > len(set(read_splits))


def test_a_fast_run_that_was_stopped_ends_in_the_same_bits(
        root, tmp_path, monkeypatch, on_device):  # noqa: F811
    whole = trained(tmp_path / "whole", root, "--fast")
    append, n = files.append_record, []

    def stop(*args):
        append(*args)
        n.append(1)
        if len(n) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(files, "append_record", stop)
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", root, "--fast")
    assert trained(tmp_path / "parts", root, "--fast")[-1] == whole[-1]


@pytest.mark.parametrize("fast", [False, True])
def test_images_that_are_not_augmented_are_those_of_pillow(root, fast):  # noqa: F811
    wanted = read(root, test_envs=[1], augment=True)
    dataset, finish = settled(root, fast)
    for domain, theirs in ((datasets.plain(dataset[0]), datasets.plain(wanted[0])),
                           (dataset[1], wanted[1])):
        with precision.autocast(CPU, fast):  # as when they are evaluated
            found = torch.cat([finish(domain[i][0][None]) for i in range(len(domain))])
        images = torch.stack([theirs[i][0] for i in range(len(theirs))])
        assert [domain[i][1] for i in range(len(domain))] == theirs.targets
        if fast:  # resized without Pillow's rounding between the two axes
            assert (found - images).abs().max() < 1.01 / 255 / min(datasets.IMAGENET_STD)
        else:
            assert torch.equal(found, images)


def test_crops_of_images_of_several_sizes_are_those_of_each(root, monkeypatch):  # noqa: F811
    dataset, finish = settled(root, fast=True)
    monkeypatch.setattr(augmentation, "distorted", lambda x: x)
    rows = dataset[0].tensors[0][torch.tensor([3, 0, 11, 7, 3])]
    torch.manual_seed(0)
    found = finish(rows)
    torch.manual_seed(0)
    draws = torch.rand(len(rows), 10, 4).tolist()
    pictures = read(root)[0]
    for x, (number, _), each in zip(found, rows.tolist(), draws):
        image = pictures.loader(pictures.samples[number][0])
        top, left, height, width = augmentation.window(
            image.height, image.width, (0.7, 1.0), (3 / 4, 4 / 3), each)
        wanted = T.functional.resized_crop(image, top, left, height, width, (32, 32))
        wanted = torch.from_numpy(np.array(wanted)).permute(2, 0, 1)
        assert (x.int() - wanted.int()).abs().max() <= 1


def test_many_images_are_cut_in_parts_of_bounded_size(root, monkeypatch):  # noqa: F811
    dataset, finish = settled(root, fast=True)
    rows = datasets.plain(dataset[0]).tensors[0]
    whole = finish(rows)
    monkeypatch.setattr(resident, "_AT_ONCE", 3 * 40 * 40)
    assert torch.equal(finish(rows), whole)


@pytest.mark.parametrize("fast", [False, True])
def test_images_for_which_there_is_no_room_stay_with_the_loaders(root, fast):  # noqa: F811
    sizes = [32 * 32] * 16 if not fast else [
        np.asarray(d.loader(path)).shape for d in read(root) for path, _ in d.samples]
    need = 3 * sum(int(np.prod(size[:2])) if fast else size for size in sizes)
    for room, is_resident in ((need, True), (need - 1, False)):
        dataset, _ = settled(root, fast, room=room)
        assert isinstance(dataset[1], resident.Domain) == is_resident
        assert isinstance(dataset[0], resident.Domain) == (is_resident and fast)


def test_datasets_of_other_kinds_are_left_as_they_are():
    dataset = datasets.get_dataset_class("Debug28")(None, [0], {})
    before = list(dataset.datasets)
    finish = resident.Finish(CPU, True)
    resident.settle(dataset, finish, 10**9)
    assert dataset.datasets == before and not finish.takes(torch.zeros(1, dtype=torch.int64))
