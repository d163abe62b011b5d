"""Teachers: CLIP, and the networks of finished runs. Frozen, with their own preprocessing."""

import copy
import difflib
import json
import pickle
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import averaging, checkpoints, console, datasets, networks, tasks
from domainbed_kd.datasets import images
from domainbed_kd.folder import composition, files
from domainbed_kd.folder.args import are_args

ASSETS = Path(__file__).parent / "assets"


def given(hparams: dict, num_classes: int,
          input_shape: Sequence[int] | None = None) -> networks.Frozen | None:
    """hparams["teacher"], a finished run's folder or a module x -> logits; None if there is none.

    Raises:
        FileNotFoundError, ValueError: as `from_run`.
    """
    teacher = hparams.get("teacher")
    if teacher is None:
        return None
    if isinstance(teacher, nn.Module):
        return networks.Frozen(teacher)
    if wanted := composition.teacher_of_method(hparams):
        raise ValueError(_NOT_TRAINED.format(wanted.shown))
    return _of_same_view(teacher, hparams, num_classes, input_shape)


def _of_same_view(folder: str | Path, hparams: dict, num_classes: int,
                  input_shape: Sequence[int] | None) -> networks.Frozen:
    """As `from_run`, for a student with these hparams, whose images must be normalized alike."""
    teacher = from_run(Path(folder), hparams.get("dataset"), hparams.get("test_envs"), num_classes,
                       input_shape)
    own = hparams.get("view_statistics", "imagenet")
    if teacher.statistics != own:
        raise ValueError(f"The teacher in {folder} takes images with view_statistics "
                         f"{teacher.statistics!r}, and the student's have {own!r}. Train both with "
                         "the same.")
    return teacher


_NOT_TRAINED = ("The teacher {} is a run that a sweep trains first. Launch this by `sweep launch`, "
                "or name its folder: --teacher FOLDER.")


def in_two(teacher: composition.Teacher, hparams: dict, num_classes: int,
           input_shape: Sequence[int], folders: Iterator[str | nn.Module], needs_features: bool
           ) -> tuple[networks.Frozen, networks.Frozen]:
    """A teacher as what it sees in images, (B, D), and a head that makes logits (B, C) of it.

    Args:
        teacher: which.
        hparams: the student's, and what it knows of its data.
        num_classes: of the student.
        input_shape: of its images.
        folders: those of the runs among the teachers, in order, or in Python modules
            x -> logits; this one's is taken off.
        needs_features: of a run, see its features; it may else see logits.

    Raises:
        ValueError, FileNotFoundError: as `from_run` and `clip`, or if a run has no features.
    """
    if teacher.kind == "clip":
        check_class_names(f"The teacher {teacher.shown}", hparams, num_classes)
        name = teacher.name or datasets.facts(hparams.get("dataset")).CLIP_BACKBONE or "ViT-B-16"
        known = hparams if teacher.name is None else hparams | {"clip_model": None}
        eye = clip(known | {"clip_backbone": name}, input_shape)
        template = hparams.get("teacher_template", "a photo of a {}")
        text = eye.sentences([template], hparams["class_names"])[:, 0]
        return eye, networks.Frozen(networks.CosineClassifier(text, eye.scale))
    folder = teacher.name if teacher.kind == "folder" else next(folders, None)
    if folder is None:
        raise ValueError(_NOT_TRAINED.format(teacher.shown))
    run = (networks.Frozen(folder) if isinstance(folder, nn.Module)
           else _of_same_view(folder, hparams, num_classes, input_shape))
    if not needs_features:
        return run, networks.Frozen(nn.Identity())
    return _features_and_head(run, folder, input_shape)


@torch.no_grad()
def _features_and_head(run: networks.Frozen, folder: str, input_shape: Sequence[int]
                       ) -> tuple[networks.Frozen, networks.Frozen]:
    """The two parts of a run's predictor, if it is the last layer of a sequence on all others."""
    x = torch.rand(2, *input_shape)
    for owner in (getattr(run.module, "average", None), run.module):
        network = getattr(owner, "network", None)
        if isinstance(network, nn.Sequential) and len(network) > 1:
            eye, head = networks.Frozen(network[:-1]), networks.Frozen(network[-1])
            if torch.equal(head(eye(x)), run(x)):
                eye.weights_loaded = 1.0
                return eye, head
    raise ValueError(f"The teacher in {folder} has no features of which its predictions are a "
                     'head. Copy its logits: "distill": "logit".')


