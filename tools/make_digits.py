"""Writes domainbed_kd/assets/digits.npz from scikit-learn's copy of the UCI optical digits.

    python tools/make_digits.py [FILE]

The same bytes each time; assets/digits.md says where the images come from.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

ASSET = Path(__file__).parents[1] / "domainbed_kd" / "assets" / "digits.npz"


def main(argv: list[str] | None = None) -> int:
    """Writes the file named in `argv`, or the asset."""
    arguments = sys.argv[1:] if argv is None else argv
    path = Path(arguments[0]) if arguments else ASSET
    digits = load_digits()
    np.savez_compressed(
        path, images=digits.images.astype(np.uint8), labels=digits.target.astype(np.uint8))
    print(f"{path}: {len(digits.images)} images, {path.stat().st_size} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
