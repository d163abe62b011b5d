"""Saves some images of each domain as a network sees them: cropped and resized, not augmented.

Files are named DATASET_envIDOMAIN_K_idxINDEX_classLABEL.png, as by DomainBed's script. That takes
six datasets and chooses images at random; here the choice is always the same.
"""

import argparse
import random
from pathlib import Path

from domainbed_kd.console import Parser, bar, run_main


def build_parser() -> argparse.ArgumentParser:
    """DomainBed's flags, then ours."""
    parser = Parser(prog="python -m domainbed_kd.scripts.save_images", description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True,
                        help="folder that holds the datasets")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the images")
    parser.add_argument("--datasets", nargs="+", metavar="NAME",
                        help="default: those that have their folder in DATA_DIR")
    parser.add_argument("--n", type=int, default=50, help="images per domain; default: 50")
    return parser


def save(name: str, data_dir: Path, folder: Path, n: int) -> int:
    """Saves `n` images of each domain of a dataset, or all if there are fewer; returns how many."""
    import torch
    from torchvision.utils import save_image

    from domainbed_kd import datasets, hparams_registry

    dataset = datasets.get_dataset_class(name)(
        str(data_dir), [], hparams_registry.default_hparams("ERM", name))
    domains = datasets.environments(name, data_dir)
    mean, std = (torch.tensor(each).view(-1, 1, 1) for each in dataset.NORMALIZATION or ([0], [1]))
    n_saved = 0
    for i, (domain, images) in enumerate(zip(domains, map(datasets.plain, dataset))):
        chosen = random.Random(i).sample(range(len(images)), min(n, len(images)))
        for k, index in enumerate(bar(chosen, total=len(chosen), unit="image")):
            x, y = images[index]
            x = (x * std + mean).clamp(0, 1)
            if len(x) == 2:  # ColoredMNIST is red and green
                x = torch.cat([x, torch.zeros_like(x[:1])])
            save_image(x, folder / f"{name.replace(':', '_')}_env{i}{domain}_{k}_idx{index}_class"
                                   f"{int(y)}.png")
            n_saved += 1
    return n_saved


def main(argv: list[str] | None = None) -> int:
    """Saves images, and prints how many of each dataset."""
    args = build_parser().parse_args(argv)
    from domainbed_kd import datasets

    names = args.datasets or [
        name for name in datasets.DATASETS
        if (there := datasets.facts(name).FOLDER) and (args.data_dir / there).is_dir()]
    if not names:
        raise ValueError(f"{args.data_dir} does not hold the folder of any dataset. Name a dataset "
                         "with --datasets, or choose another --data_dir.")
    if args.n < 1:
        raise ValueError(f"--n is {args.n}; it takes a number from 1 up.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for name in names:
        print(f"{name}: {save(name, args.data_dir, args.output_dir, args.n)} images")
    return 0


if __name__ == "__main__":
    run_main(main)