def from_run(folder: Path, dataset: str | None, test_envs: list[int] | None,
             num_classes: int | None = None,
             input_shape: Sequence[int] | None = None) -> networks.Frozen:
    """The predictor that a finished run saved, ours or DomainBed's, as a teacher.

    Inputs are (B, *input_shape), normalized as the run's dataset is; outputs are (B, C) logits.
    What is None, because a fork does not tell, is not compared.

    Raises:
        FileNotFoundError: if the run has not finished or saved no model.
        ValueError: if it trained on another dataset, on a domain the student is tested on, on
            images of another shape or on other classes, or if its weights do not all fit.
    """
    from domainbed_kd import algorithms

    if not files.is_done(folder):
        raise FileNotFoundError(f"{folder} holds no finished run. Train the teacher there first.")
    if not (folder / files.MODEL).exists():
        raise FileNotFoundError(
            f"{folder} holds no model.pkl. Train the teacher again without --skip_model_save.")
    model = checkpoints.load(folder / files.MODEL)
    if problem := _what_is_not_a_models(model):
        raise ValueError(f"{folder / files.MODEL} is not the model of a run: {problem}. Name the "
                         "folder of a run of train.")
    args = model["args"]
    if dataset not in (None, args["dataset"]):
        raise ValueError(f"The teacher in {folder} trained on {args['dataset']}, the student "
                         f"trains on {dataset}. Name a teacher of the same dataset.")
    seen = sorted(set(test_envs or ()) - set(args["test_envs"]))
    if seen:
        raise ValueError(
            f"The teacher in {folder} trained on environments {seen}, on which the student is "
            "tested. Name a teacher that held them out.")
    if num_classes not in (None, model["model_num_classes"]):
        raise ValueError(f"The teacher in {folder} knows {model['model_num_classes']} classes, "
                         f"the student's dataset has {num_classes}. Name another teacher.")
    if input_shape is not None and tuple(input_shape) != tuple(model["model_input_shape"]):
        raise ValueError(
            f"The teacher in {folder} takes images of shape {tuple(model['model_input_shape'])}, "
            f"the student's are {tuple(input_shape)}. Train both at the same size.")
    task = datasets.facts(args["dataset"]).TASK
    context = {"total_steps": 0, "class_names": model.get("class_names"), "task": task.name}
    if dataset is not None:
        context["normalization"] = datasets.get_dataset_class(dataset).NORMALIZATION and (
            images.statistics(model["model_hparams"]))
    # The run's weights are all loaded below: none need be fetched first.
    hparams = context | console.renamed(model["model_hparams"]) | {"weights": "none"}
    if "teacher" in args:
        hparams["teacher"] = nn.Identity()  # it is not in the state dict, nor needed to predict
    cls = averaging.averaged(
        algorithms.get_algorithm_class(args["algorithm"]), hparams.get("averaging"))
    algorithm = cls(model["model_input_shape"], model["model_num_classes"],
                    model["model_num_domains"], hparams)
    try:
        algorithm.load_state_dict({name: value for name, value in model["model_dict"].items()
                                   if not name.startswith(composition.STATE)})
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"The teacher in {folder} does not load into {args['algorithm']}: "
                         f"{reason}") from None
    teacher = networks.Frozen(algorithm)
    teacher.weights_loaded = 1.0
    teacher.held_out = args["test_envs"]
    teacher.statistics = hparams.get("view_statistics", "imagenet")
    return teacher


def _what_is_not_a_models(model) -> str | None:
    """What tells that a checkpoint is not the model of a run, in words; None if nothing does."""
    if not isinstance(model, dict):
        return f"it holds a {type(model).__name__}"
    kinds = {"args": dict, "model_dict": dict, "model_hparams": dict,
             "model_input_shape": (tuple, list), "model_num_classes": int,
             "model_num_domains": int}
    if absent := sorted(kinds.keys() - model.keys()):
        return f"it lacks {', '.join(absent)}"
    for name, kind in kinds.items():
        if not isinstance(model[name], kind):
            return f"its {name} is a {type(model[name]).__name__}"
    if not are_args(model["args"]):
        return "its args do not tell what the run trained"
    return None


