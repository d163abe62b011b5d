"""ADRMX: label features minus domain features, remixed with other images' domain features.

Demirel, Aptoula & Ozkan, "ADRMX: Additive Disentanglement of Domain Features with Remix Loss",
2023, https://arxiv.org/abs/2308.06624, with the loss of Khosla et al., "Supervised Contrastive
Learning", NeurIPS 2020. Constants from DomainBed. There, the two images that are remixed for a
class can be any two of the batch; with the hparam `mended`: true they are of that class and of
different domains. As in DomainBed, weight decay is not applied.
Departure: where no class has two images in the batch, DomainBed fails; here the remix loss and the
contrastive losses are 0.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import datasets, networks
from domainbed_kd.algorithms.base import Algorithm, detached, domain_labels, fixed

TEMPERATURE, EPSILON = 0.07, 1e-5


def supervised_contrast(features: Tensor, y: Tensor) -> Tensor:
    """Minus the log-probability of the other images of an image's class among all others.

    The sum over images with features (B, D), divided by their number plus one. Images that are
    alone in their class do not count.
    """
    features = F.normalize(features, dim=1)
    similar = (features @ features.T / TEMPERATURE).exp()
    others = ~torch.eye(len(y), device=y.device).bool()
    positives = (y[:, None] == y) & others
    # 2: DomainBed halves every exponential.
    share = similar / (torch.where(others, similar, 0).sum(dim=1, keepdim=True) + 2 * EPSILON)
    counts = positives.sum(dim=1)
    rows = torch.where(positives, (share + EPSILON).log(), 0).sum(dim=1) / counts.clamp(min=1)
    return -rows.sum() / ((counts > 0).sum() + 1)


def remixed_pairs(labels: list[int], domains: list[int], n_classes: int,
                  mended: bool) -> list[tuple[int, int]]:
    """Two images, as rows of the batch, for each class that has two or more.

    Mended, the images are of the class and of different domains. Otherwise they are two of the
    batch's first n rows, where n is the class's number of images.
    """
    pairs = []
    for c in range(n_classes):
        rows = [row for row, label in enumerate(labels) if label == c]
        order = torch.randperm(len(rows)).tolist()
        if mended:
            first, *others = [rows[i] for i in order] or [None]
            pairs += [(first, row) for row in others if domains[row] != domains[first]][:1]
        elif len(rows) > 1:
            pairs.append((order[0], order[1]))
    return pairs


class ADRMX(Algorithm):
    """Two featurizers, a discriminator that must not tell domains, and three classifiers.

    Of 1 + `d_steps_per_g_step` updates one is the featurizers', the others the discriminator's.
    """

    no_teachers = "its student and its discriminator take turns"
    mends = True

    @staticmethod
    def search_space(dataset):
        """Weights, turns and shape of the discriminator, and both players' Adam."""
        if datasets.facts(dataset).SMALL_IMAGES:
            lr = 3e-3, lambda r: r.choice([5e-4, 1e-3, 2e-3, 3e-3])
        else:
            lr = 3e-5, lambda r: r.choice([2e-5, 3e-5, 4e-5, 5e-5])
        return {
            "cnt_lambda": fixed(1.0),
            "dclf_lambda": fixed(1.0),
            "disc_lambda": fixed(0.75),
            "rmxd_lambda": fixed(1.0),
            "d_steps_per_g_step": fixed(2),
            "beta1": fixed(0.5),
            "mlp_width": fixed(256),
            "mlp_depth": (9, lambda r: int(r.choice([8, 9, 10]))),
            "mlp_dropout": fixed(0.0),
            "lr": lr,
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates((1,))
        self.featurizer_label = networks.Featurizer(input_shape, hparams)
        self.featurizer_domain = networks.Featurizer(input_shape, hparams)
        n_features = self.featurizer_label.n_outputs
        self.discriminator = networks.MLP(n_features, num_domains, hparams)
        self.classifier_label_1 = networks.Classifier(n_features, num_classes, is_nonlinear=True)
        self.classifier_label_2 = networks.Classifier(n_features, num_classes, is_nonlinear=True)
        self.classifier_domain = networks.Classifier(n_features, num_domains, is_nonlinear=True)
        self.network = nn.Sequential(self.featurizer_label, self.classifier_label_1)
        options = {"weight_decay": 0.0, "betas": (hparams["beta1"], 0.9)}
        self.disc_opt = self.adam(self.discriminator, **options)
        self.gen_opt = self.adam(
            self.featurizer_label, self.featurizer_domain, self.classifier_label_1,
            self.classifier_label_2, self.classifier_domain, **options)

    def update(self, minibatches, unlabeled=None):
        """One step of the player whose turn it is; the discriminator logs `loss_disc` alone."""
        self.update_count += 1
        x, y = (torch.cat(part) for part in zip(*minibatches))
        domains = domain_labels(minibatches)
        n_turns = self.hparams["d_steps_per_g_step"]
        discriminates = self.update_count.item() % (1 + n_turns) < n_turns
        with torch.set_grad_enabled(not discriminates):
            of_label, of_domain = self.featurizer_label(x), self.featurizer_domain(x)
        common = of_label - of_domain
        disc = F.cross_entropy(self.discriminator(common), domains)
        if discriminates:
            self.step(disc, self.disc_opt)
            return detached(loss_disc=disc)

        domain = F.cross_entropy(self.classifier_domain(of_domain), domains)
        label = F.cross_entropy(self.classifier_label_1(of_label), y)
        label_contrast = supervised_contrast(of_label, y)
        final = F.cross_entropy(self.classifier_label_2(common), y)
        final_contrast = supervised_contrast(common, y)
        remixed = self._remix(common, of_domain, y, domains)
        hparams = self.hparams
        loss = (label + final + hparams["dclf_lambda"] * domain + hparams["rmxd_lambda"] * remixed
                + hparams["cnt_lambda"] * (label_contrast + final_contrast)
                - hparams["disc_lambda"] * disc)
        self.step(loss, self.gen_opt)
        return detached(
            loss_total=loss, loss_cnt_int=label_contrast, loss_cnt_final=final_contrast,
            loss_clf_int=label, loss_clf_fin=final, loss_dmn=domain, loss_disc=disc,
            loss_remixed=remixed)

    def _remix(self, common: Tensor, of_domain: Tensor, y: Tensor, domains: Tensor) -> Tensor:
        """Mean over all classes of the cross-entropy of an image with another's domain features."""
        n_classes = self.classifier_label_1[-1].out_features
        pairs = remixed_pairs(y.tolist(), domains.tolist(), n_classes, self.hparams.get("mended"))
        if not pairs:
            return common.new_zeros(())
        image, other = torch.tensor(pairs, device=y.device).T
        logits = self.classifier_label_1(common[image] + of_domain[other])
        return F.cross_entropy(logits, y[image], reduction="sum") / n_classes
