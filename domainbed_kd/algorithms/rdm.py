"""RDM: matches the distribution of the worst domain's losses to that of all domains'.

Nguyen et al., "Domain Generalization via Risk Distribution Matching", WACV 2024,
https://arxiv.org/abs/2310.18598. Constants from DomainBed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from domainbed_kd import datasets
from domainbed_kd.algorithms.annealed import Annealed
from domainbed_kd.algorithms.base import detached
from domainbed_kd.losses import BANDWIDTHS, per_domain, squared_mmd


def worst_row(risks: Tensor) -> Tensor:
    """The row of risks (D, B) with the largest mean, (B,)."""
    return risks.index_select(0, risks.mean(dim=1).argmax(dim=0, keepdim=True))[0]


def matching_penalty(some: Tensor, others: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the distributions of risks (A,) and (B,)."""
    return squared_mmd(some[:, None], others[:, None], (0.0001, *BANDWIDTHS))


class RDM(Annealed):
    """Mean cross-entropy of the domains; later also the discrepancy and variances of the risks."""

    needs_image_labels = "it compares domains by a loss for each image"

    @staticmethod
    def search_space(dataset):
        """Both penalties' weights, when they set in, Adam's learning rate then, and batches."""
        large = dataset in ("DomainNet", "TerraIncognita")
        weight, low, high = {"DomainNet": (0.5, 0.1, 1.0), "PACS": (5.0, 1.0, 10.0),
                             "TerraIncognita": (5.0, 1.0, 10.0)}.get(dataset, (5.0, 0.1, 10.0))
        start, first, last = (2400, 1500, 3000) if dataset == "DomainNet" else (1500, 800, 2700)
        varies = dataset not in ("TerraIncognita", "OfficeHome", "DomainNet")
        space = {
            "rdm_lambda": (weight, lambda r: r.uniform(low, high)),
            "rdm_penalty_anneal_iters": (start, lambda r: int(r.uniform(first, last))),
            "variance_weight": (0.004, lambda r: r.uniform(0.001, 0.007)) if varies
            else (0.0, lambda r: 0.0),
            "rdm_lr": (1.5e-5, lambda r: r.uniform(8e-6, 2e-5)),
        }
        if not datasets.facts(dataset).SMALL_IMAGES:
            space["batch_size"] = ((40, lambda r: int(r.uniform(30, 60))) if large
                                   else (88, lambda r: int(r.uniform(70, 100))))
        return space

    def update(self, minibatches, unlabeled=None):
        """One step on `total_loss`; penalties are logged from the start.

        Raises:
            ValueError: if the domains' batches differ in size.
        """
        if len(sizes := {len(y) for _, y in minibatches}) > 1:
            raise ValueError("RDM: the domains' batches must have the same size, but they have "
                             f"{sorted(sizes)} images.")
        x, y = (torch.cat(part) for part in zip(*minibatches))
        logits = self.network(x)
        n_domains = len(minibatches)
        erm_loss = per_domain(
            F.cross_entropy, logits.chunk(n_domains), y.chunk(n_domains)).mean()
        risks = F.cross_entropy(logits, y, reduction="none")
        worst = worst_row(risks.view(n_domains, -1))
        matching = matching_penalty(worst, risks)
        variance = risks.var() + worst.var()

        hparams = self.hparams
        loss = erm_loss
        if self.has_begun(hparams["rdm_penalty_anneal_iters"], lr=hparams["rdm_lr"]):
            loss = (loss + hparams["rdm_lambda"] * matching
                    + hparams["variance_weight"] * variance)
        self.update_count += 1
        self.descend(loss)
        return detached(
            update_count=float(self.update_count.item()), total_loss=loss, erm_loss=erm_loss,
            matching_penalty=matching, variance_penalty=variance,
            rdm_lambda=float(hparams["rdm_lambda"]))
