"""MosaicKD: distillation on generated images with realistic patches that the teacher recognises.

Fang et al., "Mosaicking to Distill: Knowledge Distillation from Out-of-Domain Data", NeurIPS
2021, https://arxiv.org/abs/2110.15094. Losses, architectures and constants from the authors' code
(kd_mosaic.py and its engine), weights from their README's command (local, align, adversarial 1,
balance 10), not from their argument parser, whose defaults do not give the published table.

Two roles. In "dg" (ours) the teacher knows the training domains, and unlabeled images, or without
any the minibatches, are the out-of-domain data. In "ood" (the paper's) the teacher was trained on
the domain that the student is tested on, and the student sees images of the other domains only.
Labels are ignored in both, unless `mosaic_ce` asks for them in the first.

Departures: DomainBed's Adam and lr for the student (`mosaic_student_optimizer` "sgd" is theirs,
with its cosine); all players share one batch of augmented real images per update, where their code
draws six; real and synthetic images have one normalization, the dataset's; the loss of a patch is
its mean times 64, so that it weighs the same at every image size, where theirs sums over patches
(64 of them at 32 pixels); the student is in eval mode while the generator learns, so that synthetic
batches do not change its BatchNorm. `mosaic_published` restores the last two.

Segmentation: the paper reports NYUv2, but its code has no script for it. This is our reading:
entropies and divergences are means over pixels, and the balance is that of the mean softmax over
batch and pixels. Where a few classes dominate, a `mosaic_balance` of 0 leaves that term out. Of the
minibatches' labels only the ignored pixels are read: the student does not learn on these.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import clip_teacher, networks
from domainbed_kd.algorithms.base import (
    above,
    at_least,
    detached,
    fixed,
    forked_rng,
    one_of,
    or_null,
)
from domainbed_kd.algorithms.taught import Taught
from domainbed_kd.losses import kd_loss


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats, in [0, ln C], of each row's softmax; (B,). Finite for any finite logits.

    For maps (B, C, H, W) it is the mean over an image's pixels.
    """
    log_p = logits.log_softmax(dim=1)
    found = -(log_p.exp() * log_p).sum(dim=1)
    return found if logits.dim() == 2 else found.mean(dim=(1, 2))


def negative_balance(logits: Tensor) -> Tensor:
    """Minus the entropy in bits, in [-log2 C, 0], of the mean softmax over a batch (B, C, ...)."""
    p = logits.softmax(dim=1).mean(dim=(0, *range(2, logits.dim())))
    return (p * p.clamp(min=1e-12).log2()).sum()


def patch_loss(logits: Tensor, target: float, published: bool = False) -> Tensor:
    """How far a discriminator is from calling all patches `target`: 1 for real, 0 for synthetic.

    Binary cross-entropy in nats, mean over the logits (B, 1, h, w), times 64; `published` sums over
    each image's patches instead. Both are the same with 64 patches, as at 32 pixels.
    """
    n_patches = logits[0].numel() if published else 64
    return n_patches * F.binary_cross_entropy_with_logits(
        logits, torch.full_like(logits, target))


def highest_entropy(logits: Tensor, m: int) -> Tensor:
    """Indices (m,) of the m rows of logits (B, C) with the largest entropy, largest first."""
    return entropy(logits).topk(m).indices


def is_deep(input_shape) -> bool:
    """Whether images (C, H, W) are above 64 pixels, which takes deeper networks."""
    return max(input_shape[1:]) > 64


