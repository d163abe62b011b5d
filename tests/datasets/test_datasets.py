import hashlib
import os
import pickle
import struct
import subprocess
import sys
import types
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import golden
from PIL import Image

from domainbed_kd import datasets, hparams_registry
from domainbed_kd.datasets.spawrious import _Spawrious

AUGMENTED = {"data_augmentation": True}
NOT_AUGMENTED = {"data_augmentation": False}
UPSTREAM = golden("dataset_registry.json")
FOLDERS = ["VLCS", "PACS", "OfficeHome", "TerraIncognita", "DomainNet", "SVIRO"]


def sha256(x):
    return hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest()


def save_image(path, seed=0, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.RandomState(seed).randint(0, 256, (*size[::-1], 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)


@pytest.fixture
def shapes(tmp_path):
    """A data directory whose name is hard to quote, with a dataset `my shapes`."""
    root = tmp_path / "a'; echo \"b"
    for d, domain in enumerate(["in the dark", "blurred", "o'clock"]):
        for c, cls in enumerate(["Big_Circle", "TV"]):
            for k in range(3):
                save_image(root / "my shapes" / domain / cls / f"{k} x.png", 100 * d + 10 * c + k)
    return root


# The registry.


def test_the_module_is_imported_without_torch():
    code = ("import sys, domainbed_kd.datasets as d; d.class_names('DomainNet'); "
            "d.environments('PACS'); print(sorted({'torch', 'torchvision', 'PIL', 'numpy', "
            "'wilds'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          check=True).stdout == "[]\n"


def test_datasets_are_domainbeds_in_its_order_then_ours():
    assert datasets.DATASETS[:19] == [*UPSTREAM, "DigitsDG"]


@pytest.mark.parametrize("name", UPSTREAM)
def test_class_attributes_are_domainbeds(name):
    cls, wanted = datasets.get_dataset_class(name), UPSTREAM[name]
    assert cls is getattr(datasets, name)
    for attribute in ("ENVIRONMENTS", "N_STEPS", "CHECKPOINT_FREQ", "N_WORKERS"):
        assert getattr(cls, attribute) == wanted[attribute], attribute
    assert cls.INPUT_SHAPE == (wanted["INPUT_SHAPE"] and tuple(wanted["INPUT_SHAPE"]))
    assert datasets.num_environments(name) == wanted["num_environments"]
    assert datasets.environments(name) == wanted["ENVIRONMENTS"]


def test_an_unknown_name_is_refused_with_the_nearest_known():
    with pytest.raises(NotImplementedError, match="Dataset not found: OficeHome. Did you mean "
                                                  "OfficeHome?"):
        datasets.get_dataset_class("OficeHome")


def test_a_data_set_of_ones_own_is_found_once_registered(monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", list(datasets.DATASETS))
    monkeypatch.setattr(datasets, "_CLASSES", dict(datasets._CLASSES))

    @datasets.register
    class Mine(datasets.MultipleDomainDataset):
        ENVIRONMENTS = ["x", "y"]

    assert datasets.DATASETS[-1] == "Mine" and datasets.get_dataset_class("Mine") is Mine
    assert datasets.num_environments("Mine") == 2


def test_a_users_dataset_states_facts_about_itself_which_hparams_obey(monkeypatch):
    monkeypatch.setattr(datasets, "DATASETS", list(datasets.DATASETS))
    monkeypatch.setattr(datasets, "_CLASSES", dict(datasets._CLASSES))

    @datasets.register
    class Mine(datasets.MultipleDomainDataset):
        SMALL_IMAGES = True
        CLIP_BACKBONE = "RN50"

    def drawn(name):
        return hparams_registry.random_hparams("DANN", name, seed=3)

    assert drawn("Mine") == drawn("RotatedMNIST") != drawn("PACS") == drawn("a fork's own")
    assert hparams_registry.default_hparams("RISE", "Mine")["clip_backbone"] == "RN50"


@pytest.mark.parametrize("name", datasets.DATASETS)
def test_the_stated_side_is_the_shape(name):
    cls = datasets.get_dataset_class(name)
    if cls.INPUT_SHAPE and cls.SIDE:
        assert cls.INPUT_SHAPE[1:] == (cls.SIDE, cls.SIDE)
    assert (cls.SIDE is not None and cls.SIDE < 64) == cls.SMALL_IMAGES


# Names of classes and domains.


def test_classes_are_words_in_the_order_of_their_folders():
    number = {"VLCS": 5, "PACS": 7, "OfficeHome": 65, "TerraIncognita": 10, "DomainNet": 345,
              "SVIRO": 7, "WILDSCamelyon": 2, "WILDSFMoW": 62, "SpawriousO2O_hard": 4,
              "RotatedMNIST": 10, "ColoredMNIST": 2, "DigitsDG": 10, "Debug28": 2}
    for name, n in number.items():
        folders, words = datasets.get_dataset_class(name).CLASSES, datasets.class_names(name)
        assert len(words) == len(set(words)) == n, name
        assert "_" not in "".join(words), name
        if name not in ("RotatedMNIST", "ColoredMNIST", "DigitsDG", "Debug28", "WILDSCamelyon"):
            assert list(folders) == sorted(folders), name


def test_folder_names_that_do_not_speak_are_replaced():
    assert datasets.class_names("OfficeHome")[0] == "alarm clock"
    assert {"television", "post-it notes", "toothbrush"} <= set(datasets.class_names("OfficeHome"))
    assert "empty scene" in datasets.class_names("TerraIncognita")
    assert datasets.class_names("DomainNet")[:4] == [
        "the Eiffel Tower", "the Great Wall of China", "the Mona Lisa", "aircraft carrier"]
    assert datasets.class_names("SVIRO")[6] == "empty child seat"


@pytest.mark.parametrize("name", ["PACS", "OfficeHome", "DomainNet", "DigitsDG"])
def test_domains_with_a_look_have_words_for_it(name):
    assert len(datasets.domain_names(name)) == datasets.num_environments(name)


@pytest.mark.parametrize("name", ["VLCS", "TerraIncognita", "SVIRO", "RotatedMNIST", "Debug28"])
def test_domains_without_a_look_have_no_words(name):
    assert datasets.domain_names(name) is None


# Debug and MNIST, against DomainBed's tensors.


@pytest.mark.parametrize("case", golden("debug_datasets.json"),
                         ids=lambda case: f"{case['dataset']}-{case['seed']}")
def test_debug_data_are_domainbeds_and_use_as_many_random_numbers(case):
    torch.manual_seed(case["seed"])
    dataset = datasets.get_dataset_class(case["dataset"])(None, [0], {})
    after = torch.randint(2**31 - 1, (len(case["rng_after"]),))
    assert dataset.input_shape == tuple(case["input_shape"])
    assert dataset.num_classes == case["num_classes"]
    assert len(dataset) == len(case["envs"])
    for domain, wanted in zip(dataset, case["envs"]):
        x, y = domain.tensors
        assert len(domain) == wanted["len"] and sha256(x) == wanted["x_sha256"]
        assert y.tolist() == wanted["y"] and y.dtype == torch.int64
    assert after.tolist() == case["rng_after"]


@pytest.fixture(scope="module")
def mnist(tmp_path_factory):
    """700 images of noise in MNIST's file format, drawn as those of the golden were."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.RandomState(0).randint(0, 256, (700, 28, 28)).astype(np.uint8)
    labels = np.random.RandomState(1).randint(0, 10, 700).astype(np.uint8)
    for prefix, part in (("train", slice(0, 600)), ("t10k", slice(600, 700))):
        for kind, content in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            header = bytes([0, 0, 8, content.ndim])
            header += b"".join(n.to_bytes(4, "big") for n in content.shape)
            (raw / f"{prefix}-{kind}-ubyte").write_bytes(header + content.tobytes())
    return root


@pytest.mark.parametrize("case", golden("mnist_datasets.json")["cases"],
                         ids=lambda case: f"{case['dataset']}-{case['torch_seed']}")
def test_mnist_data_are_domainbeds_and_use_as_many_random_numbers(case, mnist):
    torch.manual_seed(case["torch_seed"])
    dataset = datasets.get_dataset_class(case["dataset"])(mnist, [0], {})
    after = torch.randint(2**31 - 1, (len(case["rng_after_construction"]),))
    assert dataset.input_shape == tuple(case["input_shape"])
    assert dataset.num_classes == case["num_classes"] == len(dataset.class_names)
    for domain, wanted in zip(dataset, case["envs"]):
        x, y = domain.tensors
        assert list(x.shape) == wanted["x_shape"] and x.dtype == torch.float32
        assert sha256(x) == wanted["x_sha256"]
        assert sha256(y) == wanted["y_sha256"] and y.dtype == torch.int64
    assert after.tolist() == case["rng_after_construction"]


def test_mnist_without_files_and_network_says_where_they_belong(tmp_path, monkeypatch):
    import torchvision

    def offline(*args, **kwargs):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", offline)
    with pytest.raises(FileNotFoundError, match="RotatedMNIST: .*MNIST/raw .*Error downloading"):
        datasets.RotatedMNIST(tmp_path, [0], {})


def cifar_part(n_classes):
    """What torchvision makes of CIFAR's files, of 30 training and 8 test images."""
    def part(root, train, download):
        pixels, n = np.random.RandomState(n_classes + train), 30 if train else 8
        return types.SimpleNamespace(data=pixels.randint(0, 255, (n, 32, 32, 3), dtype=np.uint8),
                                     targets=pixels.randint(n_classes, size=n).tolist())
    return part


def test_cifar_is_two_domains_whose_test_images_are_held_out(tmp_path, monkeypatch):
    import torchvision

    from domainbed_kd.run import splits

    for n in (10, 100):
        monkeypatch.setattr(torchvision.datasets, f"CIFAR{n}", cifar_part(n))
    dataset = datasets.CIFAR(tmp_path, [0], AUGMENTED)
    assert (dataset.num_classes, dataset.input_shape, len(dataset)) == (100, (3, 32, 32), 2)
    seen, own = cifar_part(100)(None, False, True), cifar_part(10)(None, True, True)
    x, y = dataset[0][30]
    np.testing.assert_allclose(x, seen.data[0].transpose(2, 0, 1) / 255, rtol=1e-6)
    assert y == seen.targets[0] and x.dtype == torch.float32
    made = splits.make_splits(dataset, [0], 0, 0.2)
    # Tables show a test domain's in-split; a training domain is validated on its out-split.
    assert sorted(made.in_[0].keys) == list(range(30, 38)) == made.out[1].keys
    assert made.in_[1].keys == list(range(30))
    assert [made.in_[1].underlying_dataset.targets[i] for i in range(30)] == own.targets

    torch.manual_seed(0)
    padded = np.pad(own.data[0], ((4, 4), (4, 4), (0, 0))).transpose(2, 0, 1) / 255
    crops = [padded[:, i:i + 32, j:j + 32] for i in range(9) for j in range(9)]
    either = np.stack([*crops, *(crop[:, :, ::-1] for crop in crops)]).astype(np.float32)
    found = {int(np.abs(either - dataset[1][0][0].numpy()).sum(axis=(1, 2, 3)).argmin())
             for _ in range(40)}
    assert len(found) > 20
    for _ in range(5):
        assert np.abs(either - dataset[1][0][0].numpy()).max(axis=(1, 2, 3)).min() < 1e-6
    plain = datasets.plain(dataset[1])[0][0]
    np.testing.assert_allclose(plain, own.data[0].transpose(2, 0, 1) / 255, rtol=1e-6)


@pytest.mark.parametrize("name", ["ColoredMNIST", "PACS", "SpawriousM2M_easy", "WILDSFMoW"])
def test_data_that_need_a_directory_ask_for_it(name):
    with pytest.raises(ValueError, match=f"{name}.*--data_dir"):
        datasets.get_dataset_class(name)(None, [0], AUGMENTED)


# Image folders.


def make_folders(root, name, size=(40, 30)):
    """One image per domain and class of a dataset; the domains' folders are named 0, 1, ..."""
    cls = datasets.get_dataset_class(name)
    for d in range(len(cls.ENVIRONMENTS)):
        for c, folder in enumerate(cls.CLASSES[:3]):
            save_image(root / cls.FOLDER / str(d) / folder / "image.jpg", 10 * d + c, size)


@pytest.mark.parametrize("name", FOLDERS)
def test_image_folders_are_read_from_domainbeds_layout(name, tmp_path):
    make_folders(tmp_path, name)
    dataset = datasets.get_dataset_class(name)(tmp_path, [0], AUGMENTED | {"image_size": 32})
    assert len(dataset) == datasets.num_environments(name) and dataset.num_classes == 3
    assert dataset.input_shape == (3, 32, 32)
    assert dataset.class_names == datasets.class_names(name)[:3]
    assert dataset.domain_names == datasets.domain_names(name)
    x, y = dataset[1][2]
    assert x.shape == (3, 32, 32) and x.dtype == torch.float32 and y == 2 and type(y) is int


def test_the_plain_image_is_resized_and_normalized(shapes):
    dataset = datasets.get_dataset_class("Folder:my shapes")(shapes, [0], NOT_AUGMENTED)
    path, _ = dataset[1].samples[0]
    pixels = Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BILINEAR)
    wanted = np.asarray(pixels, dtype=np.float64) / 255
    wanted = (wanted - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(dataset[1][0][0].permute(1, 2, 0), wanted, atol=1e-6)


def test_the_augmented_image_is_domainbeds(shapes):
    # The steps of DomainBed's chain one by one, fed with the same random numbers.
    from torchvision.transforms import (
        ColorJitter,
        Normalize,
        RandomGrayscale,
        RandomHorizontalFlip,
        RandomResizedCrop,
        ToTensor,
    )

    dataset = datasets.get_dataset_class("Folder:my shapes")(shapes, [0], AUGMENTED)
    for i in range(4):
        torch.manual_seed(i)
        found, _ = dataset[1][i]
        torch.manual_seed(i)
        image = Image.open(dataset[1].samples[i][0])
        for step in (RandomResizedCrop(224, (0.7, 1.0)), RandomHorizontalFlip(0.5),
                     ColorJitter(0.3, 0.3, 0.3, 0.3), RandomGrayscale(0.1), ToTensor(),
                     Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])):
            image = step(image)
        assert torch.equal(found, image)


def test_only_training_domains_are_augmented_and_only_if_asked(shapes):
    def repeats(domain):
        return torch.equal(domain[0][0], domain[0][0])

    cls = datasets.get_dataset_class("Folder:my shapes")
    torch.manual_seed(0)
    assert [repeats(d) for d in cls(shapes, [1], AUGMENTED)] == [False, True, False]
    assert [repeats(d) for d in cls(shapes, [1], NOT_AUGMENTED)] == [True, True, True]


def test_plain_leaves_out_augmentation_and_the_original_alone(shapes):
    cls = datasets.get_dataset_class("Folder:my shapes")
    augmented, without = cls(shapes, [0], AUGMENTED)[1], cls(shapes, [0], NOT_AUGMENTED)[1]
    before = augmented.transform
    same = datasets.plain(augmented)
    assert all(torch.equal(same[i][0], without[i][0]) for i in range(len(same)))
    assert augmented.transform is before and same.classes == augmented.classes
    split = types.SimpleNamespace(underlying_dataset=augmented, keys=[2, 0])
    of_split = datasets.plain(split)
    assert torch.equal(of_split.underlying_dataset[0][0], without[0][0])
    assert split.underlying_dataset is augmented and of_split.keys == [2, 0]


def test_a_folder_of_ones_own_needs_no_code(shapes):
    name = "Folder:my shapes"
    cls = datasets.get_dataset_class(name)
    assert cls.__name__ == name and issubclass(cls, datasets.ImageFolders)
    assert datasets.environments(name, shapes) == ["blurred", "in the dark", "o'clock"]
    assert datasets.num_environments(name, shapes) == 3
    assert datasets.class_names(name, shapes) == ["big circle", "tv"]
    dataset = cls(str(shapes), [0], AUGMENTED)
    assert dataset.ENVIRONMENTS == ["blurred", "in the dark", "o'clock"]
    assert dataset.class_names == ["big circle", "tv"] and dataset.domain_names is None
    assert [d.targets for d in dataset] == [[0, 0, 0, 1, 1, 1]] * 3
    assert dataset[0].class_to_idx == {"Big_Circle": 0, "TV": 1}


@pytest.mark.parametrize("folder", ["", ".", "..", "../x", "a/b", "a\\b", "/etc"])
def test_a_folder_name_is_not_a_path(folder):
    with pytest.raises(ValueError, match="name of a folder"):
        datasets.get_dataset_class(f"Folder:{folder}")


def test_a_folder_of_ones_own_is_described_only_with_a_data_directory():
    with pytest.raises(ValueError, match="Pass --data_dir"):
        datasets.environments("Folder:x")


def test_domains_can_be_sent_to_loader_processes(shapes):
    dataset = datasets.get_dataset_class("Folder:my shapes")(shapes, [0], NOT_AUGMENTED)
    again = pickle.loads(pickle.dumps(dataset[1]))
    assert torch.equal(again[3][0], dataset[1][3][0])


# What users can mend.


def one_line(error):
    return "\n" not in str(error.value)


def test_a_missing_folder_names_the_layout_and_the_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="PACS is not there.*<domain>/<class>/.*"
                                                "domainbed_kd.scripts.download") as error:
        datasets.PACS(tmp_path, [0], AUGMENTED)
    assert one_line(error)


def test_a_folder_without_domains_says_so(tmp_path):
    (tmp_path / "x" / ".git").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="x holds no domains"):
        datasets.get_dataset_class("Folder:x")(tmp_path, [0], AUGMENTED)


