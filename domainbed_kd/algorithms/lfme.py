"""LFME: the student's logits are pulled towards the probabilities of one expert per domain.

Chen et al., "LFME: A Simple Framework for Learning from Multiple Experts in Domain
Generalization", NeurIPS 2024, https://arxiv.org/abs/2410.17020. Loss, constants and range from the
authors' code (github.com/liangchen527/LFME), as is the variant without experts.
Departures: the student is built before the experts, so a weight of 0 is ERM; experts are in the
state dict, survive a restart and follow train and eval mode, unlike theirs; networks are
DomainBed's, not always a ResNet-18.
"""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import networks
from domainbed_kd.algorithms.base import at_least, fixed, forked_rng
from domainbed_kd.algorithms.erm import ERM


class LFME(ERM):
    """Cross-entropy, and the squared distance of logits from the probabilities of experts.

    Each expert learns one domain by ERM at the same time, and predicts its images before its step.
    Without `lfme_experts` one-hot labels replace the probabilities.
    """

    needs_image_labels = "it takes labels as one-hot rows, one per image"
    takes = ERM.takes | {"lfme_weight": at_least(0)}

    @staticmethod
    def search_space(dataset):
        """The weight of the squared distance, and whether there are experts."""
        return {
            "lfme_weight": (1.0, lambda r: 10 ** r.uniform(-2, 1)),
            "lfme_experts": fixed(True),
        }

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.experts = nn.ModuleList()
        if not (hparams["lfme_experts"] and hparams["lfme_weight"]):
            return
        with forked_rng():
            self.experts.extend(nn.Sequential(*networks.featurizer_and_classifier(
                input_shape, num_classes, hparams)) for _ in range(num_domains))
        self.expert_optimizer = self.adam(self.experts)

    def update(self, minibatches, unlabeled=None):
        """A step of each expert on its domain, and one of the student on all."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        weight, terms = self.hparams["lfme_weight"], {}
        if self.experts:
            wanted, terms["expert_loss"] = self._step_of_experts(minibatches)
        logits = self.network(x)
        classify = F.cross_entropy(logits, y)
        if not weight:
            return self.descend(classify, classify=classify)
        if not self.experts:
            wanted = F.one_hot(y, logits.shape[1]).to(logits.dtype)
        regularize = F.mse_loss(logits, wanted)
        return self.descend(
            classify + weight * regularize, classify=classify, regularize=regularize, **terms)

    def _step_of_experts(self, minibatches):
        """Their probabilities (B, C) of all images, before the step, and their mean loss."""
        logits = [expert(x) for expert, (x, _) in zip(self.experts, minibatches)]
        # Each expert has its own term of the sum, so one Adam is the same as an Adam for each.
        loss = sum(F.cross_entropy(z, y) for z, (_, y) in zip(logits, minibatches))
        self.step(loss, self.expert_optimizer)
        return torch.cat(logits).detach().softmax(dim=1), loss.detach() / len(logits)
