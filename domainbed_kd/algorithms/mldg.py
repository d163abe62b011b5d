"""MLDG: a step on some domains should also help on others.

Li et al., "Learning to Generalize: Meta-Learning for Domain Generalization", AAAI 2018,
https://arxiv.org/abs/1710.03463; its first-order variant, as in DomainBed.
"""

import copy
import itertools

import torch
import torch.nn.functional as F

from domainbed_kd.algorithms.erm import ERM


def meta_pairs(n_domains: int, n_meta_test: int) -> list[tuple[int, int]]:
    """Pairs of a meta-training and a meta-test domain, from a random order of all domains."""
    order = torch.randperm(n_domains).tolist()
    meta_train = order[:n_domains - n_meta_test]
    return list(zip(meta_train, itertools.cycle(order[-n_meta_test:])))


class MLDG(ERM):
    """Gradients of meta-training domains, plus those of meta-test domains one Adam step later.

    As in DomainBed, `n_meta_test` may leave no domain for meta-training. That happens with its
    default 2 and two training domains, or with one: the loss is 0 and only weight decay acts. With
    the hparam `mended`: true at least one domain is left, and a single one is used for both.
    """

    no_teachers = "its gradients are those of copies of its network"
    mends = True

    @staticmethod
    def search_space(dataset):
        """The weight of the meta-test gradients, and how many domains they come from."""
        return {
            "mldg_beta": (1.0, lambda r: 10 ** r.uniform(-1, 1)),
            "n_meta_test": (2, lambda r: int(r.choice([1, 2]))),
        }

    def update(self, minibatches, unlabeled=None):
        """One step on the sum of the pairs' gradients, divided by the number of domains."""
        n_domains, n_meta_test = len(minibatches), self.hparams["n_meta_test"]
        if self.hparams.get("mended"):
            n_meta_test = max(1, min(n_meta_test, n_domains - 1))
        pairs = meta_pairs(n_domains, n_meta_test)
        if self.hparams.get("mended") and n_domains == 1:
            pairs = [(0, 0)]
        beta, total = self.hparams["mldg_beta"], 0.0
        gradients = [torch.zeros_like(p) for p in self.network.parameters()]
        for i, j in pairs:
            (xi, yi), (xj, yj) = minibatches[i], minibatches[j]
            inner = copy.deepcopy(self.network)
            optimizer = self.adam(inner)
            loss_i = F.cross_entropy(inner(xi), yi)
            loss_i.backward()
            optimizer.step()
            loss_j = F.cross_entropy(inner(xj), yj)
            later = torch.autograd.grad(loss_j, inner.parameters())
            for total_gradient, p, g in zip(gradients, inner.parameters(), later):
                total_gradient += p.grad / n_domains
                total_gradient += beta * g / n_domains
            total += (loss_i + beta * loss_j).detach().double()
        for p, gradient in zip(self.network.parameters(), gradients):
            p.grad = gradient
        self.optimizer.step()
        return {"loss": total / n_domains}
