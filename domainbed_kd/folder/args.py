"""The flags of a run that `train` takes and `sweep` hands on."""

import argparse
import os

from domainbed_kd.console import parse_hparams


def add_flags_of_runs(group: argparse._ArgumentGroup) -> None:
    """Flags of ours that `train` takes and `sweep` hands on; absent switches are None."""
    def switch(flag, text):
        group.add_argument(flag, action="store_const", const=True, help=text)

    switch("--allow_bad_teacher", "go on with a teacher that is near chance or has other classes")
    switch("--diagnostics",
           "record weight distance, mutual information, calibration and agreement with the "
           "teacher at each evaluation; see docs/analysis.md")
    switch("--save_logits",
           "keep the predictions that model selection looks at, at each evaluation, in "
           "logits/stepN.npz (float16); see docs/analysis.md")
    switch("--log_test_domains", "show accuracies on the test domains in TensorBoard too")
    switch("--wandb", "log to Weights & Biases too, offline unless WANDB_MODE=online")
    switch("--fast",
           "train in bfloat16, channels last, with augmentation as tensor operations, and "
           "evaluate only what model selection reads; see docs/speed.md")
    switch("--compile", "with --fast: compile each run's featurizer, for a minute or two; needs a "
                        "C++ compiler")
    group.add_argument("--image_cache", metavar="DIR",
                       help="folder where decoded images are kept for all runs, 3 bytes a pixel; "
                            "results do not depend on it; see docs/speed.md")
    group.add_argument("--teacher_cache", metavar="DIR",
                       help="keep what frozen teachers make of images without augmentation, for "
                            "all runs; needs the hparam canonical_view; see docs/speed.md")
    group.add_argument("--loader_processes", type=int, metavar="N",
                       help="processes that read a run's images, no more than there are cores; "
                            "default: 0, but on a GPU as many as the run has threads, up to 8; "
                            "results do not depend on it")
    group.add_argument("--format", choices=["safetensors"],
                       help="also write model.safetensors: the tensors by name, and all else that "
                            "model.pkl has as JSON in the file's metadata")
    group.add_argument("--plugin", action="append", default=[], metavar="MODULE",
                       help="module or .py file with algorithms, data sets or, for sweeps, "
                            "launchers of your own; may be given again")
    group.add_argument("--fork", dest="plugin", action="append", metavar="FOLDER", type=_fork,
                       help="folder of a DomainBed fork, which holds its package domainbed: its "
                            "algorithms can be named too; ours keep their names")


def _fork(folder: str) -> str:
    if not os.path.isdir(os.path.join(folder, "domainbed")):
        raise argparse.ArgumentTypeError(f"{folder} is no folder that holds a package domainbed.")
    return folder


def check_compile(compile_: bool | None, fast: bool | None) -> None:
    """Refuses to compile in exact mode, whose numbers a compiler would change.

    Raises:
        ValueError: if so.
    """
    if compile_ and not fast:
        raise ValueError("--compile needs --fast: compiled networks round otherwise than exact "
                         "mode must. Pass both, or neither.")


def check_teacher_cache(folder: str | None, hparams: str | None) -> None:
    """Refuses a folder in which nothing would be kept.

    Raises:
        ValueError: if --teacher_cache is given without the hparam that it serves.
    """
    if folder is None:
        return
    if hparams and parse_hparams(hparams).get("canonical_view"):
        return
    raise ValueError("--teacher_cache keeps what teachers make of images without augmentation, "
                     "which moves results. Ask for that too: --hparams '{\"canonical_view\": "
                     "true}'.")
