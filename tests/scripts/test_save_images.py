import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from domainbed_kd import datasets
from domainbed_kd.scripts import save_images


@pytest.fixture
def data(tmp_path):
    """A dataset of two domains, each image of which is of one colour."""
    for domain, red in (("dark", 40), ("light", 200)):
        for label, name in enumerate(("cat", "dog")):
            folder = tmp_path / "data" / "mine" / domain / name
            folder.mkdir(parents=True)
            for i in range(3):
                Image.new("RGB", (30, 20), (red, 100 * label, 10 * i)).save(folder / f"{i}.png")
    return tmp_path / "data"


def test_images_keep_their_colours_and_are_named_as_domainbed_names_them(data, tmp_path, capsys):
    folder = tmp_path / "out"
    words = ["--data_dir", str(data), "--output_dir", str(folder), "--datasets", "Folder:mine"]
    assert save_images.main([*words, "--n", "4"]) == 0
    assert capsys.readouterr().out == "Folder:mine: 8 images\n"
    seen = set()
    for path in folder.iterdir():
        pattern = r"Folder_mine_env(\d)(dark|light)_(\d)_idx(\d)_class(\d)\.png"
        env, domain, k, index, label = re.fullmatch(pattern, path.name).groups()
        assert domain == ("dark", "light")[int(env)]
        image = Image.open(path)
        assert image.size == (224, 224)
        red, green, blue = np.asarray(image)[100, 100].astype(int)
        expected = (200 if domain == "light" else 40, 100 * int(label), 10 * (int(index) % 3))
        assert np.abs(np.subtract((red, green, blue), expected)).max() <= 1
        seen.add((domain, k))
    assert seen == {(domain, str(k)) for domain in ("dark", "light") for k in range(4)}
    before = sorted(path.name for path in folder.iterdir())
    save_images.main([*words, "--n", "4"])
    assert sorted(path.name for path in folder.iterdir()) == before


def test_two_channels_are_saved_as_red_and_green(tmp_path, monkeypatch):
    class Two(datasets.MultipleDomainDataset):
        ENVIRONMENTS = ["+90%"]

        def __init__(self, root, test_envs, hparams):
            x = torch.stack([torch.ones(4, 4), torch.zeros(4, 4)])
            self.datasets = [torch.utils.data.TensorDataset(x[None], torch.tensor([1]))]

    monkeypatch.setattr(datasets, "get_dataset_class", lambda name: Two)
    assert save_images.save("ColoredMNIST", tmp_path, tmp_path, 5) == 1
    path, = tmp_path.iterdir()
    assert Image.open(path).getpixel((2, 2)) == (255, 0, 0)


def test_without_names_it_takes_what_is_there_and_refuses_an_empty_folder(data, tmp_path, capsys):
    for i, name in enumerate(("art_painting", "cartoon", "photo", "sketch")):
        shutil.copytree(data / "mine" / ("dark", "light")[i % 2], data / "PACS" / name)
    assert save_images.main(["--data_dir", str(data), "--output_dir", str(tmp_path / "out"),
                             "--n", "1"]) == 0
    assert capsys.readouterr().out == "PACS: 4 images\n"
    with pytest.raises(ValueError, match="does not hold the folder of any dataset.*--datasets"):
        save_images.main(["--data_dir", str(tmp_path / "out"), "--output_dir", str(tmp_path)])
