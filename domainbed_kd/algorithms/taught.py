"""The base of methods that learn from a network trained on the same training domains."""

import torch
import torch.nn.functional as F
from torch import nn

from domainbed_kd import networks, teachers
from domainbed_kd.algorithms.base import at_least, detached, fixed, forked_rng, or_null
from domainbed_kd.algorithms.erm import ERM


class Taught(ERM):
    """ERM's student beside a teacher that was trained on the same training domains.

    The teacher is hparams["teacher"]: the folder of a finished run, or a module x -> logits.
    Without one, as inside a fork, a second network like the student is trained by ERM in the first
    `teacher_steps` updates and then frozen; until then `predict` uses that network. The state dict
    holds a teacher only if it warmed up here.

    Subclasses implement `distill(x, y)`, one step of the student.
    """

    learns_from_run = True
    takes = ERM.takes | {"teacher_steps": or_null(at_least(0))}

    @staticmethod
    def search_space(dataset):
        """How many updates its own teacher warms up for; null is a fifth of the run."""
        return {"teacher_steps": fixed(None)}

    def __init__(self, input_shape, num_classes, num_domains, hparams):
        super().__init__(input_shape, num_classes, num_domains, hparams)
        self.register_buffer("warm_up_left", torch.tensor(0))
        with forked_rng():
            known = hparams
            if teachers.is_taught_by_target(type(self), hparams):
                known = hparams | {"test_envs": None}  # the teacher may have seen some of them
            self.teacher = teachers.given(known, num_classes, input_shape)
            if self.teacher is not None:
                return
            self.teacher = nn.Sequential(
                *networks.featurizer_and_classifier(input_shape, num_classes, hparams))
        self.teacher_optimizer = self.adam(self.teacher)
        steps = hparams["teacher_steps"]
        if steps is None:
            steps = self.total_steps // 5
        self.averages_after = steps  # the student does not train before
        self.warm_up_left.fill_(steps)

    def train(self, mode=True):
        """Leaves the teacher in eval mode once it has warmed up."""
        super().train(mode)
        if not self.warm_up_left:
            self.teacher.eval()
        return self

    def load_state_dict(self, *args, **kwargs):
        """As nn.Module's; puts a teacher that has warmed up in eval mode again."""
        keys = super().load_state_dict(*args, **kwargs)
        self.train(self.training)
        return keys

    def update(self, minibatches, unlabeled=None):
        """One step of the student or, while it warms up, of the teacher."""
        x, y = (torch.cat(part) for part in zip(*minibatches))
        if not self.warm_up_left:
            return self.distill(x, y)
        loss = F.cross_entropy(self.teacher(x), y)
        self.step(loss, self.teacher_optimizer)
        self.warm_up_left -= 1
        self.train(self.training)
        return detached(loss=loss, teacher_loss=loss)

    def distill(self, x, y):
        """One step of the student on images (B, ...) and labels (B,); returns what to log."""
        raise NotImplementedError(f"{type(self).__name__} does not implement distill().")

    def teacher_is_ready(self):
        """Whether the teacher is given, or has warmed up."""
        return not self.warm_up_left

    @torch.no_grad()
    def teacher_logits(self, x):
        """The teacher's logits (B, C) of the student's images, without gradients."""
        return self.teacher(x)

    def predict(self, x):
        """Logits (B, C): the student's, or the teacher's while it warms up."""
        return self.teacher(x) if self.warm_up_left else self.network(x)