def audit(algorithm: nn.Module, batches: Iterable[tuple[Tensor, Tensor]],
          allow_bad: bool = False) -> dict | None:
    """What an algorithm's teacher is worth to it, before the first step.

    Args:
        algorithm: one with `teacher_logits`, and `teacher`.
        batches: (x, y) of the training domains' validation images, not augmented, on the
            algorithm's device.
        allow_bad: report a bad teacher's problem instead of raising it.

    Returns:
        `accuracy` and `chance`, in [0, 1], of maps the mean over classes; `n_images`;
        `weights_loaded`, a share, None for an object that was passed in; `preprocessing` and
        `problem`, in words, the latter None where there is none. None altogether without a
        teacher, or while it warms up.

    Raises:
        ValueError: if the teacher is near chance, or its classes are in another order.
    """
    if not algorithm.teacher_is_ready():
        return None
    confusion, n_images = 0, 0
    for x, y in batches:
        logits = algorithm.teacher_logits(x)
        n_images += len(y)
        confusion += tasks.confusion(tasks.at_size_of(logits, y), y).cpu()
    if y.dim() > 1:  # pixels: as many as there are images, and of each class that occurs the same
        of_label = confusion.sum(dim=1, keepdim=True)
        confusion = n_images / (of_label > 0).sum() * confusion / of_label.clamp(min=1)
    problem = audit_confusion(confusion)
    if problem and not allow_bad:
        raise ValueError(f"The teacher {problem} Choose another, or pass --allow_bad_teacher.")
    teacher = algorithm.teacher
    return {
        "accuracy": confusion.trace().item() / n_images, "chance": 1 / len(confusion),
        "n_images": n_images, "weights_loaded": getattr(teacher, "weights_loaded", None),
        "preprocessing": getattr(teacher, "preprocessing", "the student's"), "problem": problem}


def audit_confusion(confusion: Tensor) -> str | None:
    """What is wrong with a teacher, by its counts (C labels, C guesses); None if nothing is.

    Classes count as being in another order if each label's most frequent guess is another's own,
    and reading the guesses so adds more than 0.2 to the accuracy. Chance is 1 / C; a teacher is
    near it if less than 3 standard errors of a guesser's accuracy above, but never if it is more
    than halfway from chance to 1. Of images so few that 3 standard errors lead beyond 1, nothing
    is concluded.
    """
    n_classes, n_images = len(confusion), confusion.sum().item()
    chance = 1 / n_classes
    bound = chance + 3 * (chance * (1 - chance) / n_images) ** 0.5
    if bound > 1:
        return None
    bound = min(bound, (1 + chance) / 2)
    accuracy = confusion.trace().item() / n_images
    labels = confusion.sum(dim=1).nonzero().flatten()
    count, guess = confusion[labels].max(dim=1)
    gain = count.sum().item() / n_images - accuracy
    if len(guess.unique()) == len(guess) and gain > 0.2:
        order = ", ".join(f"{g} for {y}" for y, g in zip(labels.tolist(), guess.tolist())
                          if g != y)
        return (f"has its classes in another order: it says {order}. In the labels' order it "
                f"would be right on {accuracy + gain:.0%} of the training domains' validation "
                f"images, not {accuracy:.0%}.")
    if accuracy < bound:
        return (f"is near chance: right on {accuracy:.1%} of {n_images} validation images of the "
                f"training domains, where guessing gives {chance:.1%} and {bound:.1%} is asked "
                "for.")
    return None


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
            f"{method}: the dataset has {num_classes} classes but hparams['class_names'] holds "
            f"{len(names)}: {names}. Pass one for each, in label order.")


