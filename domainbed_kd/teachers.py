"""Teachers: CLIP, and the networks of finished runs. Frozen, with their own preprocessing."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import checkpoints, datasets, networks


def given(hparams: dict, num_classes: int) -> networks.Frozen | None:
    """hparams["teacher"], a finished run's folder or a module x -> logits; None if there is none.

    Raises:
        FileNotFoundError, ValueError: as `from_run`, or if it knows another number of classes.
    """
    teacher = hparams.get("teacher")
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module):
        return networks.Frozen(teacher)
    return from_run(Path(teacher), hparams["dataset"], hparams["test_envs"], num_classes)


def from_run(folder: Path, dataset: str, test_envs: list[int],
             num_classes: int | None = None) -> networks.Frozen:
    """The predictor that a finished run saved, as a teacher.

    Inputs are (B, *input_shape), normalized as the run's data set is; outputs are (B, C) logits.

    Raises:
        FileNotFoundError: if the run has not finished or saved no model.
        ValueError: if it trained on another data set, or on a domain the student is tested on.
    """
    from domainbed_kd import algorithms  # they import this module

    if not (folder / "done").exists():
        raise FileNotFoundError(f"{folder} holds no finished run. Train the teacher there first.")
    if not (folder / "model.pkl").exists():
        raise FileNotFoundError(
            f"{folder} holds no model.pkl. Train the teacher again without --skip_model_save.")
    model = checkpoints.load(folder / "model.pkl")
    args = model["args"]
    if args["dataset"] != dataset:
        raise ValueError(f"The teacher in {folder} trained on {args['dataset']}, the student "
                         f"trains on {dataset}. Name a teacher of the same data set.")
    seen = sorted(set(test_envs) - set(args["test_envs"]))
    if seen:
        raise ValueError(
            f"The teacher in {folder} trained on environments {seen}, on which the student is "
            "tested. Name a teacher that held them out.")
    if num_classes not in (None, model["model_num_classes"]):
        raise ValueError(f"The teacher in {folder} knows {model['model_num_classes']} classes, "
                         f"the student's data set has {num_classes}.")
    context = {"total_steps": 0, "class_names": model.get("class_names")}
    # The run's weights are all loaded below: none need be fetched first.
    hparams = context | model["model_hparams"] | {"weights": "none"}
    algorithm = algorithms.get_algorithm_class(args["algorithm"])(
        model["model_input_shape"], model["model_num_classes"], model["model_num_domains"], hparams)
    algorithm.load_state_dict(model["model_dict"])
    return networks.Frozen(algorithm)


def check_class_names(method: str, hparams: dict, num_classes: int) -> None:
    """Refuses to read text about classes that are not named.

    Raises:
        ValueError: if hparams["class_names"] are missing, or not one for each class.
    """
    names = hparams.get("class_names")
    if not names:
        raise ValueError(f"{method}: the classes have no names. Pass them in label order: "
                         "--hparams '{\"class_names\": [...]}'.")
    if len(names) != num_classes:
        raise ValueError(
            f"{method}: the data set has {num_classes} classes but hparams['class_names'] holds "
            f"{len(names)}: {names}. Pass one for each, in label order.")


class CLIP(networks.Frozen):
    """A frozen CLIP that takes the student's images, and encodes text once.

    Args:
        model: encode_image, encode_text and logit_scale, as open_clip's models have them.
        tokenizer: list of texts -> tokens.
        size: side of its images, in pixels.
        mean, std: of its images, per channel.
        student_mean, student_std: of the student's images, per channel; undone first.
        renormalize: False gives CLIP the student's normalization, as SCMD's and RISE's published
            code does.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable, size: int,
                 mean: Sequence[float], std: Sequence[float],
                 student_mean: Sequence[float], student_std: Sequence[float],
                 renormalize: bool = True):
        super().__init__(model)
        self.tokenizer, self.size = tokenizer, size
        self.mean, self.std = mean, std
        self.student_mean, self.student_std = student_mean, student_std
        self.renormalize = renormalize

    @torch.no_grad()
    def sentences(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Embeddings (C, S, D), not normalized, of S templates filled with C class names."""
        texts = [template.format(name) for name in names for template in templates]
        device = next(self.module.parameters()).device
        embedded = self.module.encode_text(self.tokenizer(texts).to(device))
        return embedded.float().unflatten(0, (len(names), len(templates)))

    def preprocess(self, x: Tensor) -> Tensor:
        """The student's images (B, c, h, w) as CLIP's own (B, 3, size, size)."""
        def per_channel(values):
            return torch.as_tensor(values, dtype=x.dtype, device=x.device).view(1, -1, 1, 1)

        if self.renormalize:
            x = x * per_channel(self.student_std) + per_channel(self.student_mean)
        if x.shape[1] != 3:  # one channel is gray; of two, the third is empty
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else F.pad(x, (0, 0, 0, 0, 0, 1))[:, :3]
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        return (x - per_channel(self.mean)) / per_channel(self.std) if self.renormalize else x

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """Embeddings (B, D), not normalized, of the student's images."""
        return self.module.encode_image(self.preprocess(x)).float()

    def logits(self, x: Tensor, text: Tensor) -> Tensor:
        """Scaled cosines (B, C) of the student's images and text embeddings (C, D)."""
        cosine = F.normalize(self.embed(x), dim=-1) @ F.normalize(text, dim=-1).T
        return self.module.logit_scale.exp().float() * cosine


def clip(hparams: dict, input_shape: Sequence[int]) -> CLIP:
    """The CLIP that hparams["clip_backbone"] names, or the object in hparams["clip_model"].

    Names are "tiny" (ships with the package), "ViT-B-16" (OpenAI's weights), any
    "model/pretrained" of open_clip, or "model/path/to/checkpoint.pt". An object has encode_image,
    encode_text, logit_scale and tokenizer, and optionally image_size, image_mean and image_std.

    Raises:
        ValueError: if open_clip knows no such model or weights.
        OSError: if the weights cannot be fetched.
    """
    channels, height = input_shape[:2]
    imagenet = channels == 3 and height >= 64
    default = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if imagenet else (
        (0.0,) * channels, (1.0,) * channels)
    student_mean, student_std = hparams.get("normalization") or default
    options = {"student_mean": student_mean, "student_std": student_std,
               "renormalize": hparams.get("clip_renormalize", True)}
    model = hparams.get("clip_model")
    if model is not None:
        return CLIP(model, model.tokenizer, getattr(model, "image_size", height),
                    getattr(model, "image_mean", (0.0,) * 3),
                    getattr(model, "image_std", (1.0,) * 3), **options)
    if hparams["clip_backbone"] == "tiny":
        return CLIP(*tiny_clip(), **options)
    return CLIP(*_open_clip(hparams["clip_backbone"]), **options)


def _open_clip(name: str) -> tuple:
    """(model, tokenizer, size, mean, std) of "model" or "model/pretrained"."""
    import open_clip

    architecture, _, pretrained = name.partition("/")
    pretrained = pretrained or "openai"
    if architecture not in open_clip.list_models():
        raise ValueError(f"CLIP: open_clip knows no model {architecture!r}. Known are, for "
                         "example, ViT-B-16, ViT-B-32, RN50 (open_clip.list_models()).")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if pretrained not in tags and not Path(pretrained).exists():
        raise ValueError(f"CLIP: {architecture} has no weights {pretrained!r}, and no such file "
                         f"exists. Known: {', '.join(tags)}.")
    # OpenAI's networks use another GELU than open_clip's own; the weights' tag says which.
    config = open_clip.get_pretrained_cfg(architecture, pretrained) or {}
    try:
        model = open_clip.create_model(
            architecture, pretrained, force_quick_gelu=config.get("quick_gelu", False))
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(
            f"CLIP: the weights of {name} cannot be loaded ({reason}). On a machine without a "
            'network, pass a file: --hparams \'{"clip_backbone": "ViT-B-32/path/file.pt"}\'.'
        ) from error
    preprocessing = open_clip.get_model_preprocess_cfg(model)
    size = preprocessing["size"]
    return (model, open_clip.get_tokenizer(architecture),
            size if isinstance(size, int) else size[0],
            preprocessing["mean"], preprocessing["std"])
