"""4Ds: a frozen teacher adapts its feature maps' amplitudes; the student learns their phases.

Tang et al., "Direct Distillation between Different Domains", ECCV 2024,
https://arxiv.org/abs/2401.06826. Architecture, losses and constants from the authors' code.

Phase stands for what an image means in any domain, amplitude for a domain's style. After each stage
of the teacher an adapter mixes the amplitudes of the map's spectrum with those of a learned map and
keeps the phases. Adapters and student learn in turns from the same images; the teacher's own
weights never change. docs/methods/fourds.md describes the three protocols.

Departures, each with the hparam that undoes it: phases are compared as unit phasors, not angles
(`fourds_phase`); the gate that weighs them has mean 1 (`fourds_gate`); the teacher's BatchNorm
keeps its statistics (`fourds_teacher_bn`); the adapters' loss from the student sets in over a tenth
of the run (`fourds_ramp`); Adam at DomainBed's lr (`fourds_optimizer`). Networks of unequal widths,
which their code cannot pair, get a 1x1 projection of the student's phases.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks, teachers
from domainbed_kd.algorithms.base import above, at_least, between, fixed, forked_rng, one_of
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_loss

FLOOR = 1e-5**0.5  # least amplitude: the authors'
UNKNOWN = -100  # label of an image without one
OPTIONS = {
    "fourds_protocol": ("generalization", "target"),
    "fourds_phase": ("circular", "raw"),
    "fourds_gate": ("normalized", "detached", "published"),
    "fourds_teacher_bn": ("eval", "adapt"),
    "fourds_optimizer": ("adam", "sgd"),
}


def spectrum(x: Tensor) -> Tensor:
    """2-D discrete Fourier transform of real maps (..., H, W): (..., H, W // 2 + 1, 2).

    Its left half as real and imaginary parts, in single precision or better; the other half is the
    conjugate of this one.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_real(torch.fft.rfft2(x))


def amplitude_of(spectrum: Tensor) -> Tensor:
    """The absolute value (..., H, W // 2 + 1) of a spectrum, at least FLOOR."""
    real, imaginary = spectrum.unbind(dim=-1)
    return (real * real + imaginary * imaginary).clamp(min=FLOOR**2).sqrt()


def decompose(x: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
    """Phase (..., H, W // 2 + 1, P) and amplitude (..., H, W // 2 + 1) of maps (..., H, W).

    A phase is a cosine and a sine, P = 2. Their squares add up to 1, or to less where the amplitude
    is below FLOOR, so empty bins have no phase and gradients stay below 1 / FLOOR. With `raw` a
    phase is the angle in radians, in (-pi, pi], and P = 1.
    """
    parts = spectrum(x)
    amplitude = amplitude_of(parts)
    if not raw:
        return parts / amplitude[..., None], amplitude
    real, imaginary = parts.unbind(dim=-1)
    real = torch.where(real.abs() < 1e-5, 1e-5, real)  # 1e-5: the authors'
    return torch.atan2(imaginary, real)[..., None], amplitude


def compose(phase: Tensor, amplitude: Tensor, width: int) -> Tensor:
    """The real maps (..., H, width) with these phases, in either form, and amplitudes."""
    if phase.shape[-1] == 1:
        spectrum = torch.polar(amplitude, phase[..., 0])
    else:
        spectrum = torch.view_as_complex(phase * amplitude[..., None])
    return torch.fft.irfft2(spectrum, s=(phase.shape[-3], width))


def whole_plane(phase: Tensor, width: int) -> Tensor:
    """The phases (P, ..., H, width) of all bins, from the left half (..., H, width // 2 + 1, P)."""
    phase = phase.movedim(-1, 0)
    # Bin (u, v) is the conjugate of bin (-u, -v), modulo the plane's size.
    mirrored = phase[..., 1:(width + 1) // 2].flip(-1, -2).roll(1, dims=-2)
    odd = -mirrored[-1:]  # the sine, or the angle
    return torch.cat([phase, torch.cat([mirrored[:-1], odd])], dim=-1)


def fuse(phases: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Planes (P, B, C_l, H_l, W_l), pooled to one size, side by side: (P, B, sum C_l, h, w)."""
    return torch.cat([F.adaptive_avg_pool2d(plane.flatten(0, 1), size).unflatten(
        0, plane.shape[:2]) for plane in phases], dim=2)


def phase_distance(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of two phases (P, B, C, h, w), weighed by a gate (B, C, 1, 1).

    For raw angles it is in rad^2; for unit phasors it is 2 - 2 cos of the angle between them.
    """
    return (gate * (student - teacher)).square().sum(dim=0).mean()


class FourierAdapter(nn.Module):
    """Mixes the amplitudes of a map of `width` channels with a learned map's; keeps its phases.

    The learned map's bottleneck is narrower by the factor `reduction`. `raw`: see `decompose`.
    """

    def __init__(self, width: int, reduction: int = 4, raw: bool = False):
        super().__init__()
        hidden = max(1, width // reduction)
        self.restyle = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))
        self.mix = nn.Parameter(torch.zeros(2))
        self.raw = raw

    def alpha(self) -> Tensor:
        """Shares (2,) of the learned and of the original amplitude, with sum 1."""
        return (self.mix / 0.1).softmax(dim=0)  # 0.1: the authors' temperature

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adapted map (B, C, H, W) and its phase in the form of `decompose`."""
        phase, amplitude = decompose(x, self.raw)
        share, rest = self.alpha()
        mixed = share * amplitude_of(spectrum(self.restyle(x))) + rest * amplitude
        return compose(phase, mixed, x.shape[-1]).to(x.dtype), phase


class FusionActivation(nn.Module):
    """The distance of all stages' phases at the last stage's size, with a weight per channel.

    The student's phases are projected where its stages have other widths. The gate, of the weights,
    learns freely if "published", has mean 1 if "normalized", and does not learn if "detached".
    """

    def __init__(self, widths: list[int], student_widths: list[int], gate: str = "normalized"):
        super().__init__()
        width = sum(widths)
        self.projection = nn.Identity()
        if widths != student_widths:
            self.projection = nn.Conv2d(sum(student_widths), width, 1, bias=False)
        hidden = max(1, width // 16)  # 16: the authors' reduction
        self.excitation = nn.Sequential(
            nn.Linear(width, hidden, bias=False), nn.ReLU(),
            nn.Linear(hidden, width, bias=False), nn.Sigmoid())
        self.kind = gate

    def gate(self, fused: Tensor) -> Tensor:
        """Weights (B, C, 1, 1) of the channels, from the teacher's fused phases."""
        # From the cosines alone: sines are odd over the plane, so their mean is 0.
        gate = self.excitation(fused[0].mean(dim=(-2, -1)))[..., None, None]
        if self.kind == "detached":
            return gate.detach()
        return gate / gate.mean(dim=1, keepdim=True) if self.kind == "normalized" else gate

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The `phase_distance` of two networks' phases, planes (P, B, C_l, H_l, W_l)."""
        size = teacher[-1].shape[-2:]
        theirs, ours = fuse(teacher, size), fuse(student, size)
        ours = self.projection(ours.flatten(0, 1)).unflatten(0, ours.shape[:2])
        return phase_distance(ours, theirs, self.gate(theirs))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the rows whose label is not UNKNOWN; 0 if there are none."""
    loss = F.cross_entropy(logits, y, reduction="sum", ignore_index=UNKNOWN)
    return loss / (y != UNKNOWN).sum().clamp(min=1)


@torch.no_grad()
def stage_widths(featurizer: nn.Module, input_shape, who: str) -> list[int]:
    """Channels of each stage's maps, found by running the featurizer, left in eval mode.

    Raises:
        ValueError: if it has no stages that return maps, naming `who` it is.
    """
    x = torch.zeros(1, *input_shape, device=next(featurizer.parameters()).device)
    featurizer.eval()  # which returns None in many forks
    maps = networks.Staged.maps(featurizer, x) if hasattr(featurizer, "stages") else []
    if not maps or any(m.ndim != 4 for m in maps):
        raise ValueError(f"4Ds: the {who}'s {type(featurizer).__name__} has no convolution stages, "
                         "whose feature maps 4Ds compares. Choose a convolutional network.")
    return [m.shape[1] for m in maps]


class FourDs(Taught):
    """Student and adapters of a frozen teacher learn from labels, each other, and phases.

    `predict` is the student alone; `predict_teacher` is the adapted teacher.

    Raises:
        ValueError: as `Taught` does, or if a network has no convolution stages.
    """

    needs_image_labels = "its adapters end in one vector per image"
    display_name = "4Ds"
    needs_same_view = "its teacher's adapters learn with every batch"
    taught_by_target = {"fourds_protocol": "target"}
    takes = Taught.takes | {
        **{f"fourds_{name}": at_least(0) for name in ("cls", "div", "beta", "adapter_lr")},
        **{f"fourds_{share}": between(0, 1) for share in ("ramp", "confidence")},
        **{name: one_of(*known) for name, known in OPTIONS.items()},
        "fourds_temperature": above(0), "fourds_reduction": at_least(1)}

    @staticmethod
    def search_space(dataset):
        """The authors' constants and ranges around them, and switches for what they did."""
        return Taught.search_space(dataset) | {
            "fourds_temperature": (4.0, lambda r: r.uniform(2, 6)),
            "fourds_cls": fixed(1.0),
            "fourds_div": (1.0, lambda r: 10 ** r.uniform(-0.5, 0.5)),
            "fourds_beta": (0.1, lambda r: 10 ** r.uniform(-2, 0)),
            "fourds_adapter_lr": (1e-3, lambda r: 10 ** r.uniform(-4, -2.5)),
            "fourds_reduction": (4, lambda r: int(r.choice([2, 4, 8]))),
            "fourds_ramp": fixed(0.1),  # share of the student's steps
            "fourds_source": fixed(True),
            "fourds_confidence": fixed(0.9),  # of a pseudo-label; 1: there are none
            **{name: fixed(known[0]) for name, known in OPTIONS.items()}}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates()
        self.steps = max(1, self.total_steps - int(self.warm_up_left))
        given = isinstance(self.teacher, networks.Frozen)
        self.adapters = None
        if given and isinstance(self.teacher.module, nn.Identity):
            return  # teachers.from_run's stand-in: this student only predicts
        student_widths = stage_widths(self.featurizer, input_shape, "student")
        if given:
            self._take_apart(input_shape)
        teacher_widths = stage_widths(self._teacher_parts()[0], input_shape, "teacher")
        raw = hparams["fourds_phase"] == "raw"
        with forked_rng():
            self.adapters = nn.ModuleList(
                FourierAdapter(width, hparams["fourds_reduction"], raw) for width in teacher_widths)
            self.fusion = FusionActivation(teacher_widths, student_widths, hparams["fourds_gate"])
        if hparams["fourds_optimizer"] == "sgd":
            self.optimizer = self.sgd(self.network)
        self.optimizer.add_param_group({"params": self.fusion.parameters()})
        self.adapter_optimizer = torch.optim.AdamW(
            self.adapters.parameters(), hparams["fourds_adapter_lr"], eps=1e-4, weight_decay=0.01)
        self.adapter_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.adapter_optimizer, self.steps)
        self.train()

    def _take_apart(self, input_shape):
        """Keeps a given teacher's featurizer and classifier; a copy if its statistics adapt."""
        given = self.teacher
        with forked_rng():
            network = teachers.layers_of(given, input_shape)
        if network is None or len(network) != 2 or not hasattr(network[0], "stages"):
            raise ValueError(f"4Ds: the teacher, a {type(given.module).__name__}, does not predict "
                             "by a featurizer with stages and a classifier. Name a run of ERM.")
        adapt = self.hparams["fourds_teacher_bn"] == "adapt"
        self.teacher = copy.deepcopy(network) if adapt else networks.Frozen(network)
        self.teacher.weights_loaded = given.weights_loaded

    def _teacher_parts(self):
        return getattr(self.teacher, "module", self.teacher)

    def train(self, mode=True):
        """Leaves a teacher that has warmed up in eval mode, except BatchNorm that adapts."""
        super().train(mode)
        if not self.warm_up_left:
            self.teacher.requires_grad_(False)
            if self.hparams["fourds_teacher_bn"] == "adapt":
                for module in self.teacher.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train(mode)
        return self

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As nn.Module's; a student that only predicts ignores the state that trained it."""
        if self.adapters is None:
            own = self.state_dict()
            state_dict = {name: value for name, value in state_dict.items() if name in own}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def update(self, minibatches, unlabeled=None):
        """One step of the adapters and of the student, also on unlabelled images if given."""
        if self.warm_up_left or not unlabeled:
            return super().update(minibatches)
        unlabeled = torch.cat(unlabeled)
        guesses = self.pseudo_labels(unlabeled)
        batches = [*minibatches] if self.hparams["fourds_source"] else []
        x, y = (torch.cat(part) for part in zip(*batches, (unlabeled, guesses)))
        return self.distill(x, y) | {"pseudo_labels": (guesses != UNKNOWN).float().mean()}

    @torch.no_grad()
    def pseudo_labels(self, x):
        """The plain teacher's classes (B,) for images, UNKNOWN where it is not confident."""
        self.teacher.eval()
        confidence, y = self.teacher_logits(x).softmax(dim=1).max(dim=1)
        self.train(self.training)
        return y.where(confidence > self.hparams["fourds_confidence"], UNKNOWN)

    def distill(self, x, y):
        """One step of the adapters, then one of the student on their outputs from before it.

        Images whose label is UNKNOWN are left out of cross-entropy.
        """
        cls, div, beta, temperature = (
            self.hparams[f"fourds_{name}"] for name in ("cls", "div", "beta", "temperature"))
        maps = networks.Staged.maps(self.featurizer, x)
        logits = self.classifier(self.featurizer.pool(maps[-1]))
        adapted, phases = self._adapted(x)

        terms = {"teacher_classify": cross_entropy(adapted, y)}
        loss = cls * terms["teacher_classify"]
        if div:
            terms["teacher_distill"] = kd_loss(adapted, logits.detach(), temperature)
            loss = loss + div * self._ramp() * terms["teacher_distill"]
        self.step(loss, self.adapter_optimizer)
        self.adapter_scheduler.step()
        self.update_count += 1

        terms["classify"] = cross_entropy(logits, y)
        loss = cls * terms["classify"]
        if div:
            terms["distill"] = kd_loss(logits, adapted.detach(), temperature)
            loss = loss + div * terms["distill"]
        if beta:
            raw = self.hparams["fourds_phase"] == "raw"
            terms["phase"] = self.fusion(
                [whole_plane(decompose(m, raw)[0], m.shape[-1]) for m in maps], phases)
            loss = loss + beta * terms["phase"]
        alpha = torch.stack([adapter.alpha()[0] for adapter in self.adapters]).mean()
        return self.descend(loss, **terms, alpha=alpha)

    def _ramp(self) -> float:
        """The share, in (0, 1], of its weight that the adapters' loss from the student has."""
        return min(1.0, (self.update_count.item() + 1)
                   / max(1.0, self.hparams["fourds_ramp"] * self.steps))

    def _adapted(self, x):
        """The adapted teacher's logits (B, C), and its maps' phases without gradients."""
        featurizer, classifier = self._teacher_parts()
        phases = []
        for stage, adapter in zip(featurizer.stages(), self.adapters):
            x, phase = adapter(stage(x))
            phases.append(whole_plane(phase.detach(), x.shape[-1]))
        return classifier(featurizer.pool(x)), phases

    @torch.no_grad()
    def predict_teacher(self, x):
        """Logits (B, C) of the adapted teacher."""
        return self._adapted(x)[0]
