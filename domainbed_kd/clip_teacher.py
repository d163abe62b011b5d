"""CLIP as a teacher, with its own preprocessing; text is encoded once."""

import copy
import difflib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets, networks

ASSETS = Path(__file__).parent / "assets"


def check_class_names(method: str, hparams: dict[str, Any], num_classes: int) -> None:
    """Raises ValueError unless hparams["class_names"] has a name for each class."""
    names = hparams.get("class_names")
    if not names:
        raise ValueError(f"{method}: the classes have no names. Pass them in label order: "
                         "--hparams '{\"class_names\": [...]}'.")
    if len(names) != num_classes:
        raise ValueError(
            f"{method}: the dataset has {num_classes} classes but hparams['class_names'] holds "
            f"{len(names)}: {names}. Pass one for each, in label order.")


class CLIP(networks.Frozen):
    """A frozen CLIP that takes the student's images.

    Args:
        model: has encode_image, encode_text and logit_scale (a tensor, the scale's logarithm), as
            open_clip's models do.
        tokenizer: list of texts -> tokens.
        size: side of its images, in pixels.
        mean, std: of its images, per channel.
        student_mean, student_std: of the student's images, per channel; undone first.
        renormalize: False gives CLIP the student's normalization, as SCMD's and RISE's published
            code does.
        weights_loaded: the share of its weights that came from a file, if known.
    """

    module: Any

    def __init__(self, model: nn.Module, tokenizer: Callable[[list[str]], Tensor], size: int,
                 mean: Sequence[float], std: Sequence[float],
                 student_mean: Sequence[float], student_std: Sequence[float],
                 renormalize: bool = True, weights_loaded: float | None = 1.0):
        super().__init__(model)
        self.tokenizer, self.size = tokenizer, size
        self.mean, self.std = mean, std
        self.renormalize = renormalize
        self.weights_loaded = weights_loaded
        self.normalization = networks.Normalization(mean, std)
        self.students = networks.Normalization(student_mean, student_std)
        self.preprocessing = f"3 channels, {size} x {size} pixels"
        if renormalize:
            self.preprocessing = (f"mean {student_mean} and std {student_std} undone; "
                                  f"{self.preprocessing}; mean {mean}, std {std}")
        else:
            self.preprocessing += ", normalization as the student's"

    @torch.no_grad()
    def sentences(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Embeddings (C, S, D), not normalized, of S templates filled with C class names."""
        texts = [template.format(name) for name in names for template in templates]
        device = self.module.logit_scale.device
        embedded = self.module.encode_text(self.tokenizer(texts).to(device))
        return embedded.float().unflatten(0, (len(names), len(templates)))

    def preprocess(self, x: Tensor) -> Tensor:
        """Turns the student's images (B, c, h, w) into CLIP's (B, 3, size, size)."""
        if self.renormalize:
            x = self.students.undo(x)
        if x.shape[1] != 3:  # one channel is gray; of two, the third is empty
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else F.pad(x, (0, 0, 0, 0, 0, 1))[:, :3]
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return self.normalization(x) if self.renormalize else x

    def look(self, x: Tensor) -> Tensor:
        """Embeddings (B, D), not normalized, of the student's images."""
        return self.module.encode_image(self.preprocess(x)).to(x.dtype)

    @property
    def scale(self) -> Tensor:
        """The factor, a scalar, from cosines to logits: 100 for OpenAI's weights."""
        return self.module.logit_scale.detach().exp().float()

    @torch.no_grad()
    def logits(self, x: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines (B, C) of the student's images and text embeddings (C, D)."""
        return self.scale * (F.normalize(self(x), dim=-1) @ F.normalize(text, dim=-1).T)


class ImageTower(nn.Module):
    """A copy of a CLIP's image network that can be trained; the CLIP itself stays as it is.

    Raises:
        ValueError: if the model's image network is not a module named `visual`.
    """

    def __init__(self, clip: CLIP):
        super().__init__()
        visual = getattr(clip.module, "visual", None)
        if not isinstance(visual, nn.Module):
            raise ValueError(f"The image network of a {type(clip.module).__name__} cannot be "
                             "trained: it must be a module named 'visual', as in open_clip's "
                             "models.")
        self.clip = clip  # for its preprocessing
        self.visual = copy.deepcopy(visual).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, D), not normalized, of the student's images."""
        return self.visual(self.clip.preprocess(x)).to(x.dtype)


def normalization(hparams: dict[str, Any], input_shape: Sequence[int]
                  ) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, std) of the student's images, each with a number per channel.

    They are hparams["normalization"], where None stands for images in [0, 1]. In a fork, which does
    not pass it, colour images from 64 pixels on have ImageNet's.
    """
    channels, side = input_shape[0], input_shape[-1]
    imagenet = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
    known = hparams.get("normalization", imagenet if channels == 3 and side >= 64 else None)
    return known or ((0.0,) * channels, (1.0,) * channels)


def clip(hparams: dict[str, Any], input_shape: Sequence[int]) -> CLIP:
    """The CLIP that hparams["clip_backbone"] names, or the object in hparams["clip_model"].

    Names are "tiny" (ships with the package), "ViT-B-16" (OpenAI's weights), any
    "model/pretrained" of open_clip, or "model/path/to/checkpoint.pt". An object is a module with
    encode_image, encode_text, logit_scale and tokenizer, and optionally image_size (by default the
    student's), image_mean and image_std (by default 0 and 1: its images are in [0, 1]).

    Raises:
        ValueError: if open_clip knows no such model or weights, or the object lacks a part.
        OSError: if the weights cannot be loaded.
    """
    student_mean, student_std = normalization(hparams, input_shape)
    options = {"student_mean": student_mean, "student_std": student_std,
               "renormalize": hparams.get("clip_renormalize", True)}
    model: Any = hparams.get("clip_model")
    if model is None:
        name = hparams["clip_backbone"]
        return CLIP(*(tiny_clip() if name == "tiny" else _open_clip(name)), **options)
    absent = [name for name in ("encode_image", "encode_text", "logit_scale", "tokenizer")
              if not hasattr(model, name)]
    if absent or not isinstance(model, nn.Module):
        raise ValueError("hparams['clip_model'] takes a torch module with encode_image, "
                         "encode_text, logit_scale and tokenizer; found a "
                         f"{type(model).__name__} without {', '.join(absent) or 'being a module'}. "
                         "A name goes into clip_backbone.")
    tokenizer: Any = model.tokenizer
    return CLIP(model, tokenizer, getattr(model, "image_size", input_shape[-1]),
                getattr(model, "image_mean", (0.0,) * 3), getattr(model, "image_std", (1.0,) * 3),
                weights_loaded=None, **options)


def check_name(name: str) -> tuple[str, str, list[str]]:
    """(model, pretrained, known tags of it) of "model" or "model/pretrained"; loads neither.

    Raises:
        ValueError: if open_clip knows no such model, or no such weights and there is no such file.
    """
    import open_clip

    architecture, _, pretrained = name.partition("/")
    pretrained = pretrained or "openai"
    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(name.replace("/", "-"), known, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"clip_backbone: open_clip knows no model {architecture!r}.{hint} Known "
                         "are, for example, ViT-B-16, ViT-B-32, RN50 (open_clip.list_models()).")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not Path(pretrained).is_file():
        raise ValueError(f"clip_backbone: {architecture} has no weights {pretrained!r}, and no "
                         f"such file exists. Known: {', '.join(tags) or 'none'}.")
    return architecture, pretrained, tags


def _open_clip(name: str) -> tuple[Any, ...]:
    """(model, tokenizer, size, mean, std) of "model" or "model/pretrained"."""
    import open_clip

    architecture, pretrained, tags = check_name(name)
    # OpenAI's networks use another GELU than open_clip's own. The weights' tag says which they use;
    # of files, those in TorchScript are OpenAI's.
    config = open_clip.get_pretrained_cfg(architecture, pretrained) or {}
    torchscript = _is_torchscript(pretrained)
    if (pretrained not in tags and "openai" in tags and not torchscript
            and not architecture.endswith("-quickgelu")):
        warnings.warn(f"clip_backbone: if {pretrained} holds OpenAI's weights, it needs their "
                      f"activation: name {architecture}-quickgelu/{pretrained}.", stacklevel=2)
    try:
        model = open_clip.create_model(
            architecture, pretrained, weights_only=not torchscript,
            force_quick_gelu=torchscript or config.get("quick_gelu", False))
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"clip_backbone: the weights of {name} cannot be loaded ({reason}). On a machine "
            "without a network, pass a file: --hparams "
            f"'{{\"clip_backbone\": \"{architecture}/file.pt\"}}'.") from error
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    size = preprocessing["size"]
    return (model, open_clip.get_tokenizer(architecture),
            size if isinstance(size, int) else size[0],
            preprocessing["mean"], preprocessing["std"])


def _is_torchscript(path: str) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name for name in archive.namelist())


class TinyTokenizer:
    """Turns open_clip's tokens into the tiny CLIP's ids; unknown tokens share one id.

    Args:
        config: the content of assets/tiny_clip.json.
    """

    def __init__(self, config: dict[str, Any]):
        import open_clip

        vocabulary = config["vocabulary"]  # 0: padding, 1: unknown, last: the end
        self.bpe = open_clip.SimpleTokenizer(
            context_length=config["model_cfg"]["text_cfg"]["context_length"])
        self.ids = torch.ones(self.bpe.vocab_size, dtype=torch.long)
        self.ids[0] = 0
        self.ids[[self.bpe.encoder[token] for token in vocabulary[2:]]] = torch.arange(
            2, len(vocabulary))

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Ids (N, context length), int64; texts that are too long are cut."""
        return self.ids[self.bpe(texts)]


def tiny_clip(folder: Path = ASSETS) -> tuple[Any, ...]:
    """(model, tokenizer, size, mean, std) of the CLIP that ships with the package.

    It reads sentences about digits and sees 32 x 32 pixels; see assets/tiny_clip.md.
    """
    import open_clip
    from safetensors.torch import load_file

    config = json.loads((folder / "tiny_clip.json").read_text(encoding="utf-8"))
    model = open_clip.CLIP(**config["model_cfg"])
    model.load_state_dict(load_file(folder / "tiny_clip.safetensors"))
    preprocessing = config["preprocess_cfg"]
    return (model.eval(), TinyTokenizer(config), preprocessing["size"], preprocessing["mean"],
            preprocessing["std"])