class Generator(nn.Module):
    """From noise (B, z_dim) to images (B, *input_shape) in (0, 1).

    The noise becomes a small image that is doubled in size by nearest neighbours and convolved,
    twice for images up to 64 pixels and five times above. The result is cropped to `input_shape`.
    """

    def __init__(self, input_shape, z_dim: int = 100, width: int = 64):
        super().__init__()
        channels, *self.size = input_shape
        deep = is_deep(input_shape)
        widths = [width] * 6 if deep else [4 * width, 2 * width, width]
        scale = 2 ** (len(widths) - 1)
        seed = (widths[0], *(math.ceil(side / scale) for side in self.size))
        layers = [nn.Linear(z_dim, math.prod(seed)), nn.Unflatten(1, seed),
                  nn.BatchNorm2d(widths[0])]
        if deep:
            layers.append(nn.LeakyReLU(0.2))
        for n_in, n_out in pairwise(widths):
            layers += [nn.Upsample(scale_factor=2),
                       nn.Conv2d(n_in, n_out, 3, padding=1, bias=False),
                       nn.BatchNorm2d(n_out), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(
            *layers, nn.Conv2d(widths[-1], channels, 3, padding=1), nn.Sigmoid())

    def forward(self, z):
        """Images (B, C, H, W) of noise (B, z_dim)."""
        height, width = self.size
        return self.layers(z)[..., :height, :width]


def patch_discriminator(input_shape, width: int = 64) -> nn.Sequential:
    """From images (B, *input_shape) to a logit per patch (B, 1, h, w): is it real?

    There are H / 4 by W / 4 logits, each of which sees 10 x 10 pixels. Above 64 pixels there are
    H / 16 by W / 16 (rounded down), each of which sees 46 x 46.
    """
    channels, deep = input_shape[0], is_deep(input_shape)
    first, *rest = [width, 2 * width, 4 * width, 8 * width] if deep else [2 * width, 4 * width]
    layers = [nn.Conv2d(channels, first, 4, stride=2, padding=1, bias=not deep),
              nn.LeakyReLU(0.2)]
    for n_in, n_out in pairwise([first, *rest]):
        layers += [nn.Conv2d(n_in, n_out, 4, stride=2, padding=1, bias=False),
                   nn.BatchNorm2d(n_out), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Conv2d(rest[-1], 1, 1, bias=False))


class MosaicKD(Taught):
    """Four players: a frozen teacher, a generator, a discriminator and the student.

    The generator makes images whose patches the discriminator takes for real, whose classes the
    teacher is sure of and predicts equally often, and on which the student disagrees with it. The
    student copies the teacher on these and on real images. Noise has a random stream of its own, a
    function of `noise_seed` and `update_count`, both in the state dict.

    Raises:
        ValueError: as `Taught` does, or if hparams contradict each other; in the role "ood", if
            there is no teacher or it held out the domain that the student is tested on; in an
            update, if the teacher's logits have no gradient by its images.
    """

    needs_same_view = "its teacher judges images that the generator has just made"
    taught_by_target = {"mosaic_role": "ood"}
    takes = Taught.takes | {
        **{f"mosaic_{weight}": at_least(0) for weight in (
            "kd", "ce", "local", "align", "adversarial", "balance", "lr_g")},
        **{f"mosaic_{count}": at_least(1) for count in ("kd_steps", "z_dim", "width")},
        "mosaic_batch": or_null(at_least(1)), "mosaic_temperature": above(0),
        "mosaic_ood_share": above(0, up_to=1), "mosaic_role": one_of("dg", "ood"),
        "mosaic_student_optimizer": one_of("adam", "sgd")}

    @staticmethod
    def search_space(dataset):
        """The players' weights, sizes and optimisers, and the role."""
        def weight(r):
            return 10 ** r.uniform(-1, 0.5)

        return Taught.search_space(dataset) | {
            "mosaic_role": fixed("dg"),
            "mosaic_kd": fixed(1.0),
            "mosaic_ce": fixed(0.0),
            "mosaic_local": (1.0, weight),
            "mosaic_align": (1.0, weight),
            "mosaic_adversarial": (1.0, weight),
            "mosaic_balance": (10.0, lambda r: 10 ** r.uniform(0, 1.5)),
            "mosaic_temperature": (1.0, lambda r: r.choice([1.0, 2.0, 4.0])),
            "mosaic_kd_steps": (5, lambda r: int(r.choice([1, 3, 5]))),
            "mosaic_lr_g": (1e-3, lambda r: 10 ** r.uniform(-4, -2.5)),
            "mosaic_z_dim": fixed(100),
            "mosaic_width": fixed(64),
            "mosaic_batch": fixed(None),  # synthetic images; null: as many as real ones
            "mosaic_ood_share": fixed(1.0),
            "mosaic_student_optimizer": fixed("adam"),
            "mosaic_published": fixed(False),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        _check(hparams)
        super().__init__(input_shape, num_classes, num_domains, hparams)
        if hparams["mosaic_role"] == "ood":
            self._check_teacher_is_in_domain()
        with forked_rng():
            self.generator = Generator(
                input_shape, hparams["mosaic_z_dim"], hparams["mosaic_width"])
            self.discriminator = patch_discriminator(input_shape, hparams["mosaic_width"])
            self.register_buffer("noise_seed", torch.randint(2**62, ()))
        self.count_updates()
        for name, values in zip(("mean", "std"), clip_teacher.normalization(hparams, input_shape)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

        self.generator_optimizer, self.discriminator_optimizer = (
            self.adam(player, lr=hparams["mosaic_lr_g"], weight_decay=0, betas=(0.5, 0.999))
            for player in (self.generator, self.discriminator))
        annealed = []
        if hparams["mosaic_kd"]:
            annealed += [self.generator_optimizer, self.discriminator_optimizer]
        if hparams["mosaic_student_optimizer"] == "sgd":
            self.optimizer = self.sgd(self.network)
            annealed.append(self.optimizer)
        steps = hparams.get("total_steps", 0)  # a fork does not say: no annealing there
        self.schedulers = [
            torch.optim.lr_scheduler.CosineAnnealingLR(
                optimizer, max(1, steps - self.warm_up_left.item()))
            for optimizer in annealed if steps]

    def _check_teacher_is_in_domain(self) -> None:
        unseen = set(self.hparams.get("test_envs") or ()) & set(
            getattr(self.teacher, "held_out", ()))
        if unseen:
            raise ValueError(
                "MosaicKD: with mosaic_role 'ood' the teacher knows the domain that the student "
                f"is tested on, but the one in {self.hparams['teacher']} held out environments "
                f"{sorted(unseen)}. Name a run that trained on them and held out the others.")

    def update(self, minibatches, unlabeled=None):
        """One step of discriminator and generator, `mosaic_kd_steps` of the student.

        Real images are those of `unlabeled` if given, else those of the minibatches. The role "ood"
        never uses `unlabeled`, which is of the domain that the student must not see.
        """
        if self.warm_up_left or unlabeled is None or self.hparams["mosaic_role"] == "ood":
            return super().update(minibatches)
        x, y = (torch.cat(part) for part in zip(*minibatches))
        return self.distill(x, y, torch.cat(unlabeled))

    def distill(self, x, y, unlabeled=None):
        """As `update`, on images x (B, ...) and labels y (B,), which only `mosaic_ce` uses."""
        hparams = self.hparams
        if not hparams["mosaic_kd"]:
            values = self._learn(x, y)
        else:
            noise = torch.Generator().manual_seed((self.noise_seed + self.update_count).item())
            real, counts = (x, y) if unlabeled is None else (unlabeled, None)
            logits = self.teacher_logits(real)
            if hparams["mosaic_ood_share"] < 1:
                kept = highest_entropy(
                    logits, max(1, round(hparams["mosaic_ood_share"] * len(real))))
                real, logits = real[kept], logits[kept]
                counts = counts if counts is None else counts[kept]
            values = self._play(real, noise)
            steps = [self._learn(x, y, real, logits, counts, noise)
                     for _ in range(hparams["mosaic_kd_steps"])]
            values |= {name: sum(step[name].double() for step in steps) / len(steps)
                       for name in steps[0]}
        self.update_count += 1
        for scheduler in self.schedulers:
            scheduler.step()
        return values

    def synthesize(self, n: int, noise: torch.Generator) -> Tensor:
        """Images (n, C, H, W), normalized as the dataset's, from noise drawn on the CPU."""
        z = torch.randn(n, self.hparams["mosaic_z_dim"], generator=noise)
        z = networks.sent(z, self.mean.device).to(self.mean.dtype)
        return (self.generator(z) - self.mean) / self.std

    def _play(self, real, noise):
        """One step of the discriminator, then one of the generator on the same images."""
        hparams = self.hparams
        published = hparams["mosaic_published"]
        fake = self.synthesize(hparams["mosaic_batch"] or len(real), noise)
        loss_d = (patch_loss(self.discriminator(fake.detach()), 0.0, published)
                  + patch_loss(self.discriminator(real), 1.0, published)) / 2
        self.discriminator_optimizer.zero_grad()
        (hparams["mosaic_local"] * loss_d).backward()
        self.discriminator_optimizer.step()

        frozen = isinstance(self.teacher, networks.Frozen)
        teacher = (self.teacher.module if frozen else self.teacher)(fake)
        if not teacher.requires_grad:
            raise ValueError(
                f"MosaicKD: the teacher, a {type(self.teacher).__name__}, gives no gradient of its "
                "logits by its images, which the generator learns from. Name a trained network.")
        self.network.train(self.training and published)
        student = self.network(fake)
        self.network.train(self.training)
        terms = {
            "local": patch_loss(self.discriminator(fake), 1.0, published),
            "align": entropy(teacher).mean(),
            "adversarial": -kd_loss(student, teacher, temperature=1.0),
            "balance": negative_balance(teacher)}
        loss_g = sum(hparams[f"mosaic_{name}"] * term for name, term in terms.items())
        self.generator_optimizer.zero_grad()
        # Only the generator's: nobody needs the other players' gradients.
        loss_g.backward(inputs=list(self.generator.parameters()))
        self.generator_optimizer.step()
        return detached(loss_d=loss_d, loss_g=loss_g, **terms)

    def _learn(self, x, y, real=None, real_logits=None, counts=None, noise=None):
        """One step of the student: on the teacher's predictions, on the labels, or on both.

        `counts` are the real images' labels; pixels that these ignore are left out.
        """
        hparams = self.hparams
        loss, terms = 0, {}
        if hparams["mosaic_kd"]:
            with torch.no_grad():
                fake = self.synthesize(hparams["mosaic_batch"] or len(real), noise)
            if counts is not None:  # all pixels of synthetic images count
                counts = torch.cat([counts.new_zeros(len(fake), *counts.shape[1:]), counts])
            terms["distill"] = kd_loss(
                self.network(torch.cat([fake, real])),
                torch.cat([self.teacher_logits(fake), real_logits]),
                hparams["mosaic_temperature"], counts)
            loss = hparams["mosaic_kd"] * terms["distill"]
        if hparams["mosaic_ce"]:
            terms["classify"] = F.cross_entropy(self.network(x), y)
            loss = loss + hparams["mosaic_ce"] * terms["classify"]
        return self.descend(loss, **terms)


def _check(hparams) -> None:
    """Raises ValueError, in one line, for hparams that contradict each other."""
    if not hparams["mosaic_kd"] and not hparams["mosaic_ce"]:
        raise ValueError("MosaicKD: mosaic_kd and mosaic_ce are both 0, so the student would "
                         "learn nothing. Give either a weight.")
    if hparams["mosaic_role"] == "ood" and hparams["mosaic_ce"]:
        raise ValueError("MosaicKD: with mosaic_role 'ood' labels are ignored. Leave mosaic_ce at "
                         "0, or choose the role dg.")
    if hparams["mosaic_role"] == "ood" and hparams.get("teacher") is None:
        raise ValueError("MosaicKD: with mosaic_role 'ood' the teacher knows the domain that the "
                         "student is tested on, and cannot warm up on the others. Name one that "
                         "trained there: --teacher FOLDER.")
