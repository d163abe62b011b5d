"""What a run keeps of its evaluations."""

from pathlib import Path

import numpy as np

from domainbed_kd.folder import files

# float16 after each image's largest logit is subtracted: no softmax and no order of classes changes
# but for differences below 3e-8, and close to the largest the steps are finest.
LOGITS_DTYPE = np.float16


def save_logits(path: Path, kept: dict[str, list[tuple]], keys: dict[str, list[int]]) -> None:
    """Writes a checkpoint's predictions, compressed and whole or not at all.

    Args:
        path: of the .npz file; its folder is made.
        kept: {split: [(indices within the split, labels (B,), logits (B, C)), ...]}, as tensors.
        keys: {split: its items' numbers in their domain}.
    """
    arrays = {}
    for name, batches in kept.items():
        index, labels, logits = (
            np.concatenate([np.asarray(part) for part in parts]) for parts in zip(*batches))
        if logits.shape[1] == 1:
            logits = np.pad(logits, ((0, 0), (1, 0)))
        index = np.asarray(keys[name], dtype=np.int32)[index]
        order = index.argsort()
        shifted = np.maximum(logits - logits.max(axis=1, keepdims=True),
                             np.finfo(LOGITS_DTYPE).min)
        arrays |= {f"{name}.logits": shifted[order].astype(LOGITS_DTYPE),
                   f"{name}.labels": labels[order].astype(np.int32), f"{name}.index": index[order]}
    path.parent.mkdir(exist_ok=True)

    def write(beside: Path) -> None:
        with beside.open("wb") as file:
            np.savez_compressed(file, **arrays)

    files.write_atomically(path, write)
