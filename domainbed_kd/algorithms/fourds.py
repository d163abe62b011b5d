"""4Ds: a frozen teacher adapts its feature maps' amplitudes; the student learns their phases.

Tang et al., "Direct Distillation between Different Domains", ECCV 2024,
https://arxiv.org/abs/2401.06826. Architecture, losses and constants from the authors' code.

Phase is taken for what an image means in any domain, amplitude for a domain's style. After each
stage of the teacher an adapter mixes the amplitudes of the map's spectrum with those of a learned
one and keeps the phases. Adapters and student learn in turns from the same images; the teacher's
own weights never change. There are three protocols:

A. as published: the teacher trained on one domain, the student on another one's labelled images,
   and the number to read is `env{i}_out_acc` of that training env. `fourds_protocol` "target" lets
   such a teacher pass; columns of test envs that it has seen mean nothing then. With domains 0 to
   3: `--algorithm ERM --test_envs 1 2 3 --output_dir T`, then `--algorithm 4Ds --test_envs 0 2 3
   --teacher T --hparams '{"fourds_protocol": "target"}'`, and read env1_out_acc.
B. generalization: teacher and student train on the same domains; the test domain is unseen.
C. `--task domain_adaptation`: unlabelled images of the test domains join in. Their cross-entropy
   is with the plain teacher's confident predictions. Without labelled images (`fourds_source`
   false; the authors never show the student the teacher's domain) the two players have next to
   nothing to hold on to but each other, and soon agree on nothing.

B and C are ours. So are these defaults, each with what restores the authors' code: phases are
compared as unit phasors (`fourds_phase` "raw": as angles, of which 0.002 apart may cost 39); the
gate that weighs the phases has mean 1, as it could satisfy its loss by closing otherwise
(`fourds_gate` "published"); the teacher's BatchNorm keeps its statistics (`fourds_teacher_bn`
"adapt"); adapters start to listen to the student over a tenth of the run (`fourds_ramp` 0); Adam
at DomainBed's lr (`fourds_optimizer` "sgd", with their lr 0.01 and weight_decay 5e-4). Networks of
unequal widths, which their code cannot pair, get a 1x1 projection of the student's phases.
"""

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import above, at_least, between, fixed, forked_rng, one_of
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_loss

FLOOR = 1e-5**0.5  # of an amplitude: the authors'
UNKNOWN = -100  # the label of an image without one
OPTIONS = {
    "fourds_protocol": ("generalization", "target"),
    "fourds_phase": ("circular", "raw"),
    "fourds_gate": ("normalized", "detached", "published"),
    "fourds_teacher_bn": ("eval", "adapt"),
    "fourds_optimizer": ("adam", "sgd"),
}