def test_a_domain_without_classes_is_named(shapes):
    (shapes / "my shapes" / "void").mkdir()
    with pytest.raises(FileNotFoundError, match="void holds no class folders"):
        datasets.get_dataset_class("Folder:my shapes")(shapes, [0], AUGMENTED)


def test_an_empty_class_is_named(shapes):
    for file in (shapes / "my shapes" / "o'clock" / "TV").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="o'clock/TV holds no images") as error:
        datasets.get_dataset_class("Folder:my shapes")(shapes, [0], AUGMENTED)
    assert one_line(error)


@pytest.mark.parametrize("domain", ["blurred", "o'clock"])
def test_a_class_that_only_one_domain_has_is_named(domain, shapes):
    save_image(shapes / "my shapes" / domain / "Square" / "1.png")
    with pytest.raises(ValueError, match=f"{domain} has classes that .* lacks: Square") as error:
        datasets.get_dataset_class("Folder:my shapes")(shapes, [0], AUGMENTED)
    assert one_line(error)


def test_a_missing_domain_of_a_known_data_set_is_an_error(tmp_path):
    save_image(tmp_path / "PACS" / "photo" / "dog" / "1.png")
    with pytest.raises(ValueError, match=r"holds 1 domains \(photo\) instead of 4"):
        datasets.PACS(tmp_path, [0], AUGMENTED)