class CLIP(networks.Frozen):
    """A frozen CLIP that takes the student's images, and encodes text once.

    Args:
        model: encode_image, encode_text and logit_scale (a tensor, the scale's logarithm), as
            open_clip's models have them.
        tokenizer: list of texts -> tokens.
        size: side of its images, in pixels.
        mean, std: of its images, per channel.
        student_mean, student_std: of the student's images, per channel; undone first.
        renormalize: False gives CLIP the student's normalization, as SCMD's and RISE's published
            code does.
        weights_loaded: the share of its weights that came from a file, if that is known.
    """

    def __init__(self, model: nn.Module, tokenizer: Callable, size: int,
                 mean: Sequence[float], std: Sequence[float],
                 student_mean: Sequence[float], student_std: Sequence[float],
                 renormalize: bool = True, weights_loaded: float | None = 1.0):
        super().__init__(model)
        self.tokenizer, self.size = tokenizer, size
        self.mean, self.std = mean, std
        self.student_mean, self.student_std = student_mean, student_std
        self.renormalize = renormalize
        self.weights_loaded = weights_loaded

    @property
    def preprocessing(self) -> str:
        """What is done to the student's images, in words."""
        size = f"3 channels, {self.size} x {self.size} pixels"
        if not self.renormalize:
            return f"{size}, normalization as the student's"
        return (f"mean {self.student_mean} and std {self.student_std} undone; {size}; mean "
                f"{self.mean}, std {self.std}")

    @torch.no_grad()
    def sentences(self, templates: Sequence[str], names: Sequence[str]) -> Tensor:
        """Embeddings (C, S, D), not normalized, of S templates filled with C class names."""
        texts = [template.format(name) for name in names for template in templates]
        device = self.module.logit_scale.device
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

    def look(self, x: Tensor) -> Tensor:
        """Embeddings (B, D), not normalized, of the student's images."""
        return self.module.encode_image(self.preprocess(x)).to(x.dtype)

    @property
    def scale(self) -> Tensor:
        """What cosines are multiplied by to be its logits, a scalar: 100 for OpenAI's weights."""
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
                             "trained: it takes a CLIP whose image network is its attribute "
                             "'visual', as open_clip's have it.")
        self.clip = clip  # for its preprocessing
        self.visual = copy.deepcopy(visual).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Embeddings (B, D), not normalized, of the student's images."""
        return self.visual(self.clip.preprocess(x)).to(x.dtype)


def normalization(hparams: dict, input_shape: Sequence[int]) -> tuple:
    """(mean, std) of the student's images, a number per channel each.

    They are hparams["normalization"], where None stands for images in [0, 1]. Where a fork does
    not tell, colour images from 64 pixels on have ImageNet's.
    """
    channels, side = input_shape[0], input_shape[-1]
    imagenet = datasets.IMAGENET_MEAN, datasets.IMAGENET_STD
    known = hparams.get("normalization", imagenet if channels == 3 and side >= 64 else None)
    return known or ((0.0,) * channels, (1.0,) * channels)


def clip(hparams: dict, input_shape: Sequence[int]) -> CLIP:
    """The CLIP that hparams["clip_backbone"] names, or the object in hparams["clip_model"].

    Names are "tiny" (ships with the package), "ViT-B-16" (OpenAI's weights), any
    "model/pretrained" of open_clip, or "model/path/to/checkpoint.pt". An object is a module with
    encode_image, encode_text, logit_scale and tokenizer, and optionally image_size (the
    student's), image_mean and image_std (its images are in [0, 1]).

    The student's images are normalized as `normalization` says.

    Raises:
        ValueError: if open_clip knows no such model or weights, or the object lacks a part.
        OSError: if the weights cannot be fetched.
    """
    student_mean, student_std = normalization(hparams, input_shape)
    options = {"student_mean": student_mean, "student_std": student_std,
               "renormalize": hparams.get("clip_renormalize", True)}
    model = hparams.get("clip_model")
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
    return CLIP(model, model.tokenizer, getattr(model, "image_size", input_shape[-1]),
                getattr(model, "image_mean", (0.0,) * 3), getattr(model, "image_std", (1.0,) * 3),
                weights_loaded=None, **options)


def _open_clip(name: str) -> tuple:
    """(model, tokenizer, size, mean, std) of "model" or "model/pretrained"."""
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
    # OpenAI's networks use another GELU than open_clip's own; the weights' tag says which, and of
    # a file that OpenAI alone publishes TorchScript.
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
    """open_clip's tokens by the tiny CLIP's own ids; what is not in its vocabulary is one token.

    Args:
        config: the content of assets/tiny_clip.json.
    """

    def __init__(self, config: dict):
        import open_clip

        vocabulary = config["vocabulary"]  # 0: padding, 1: unknown, last: the end
        self.bpe = open_clip.SimpleTokenizer(
            context_length=config["model_cfg"]["text_cfg"]["context_length"])
        self.ids = torch.ones(self.bpe.vocab_size, dtype=torch.long)
        self.ids[0] = 0
        self.ids[[self.bpe.encoder[token] for token in vocabulary[2:]]] = torch.arange(
            2, len(vocabulary))

    def __call__(self, texts: str | list[str]) -> Tensor:
        """Ids (N, context length), int64; a text that is too long loses its end."""
        return self.ids[self.bpe(texts)]


def tiny_clip(folder: Path = ASSETS) -> tuple:
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