def spectrum(x: Tensor) -> Tensor:
    """2-D discrete Fourier transform of real maps (..., H, W): (..., H, W // 2 + 1, 2).

    Real and imaginary parts of the left half of the plane; the other half is its conjugate.
    Computed in single precision or better.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.view_as_real(torch.fft.rfft2(x))


def amplitude_of(spectrum: Tensor) -> Tensor:
    """The absolute value (..., H, W // 2 + 1) of a spectrum, at least FLOOR."""
    real, imaginary = spectrum.unbind(dim=-1)
    return (real * real + imaginary * imaginary).clamp(min=FLOOR**2).sqrt()


def decompose(x: Tensor, raw: bool = False) -> tuple[Tensor, Tensor]:
    """Phase (..., H, W // 2 + 1, P) and amplitude (..., H, W // 2 + 1) of maps (..., H, W).

    A phase is a cosine and a sine, P = 2. Their squares add up to 1, or to less where an amplitude
    is below FLOOR, so that empty bins have no phase and gradients stay below 1 / FLOOR. With `raw`
    it is the angle in radians, in (-pi, pi], and P = 1.
    """
    parts = spectrum(x)
    amplitude = amplitude_of(parts)
    if not raw:
        return parts / amplitude[..., None], amplitude
    real, imaginary = parts.unbind(dim=-1)
    real = torch.where(real.abs() < 1e-5, 1e-5, real)  # 1e-5: the authors'
    return torch.atan2(imaginary, real)[..., None], amplitude


def compose(phase: Tensor, amplitude: Tensor, width: int) -> Tensor:
    """The real maps (..., H, width) of a phase, in either form, and an amplitude."""
    if phase.shape[-1] == 1:
        spectrum = torch.polar(amplitude, phase[..., 0])
    else:
        spectrum = torch.view_as_complex(phase * amplitude[..., None])
    return torch.fft.irfft2(spectrum, s=(phase.shape[-3], width))


def whole_plane(phase: Tensor, width: int) -> Tensor:
    """The phase (P, ..., H, width) of every bin, from those (..., H, width // 2 + 1, P) of half."""
    phase = phase.movedim(-1, 0)
    # Bin (u, v) is the conjugate of bin (-u, -v), modulo the plane's sides.
    mirrored = phase[..., 1:(width + 1) // 2].flip(-1, -2).roll(1, dims=-2)
    odd = -mirrored[-1:]  # the sine, or the angle
    return torch.cat([phase, torch.cat([mirrored[:-1], odd])], dim=-1)


def fuse(phases: list[Tensor], size: tuple[int, int]) -> Tensor:
    """Planes (P, B, C_l, H_l, W_l), pooled to one size, side by side: (P, B, sum C_l, h, w)."""
    return torch.cat([F.adaptive_avg_pool2d(plane.flatten(0, 1), size).unflatten(
        0, plane.shape[:2]) for plane in phases], dim=2)


def phase_distance(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of two phases (P, B, C, h, w), weighed by a gate (B, C, 1, 1).

    P is 2 for cosines and sines, where it is 2 - 2 cos of the angle between unit phasors, and 1
    for raw angles, where it is in rad^2.
    """
    return (gate * (student - teacher)).square().sum(dim=0).mean()


class FourierAdapter(nn.Module):
    """Mixes a map's amplitudes with those of a learned map, and keeps its phases.

    Args:
        width: channels of the map.
        reduction: by how much the learned map's bottleneck is narrower.
        raw: whether phases are angles.
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
        """Shares (2,) of the learned and of the original amplitude; they add up to 1."""
        return (self.mix / 0.1).softmax(dim=0)  # 0.1: the authors' temperature

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The adapted map (B, C, H, W) and its phase, as `decompose` gives it."""
        phase, amplitude = decompose(x, self.raw)
        share, rest = self.alpha()
        mixed = share * amplitude_of(spectrum(self.restyle(x))) + rest * amplitude
        return compose(phase, mixed, x.shape[-1]).to(x.dtype), phase


class FusionActivation(nn.Module):
    """All stages' phases at the last stage's size, and how much each channel counts.

    Args:
        widths: channels of the teacher's stages.
        student_widths: of the student's; where they differ its phases are projected.
        gate: "published" lets the gate learn freely, "normalized" fixes its mean over the channels
            at 1, "detached" keeps it from learning.
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
        # Only from the cosines: sines, odd over the plane, have mean 0.
        gate = self.excitation(fused[0].mean(dim=(-2, -1)))[..., None, None]
        if self.kind == "detached":
            return gate.detach()
        return gate / gate.mean(dim=1, keepdim=True) if self.kind == "normalized" else gate

    def forward(self, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
        """The `phase_distance` of both networks' phases: planes (P, B, C_l, H_l, W_l)."""
        size = teacher[-1].shape[-2:]
        theirs = fuse(teacher, size)
        ours = fuse(student, size)
        ours = self.projection(ours.flatten(0, 1)).unflatten(0, ours.shape[:2])
        return phase_distance(ours, theirs, self.gate(theirs))


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of the rows whose label is not UNKNOWN; 0 if there are none."""
    loss = F.cross_entropy(logits, y, reduction="sum", ignore_index=UNKNOWN)
    return loss / (y != UNKNOWN).sum().clamp(min=1)


def stage_maps(featurizer: nn.Module, x: Tensor) -> list[Tensor]:
    """What each stage of a featurizer returns for images x."""
    maps = []
    for stage in featurizer.stages():
        x = stage(x)
        maps.append(x)
    return maps


@torch.no_grad()
def stage_widths(featurizer: nn.Module, input_shape, who: str) -> list[int]:
    """Channels of each stage's maps, found by running it in eval mode.

    Raises:
        ValueError: if it has no stages that return maps, naming `who` it is.
    """
    training = featurizer.training
    device = next(featurizer.parameters()).device
    featurizer.eval()
    maps = stage_maps(featurizer, torch.zeros(1, *input_shape, device=device)) if hasattr(
        featurizer, "stages") else []
    featurizer.train(training)
    if not maps or any(m.ndim != 4 for m in maps):
        raise ValueError(f"4Ds: the {who}'s {type(featurizer).__name__} has no convolution stages, "
                         "whose feature maps 4Ds compares. Choose a convolutional network.")
    return [m.shape[1] for m in maps]


def staged(teacher: networks.Frozen, input_shape) -> nn.Sequential:
    """The featurizer and the classifier by which a teacher predicts.

    Raises:
        ValueError: if it does not predict by a featurizer with stages and a classifier.
    """
    module = teacher.module
    device = next((p.device for p in module.parameters()), None)
    x = torch.linspace(-1, 1, 2 * torch.Size(input_shape).numel(), device=device)
    x = x.view(2, *input_shape)
    candidates = [getattr(getattr(module, "average", None), "network", None),
                  getattr(module, "network", module)]
    if hasattr(module, "featurizer") and hasattr(module, "classifier"):
        candidates.append(nn.Sequential(module.featurizer, module.classifier))
    for network in candidates:
        if (isinstance(network, nn.Sequential) and len(network) == 2
                and hasattr(network[0], "stages")
                and torch.allclose(networks.Frozen(network)(x), teacher(x))):
            return network
    raise ValueError(f"4Ds: the teacher, a {type(module).__name__}, does not predict by a "
                     "featurizer with stages and a classifier. Name a run of ERM or the like.")


class FourDs(Taught):
    """Student and adapters of a frozen teacher learn from labels, each other, and phases.

    `predict` is the bare student; `predict_teacher` is the adapted teacher.

    Raises:
        ValueError: if a switch has an unknown value, a network has no convolution stages, or as
            `Taught`.
    """

    needs_image_labels = "its adapters end in one vector per image"
    display_name = "4Ds"
    needs_same_view = "its teacher's adapters learn with every batch"
    takes = Taught.takes | {
        "fourds_temperature": above(0), "fourds_cls": at_least(0), "fourds_div": at_least(0),
        "fourds_beta": at_least(0), "fourds_adapter_lr": at_least(0),
        "fourds_reduction": at_least(1), "fourds_ramp": between(0, 1),
        "fourds_confidence": between(0, 1),
        **{name: one_of(*known) for name, known in OPTIONS.items()}}

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
            **{name: fixed(known[0]) for name, known in OPTIONS.items()},
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        if hparams["fourds_protocol"] == "target":
            hparams = {**hparams, "test_envs": None}  # those that the teacher saw may be among them
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
        """Keeps of a given teacher what predicts; statistics that adapt are our own to save."""
        network, loaded = staged(self.teacher, input_shape), self.teacher
        adapt = self.hparams["fourds_teacher_bn"] == "adapt"
        self.teacher = copy.deepcopy(network) if adapt else networks.Frozen(network)
        self.teacher.weights_loaded = loaded.weights_loaded

    def _teacher_parts(self):
        return getattr(self.teacher, "module", self.teacher)

    def train(self, mode=True):
        """Leaves a teacher that has warmed up as it is, but for BatchNorm that is to adapt."""
        super().train(mode)
        if not self.warm_up_left:
            self.teacher.requires_grad_(False)
            if self.hparams["fourds_teacher_bn"] == "adapt":
                for module in self.teacher.modules():
                    if isinstance(module, nn.modules.batchnorm._BatchNorm):
                        module.train(mode)
        return self

    def load_state_dict(self, state_dict, *args, **kwargs):
        """As nn.Module's; a student that only predicts leaves what trained it."""
        if self.adapters is None:
            own = self.state_dict()
            state_dict = {name: value for name, value in state_dict.items() if name in own}
        return super().load_state_dict(state_dict, *args, **kwargs)

    def update(self, minibatches, unlabeled=None):
        """One step of adapters and student, on the unlabelled images too where there are any."""
        if self.warm_up_left or not unlabeled:
            return super().update(minibatches)
        unlabeled = torch.cat(unlabeled)
        guesses = self.pseudo_labels(unlabeled)
        batches = [*minibatches] if self.hparams["fourds_source"] else []
        x, y = (torch.cat(part) for part in zip(*batches, (unlabeled, guesses)))
        share = (guesses != UNKNOWN).float().mean()
        return self.distill(x, y) | {"pseudo_labels": share}

    @torch.no_grad()
    def pseudo_labels(self, x):
        """The plain teacher's classes (B,) for images, UNKNOWN where it is not confident."""
        self.teacher.eval()
        confidence, y = self.teacher_logits(x).softmax(dim=1).max(dim=1)
        self.train(self.training)
        return y.where(confidence > self.hparams["fourds_confidence"], UNKNOWN)

    def distill(self, x, y):
        """One step of the adapters, then one of the student from what they gave before it.

        Images whose label is UNKNOWN take no part in cross-entropy.
        """
        cls, div, beta, temperature = (
            self.hparams[f"fourds_{name}"] for name in ("cls", "div", "beta", "temperature"))
        maps = stage_maps(self.featurizer, x)
        logits = self.classifier(self.featurizer.pool(maps[-1]))
        adapted, phases = self._adapted(x)

        terms = {"teacher_classify": cross_entropy(adapted, y)}
        loss = cls * terms["teacher_classify"]
        if div:
            terms["teacher_distill"] = kd_loss(adapted, logits.detach(), temperature)
            loss = loss + div * self._ramp() * terms["teacher_distill"]
        self.adapter_optimizer.zero_grad()
        loss.backward()
        self.adapter_optimizer.step()
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
        """How much of its weight the student's pull on the adapters has by now, in (0, 1]."""
        return min(1.0, (self.update_count.item() + 1)
                   / max(1.0, self.hparams["fourds_ramp"] * self.steps))

    def _adapted(self, x):
        """The adapted teacher's logits (B, C), and its maps' whole phases without gradients."""
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