def test_an_unreadable_image_is_named_when_it_is_read(shapes):
    path = shapes / "my shapes" / "blurred" / "TV" / "1 x.png"
    path.write_text("not an image")
    dataset = datasets.get_dataset_class("Folder:my shapes")(shapes, [0], AUGMENTED)
    with pytest.raises(ValueError, match="TV/1 x.png cannot be read as an image") as error:
        dataset[0][4]
    assert one_line(error)


def test_an_image_that_claims_too_many_pixels_is_named(tmp_path):
    save_image(tmp_path / "1.bmp")
    content = bytearray((tmp_path / "1.bmp").read_bytes())
    content[18:26] = struct.pack("<ii", 100_000, 100_000)  # its width and height
    (tmp_path / "1.bmp").write_bytes(content)
    with pytest.raises(ValueError, match="1.bmp cannot be read as an image. Replace it."):
        datasets.load_image(tmp_path / "1.bmp")


def test_a_truncated_image_is_read_as_far_as_it_goes(tmp_path):
    save_image(tmp_path / "whole.jpg", size=(64, 64))
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[:len(content) * 2 // 3])
    assert datasets.load_image(tmp_path / "cut.jpg").size == (64, 64)


@pytest.mark.parametrize("size", [0, 96.0, "96", None, True])
def test_an_image_size_that_is_none_is_refused(size, shapes):
    with pytest.raises(ValueError, match="image_size.*whole pixels"):
        datasets.get_dataset_class("Folder:my shapes")(
            shapes, [0], AUGMENTED | {"image_size": size})


# PACS, as it is.


def test_real_pacs_has_the_published_counts(pacs):
    dataset = datasets.PACS(pacs, [3], AUGMENTED | {"image_size": 96})
    assert [len(domain) for domain in dataset] == [2048, 2344, 1670, 3929]
    assert dataset.num_classes == 7
    assert all(domain.classes == list(datasets.PACS.CLASSES) for domain in dataset)
    assert [Counter(domain.targets)[0] for domain in dataset] == [379, 389, 189, 772]
    x, y = dataset[3][0]
    assert x.shape == (3, 96, 96) and y == 0


# WILDS and Spawrious, on stand-ins.


class FakeWILDS:
    def __init__(self, root_dir):
        self.root_dir = root_dir
        self.metadata_fields = ["other", "hospital", "region"]
        values = torch.tensor([2, 0, 1, 0, 2, 2])
        self.metadata_array = torch.stack([torch.arange(6), values, values], dim=1)
        self.y_array = torch.tensor([0, 1, 1, 0, 1, 0])
        self.n_classes = 2

    def get_input(self, index):
        return Image.new("RGB", (20, 20), (40 * index, 0, 0))


@pytest.mark.parametrize("name, module, attribute", [
    ("WILDSCamelyon", "camelyon17_dataset", "Camelyon17Dataset"),
    ("WILDSFMoW", "fmow_dataset", "FMoWDataset")])
def test_wilds_domains_are_the_sorted_values_of_a_field(name, module, attribute, monkeypatch):
    for path in ("wilds", "wilds.datasets"):
        monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    fake = types.ModuleType(module)
    setattr(fake, attribute, FakeWILDS)
    monkeypatch.setitem(sys.modules, f"wilds.datasets.{module}", fake)
    dataset = datasets.get_dataset_class(name)("data", [0], AUGMENTED | {"image_size": 16})
    assert dataset[0].dataset.root_dir == "data" and dataset.num_classes == 2
    assert [domain.indices for domain in dataset] == [[1, 3], [2], [0, 4, 5]]
    assert [dataset[2][i][1] for i in range(3)] == [0, 1, 0]
    assert dataset[1][0][0].shape == (3, 16, 16)
    red = datasets.plain(dataset[2])[1][0][0] * 0.229 + 0.485
    torch.testing.assert_close(red, torch.full((16, 16), 160 / 255))


def test_wilds_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wilds", None)
    with pytest.raises(ValueError, match=r"pip install domainbed_kd\[wilds\]") as error:
        datasets.WILDSCamelyon("data", [0], AUGMENTED)
    assert one_line(error)


@pytest.fixture
def spawrious(tmp_path, monkeypatch):
    """Two images per folder, breed and background; 100 would be the full number."""
    for folder in "01":
        for background in ("beach", "desert", "dirt", "jungle", "mountain", "snow"):
            for breed in ("bulldog", "corgi", "dachshund", "labrador"):
                for k in range(4):
                    save_image(tmp_path / folder / background / breed / f"{k}.png", size=(8, 8))
    monkeypatch.setattr(_Spawrious, "N_IMAGES", 4)
    return tmp_path


def cells(domain, root):
    """{(folder, background, breed, label): number of images}, in order of first appearance."""
    def cell(path, y):
        return (*path.removeprefix(f"{root}/").split("/")[:3], y)

    return dict(Counter(cell(path, y) for path, y in domain.samples))


def test_spawrious_one_to_one_keeps_backgrounds_and_adds_a_filler(spawrious):
    dataset = datasets.SpawriousO2O_easy(spawrious, [0], AUGMENTED)
    test, first, second = (cells(domain, spawrious) for domain in dataset)
    # int(0.97 * 4) and int(0.87 * 4) are both 3, which leaves 1 for the filler.
    for folder, found in (("0", first), ("1", second)):
        assert found == {
            (folder, "desert", "bulldog", 0): 3, (folder, "jungle", "dachshund", 2): 3,
            (folder, "dirt", "labrador", 3): 3, (folder, "snow", "corgi", 1): 3,
            (folder, "beach", "bulldog", 0): 1, (folder, "beach", "dachshund", 2): 1,
            (folder, "beach", "labrador", 3): 1, (folder, "beach", "corgi", 1): 1}
    assert list(test) == [
        (folder, *rest) for folder in "01" for rest in (
            ("dirt", "bulldog", 0), ("snow", "dachshund", 2), ("desert", "labrador", 3),
            ("jungle", "corgi", 1))]
    assert set(test.values()) == {4}


def test_spawrious_many_to_many_swaps_backgrounds_between_groups(spawrious):
    dataset = datasets.SpawriousM2M_hard(spawrious, [0], AUGMENTED)
    test, first, second = (cells(domain, spawrious) for domain in dataset)
    assert list(first) == [("0", "dirt", "bulldog", 0), ("0", "jungle", "dachshund", 2),
                           ("0", "snow", "labrador", 3), ("0", "beach", "corgi", 1)]
    assert list(second) == [("0", "jungle", "bulldog", 0), ("0", "dirt", "dachshund", 2),
                            ("0", "beach", "labrador", 3), ("0", "snow", "corgi", 1)]
    assert list(test) == [
        ("0", "snow", "bulldog", 0), ("0", "beach", "dachshund", 2), ("0", "dirt", "labrador", 3),
        ("0", "jungle", "corgi", 1), ("0", "beach", "bulldog", 0), ("0", "snow", "dachshund", 2),
        ("0", "jungle", "labrador", 3), ("0", "dirt", "corgi", 1)]
    assert set(test.values()) == {4}


@pytest.mark.parametrize("name", [name for name in UPSTREAM if name.startswith("Spawrious")])
def test_spawrious_never_tests_on_a_trained_background(name, spawrious):
    dataset = datasets.get_dataset_class(name)(spawrious, [1], AUGMENTED)
    seen = {cell[1:3] for domain in dataset.datasets[1:] for cell in cells(domain, spawrious)}
    assert not seen & {cell[1:3] for cell in cells(dataset[0], spawrious)}


def test_spawrious_augments_training_groups_without_cropping(spawrious):
    dataset = datasets.SpawriousM2M_easy(spawrious, [1], AUGMENTED)
    steps = [type(step).__name__ for step in dataset[1].transform.transforms]
    assert steps == ["Resize", "RandomHorizontalFlip", "ColorJitter", "RandomGrayscale",
                     "ToTensor", "Normalize"]
    assert dataset[1][0][0].shape == (3, 224, 224)
    assert [type(step).__name__ for step in dataset[0].transform.transforms] == [
        "Resize", "ToTensor", "Normalize"]
    assert torch.equal(datasets.plain(dataset[1])[0][0], datasets.plain(dataset[1])[0][0])


def test_spawrious_names_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no images in .*0/dirt/bulldog") as error:
        datasets.SpawriousO2O_easy(tmp_path, [0], AUGMENTED)
    assert one_line(error)


# Images of other depths than 8 bits.


def loaded(path):
    return np.asarray(datasets.load_image(str(path)))


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_grey_of_16_bits_is_scaled_to_8_by_257(tmp_path, suffix):
    grey = np.array([[0, 128, 257, 300], [65535, 32896, 65406, 129]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / f"x.{suffix}")
    expected = np.floor(grey / 257 + 0.5).astype(np.uint8)  # 65,535 is 255 * 257
    found = loaded(tmp_path / f"x.{suffix}")
    assert found.shape == (2, 4, 3) and found.dtype == np.uint8
    for channel in range(3):
        np.testing.assert_array_equal(found[..., channel], expected)
    assert expected.min() == 0 and expected.max() == 255 and len(np.unique(expected)) >= 5


@pytest.mark.parametrize("dtype, kind", [(np.float32, "floats"), (np.int32, "integers of 32")])
def test_values_without_a_range_are_refused_in_a_line(tmp_path, dtype, kind):
    Image.fromarray(np.arange(12).reshape(3, 4).astype(dtype)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match=f"x.tif holds {kind}.* Convert it to 8 or 16") as error:
        loaded(tmp_path / "x.tif")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "CMYK", "1", "LA"])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_pixels_of_8_bits_are_those_that_domainbed_reads(tmp_path, mode, suffix):
    noise = Image.fromarray(np.random.RandomState(0).randint(0, 256, (9, 7, 3)).astype(np.uint8))
    if (mode, suffix) == ("CMYK", "png"):
        pytest.skip("PNG has no CMYK")
    noise.convert(mode).save(tmp_path / f"x.{suffix}")
    with Image.open(tmp_path / f"x.{suffix}") as image:  # as torchvision's ImageFolder does
        np.testing.assert_array_equal(loaded(tmp_path / f"x.{suffix}"), image.convert("RGB"))


def test_rotation_by_exif_is_not_applied_as_in_domainbed(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(2, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees to show
    image.save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(loaded(tmp_path / "x.png"), np.asarray(image))


def test_a_fifo_in_place_of_an_image_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(OSError, match="Not a regular file") as error:
        loaded(tmp_path / "x.png")
    assert error.value.filename == str(tmp_path / "x.png")
