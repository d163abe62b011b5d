"""TRM: features on which a classifier fitted to one domain does well in the others.

Xu & Jaakkola, "Learning Representations that Support Robust Transfer of Predictors", 2021,
https://arxiv.org/abs/2110.09940. Constants from DomainBed. There, the weights of the domains are
updated in place before the gradient is taken, so the gradient has other weights than the loss, and
the series for the inverse Hessian begins with twice its second term. With the hparam `mended`: true
the gradient takes the loss's weights, and the series begins with its first two terms.
Departures: the domains' classifiers and weights are in the checkpoint; with one training domain,
where DomainBed fails, it is ERM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import InTwoParts, detached

HEAD_LR, HEAD_STEPS = 0.1, 30  # SGD that fits a domain's classifier in each update
NEUMANN_STEPS, NEUMANN_LIMIT = 10, 10  # terms of the inverse Hessian's series; largest entry


def inverse_hessian_product(head: nn.Linear, features: Tensor, y: Tensor, vector: Tensor,
                            doubled: bool) -> Tensor:
    """The inverse Hessian of the cross-entropy in the head's weight, times a vector of its shape.

    Sums the first terms of the Neumann series, up to the one by which an entry of the sum exceeds a
    limit. `doubled` starts with twice the second term instead of the first and the second.
    """
    loss = F.cross_entropy(head(features), y)
    gradient, = torch.autograd.grad(loss, head.weight, create_graph=True)
    total, going = vector, None
    for step in range(NEUMANN_STEPS):
        product, = torch.autograd.grad(
            gradient, head.weight, grad_outputs=vector, retain_graph=True)
        vector = vector - product
        if step == 0 and doubled:
            total = vector
        longer = total + vector
        total = longer if going is None else torch.where(going, longer, total)
        going = total.abs().max() <= NEUMANN_LIMIT
    return total


class TRM(InTwoParts):
    """Cross-entropy; after some updates also the risk of each domain's classifier in the others.

    Each domain's linear classifier is fitted further in every update. `alpha`, (D, D), weighs its
    risks in the other domains.
    """

    no_teachers = "it makes steps of several classifiers"
    mends = True

    @staticmethod
    def search_space(dataset):
        """The gradients' weight, the number of ERM updates, and the step size of `alpha`."""
        return {
            "cos_lambda": (1e-4, lambda r: 10 ** r.uniform(-5, 0)),
            "iters": (200, lambda r: int(10 ** r.uniform(0, 4))),
            "groupdro_eta": (1e-2, lambda r: 10 ** r.uniform(-3, -1)),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.count_updates((1,))
        self.featurizer = networks.Featurizer(input_shape, hparams)
        n_features = self.featurizer.n_outputs
        self.classifier = nn.Linear(n_features, num_classes)
        heads = [nn.Linear(n_features, num_classes) for _ in range(num_domains + 1)]
        self.heads = nn.ModuleList(heads[:num_domains])  # DomainBed draws one more
        self.register_buffer("alpha", 1 - torch.eye(num_domains))
        self.optimizer_f = self.adam(self.featurizer)
        self.optimizer_c = self.adam(self.classifier)
        self.heads_opt = torch.optim.SGD(self.heads.parameters(), lr=HEAD_LR)

    def update(self, minibatches, unlabeled=None):
        """Returns the cross-entropy `nll` and what is added to it, `trm_loss`."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        features = self.featurizer(x)
        nll = F.cross_entropy(self.classifier(features), y)
        loss, trm_loss = nll, 0.0
        if self.update_count.item() >= self.hparams["iters"] and len(minibatches) > 1:
            labels = [y for _, y in minibatches]
            per_domain = features.split([len(y) for y in labels])
            self._fit_heads([f.detach() for f in per_domain], labels)
            self.alpha /= self.alpha.sum(dim=1, keepdim=True)
            risks = [self._transfer_risk(q, per_domain, labels) for q in range(len(labels))]
            value, differentiable = (sum(r) / len(risks) for r in zip(*risks))
            loss, trm_loss = nll + differentiable, value
        self.step(loss, self.optimizer_f, self.optimizer_c)
        self.update_count += 1
        return detached(nll=nll, trm_loss=trm_loss)

    def _fit_heads(self, features: list[Tensor], labels: list[Tensor]) -> None:
        if self.hparams["class_balanced"]:
            with torch.no_grad():
                for head in self.heads:
                    head.weight.copy_(self.classifier.weight)
        for _ in range(HEAD_STEPS):
            self.heads_opt.zero_grad()
            sum(F.cross_entropy(head(f), y)
                for head, f, y in zip(self.heads, features, labels)).backward()
            self.heads_opt.step()

    def _transfer_risk(self, q: int, features: tuple[Tensor, ...],
                       labels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The transfer risk of domain q's classifier: its value, and the term to differentiate.

        Updates row q of `alpha`.
        """
        mended, head = self.hparams.get("mended", False), self.heads[q]
        losses = torch.stack([F.cross_entropy(head(f), y) for f, y in zip(features, labels)])
        alpha = self.alpha[q].clone()
        weighted = alpha * losses  # alpha is 0 at q
        gradient, = torch.autograd.grad(losses[q], head.weight, create_graph=True)
        elsewhere, = torch.autograd.grad(weighted.sum(), head.weight, retain_graph=True)
        step = inverse_hessian_product(
            head, features[q].detach(), labels[q], elsewhere, doubled=not mended)
        alignment = self.hparams["cos_lambda"] * (step * gradient).sum()
        self.alpha[q] *= (self.hparams["groupdro_eta"] * weighted.detach()).exp()
        weights = alpha if mended else self.alpha[q].clone()
        return (weighted.sum() - alignment).detach(), (weights * losses).sum() - alignment
