"""Networks that break the contract of docs/own-network.md, each in one way."""

import math

import torch
from torch import nn

from ris_fast.models import Prediction


class Right(nn.Module):
    """What the others are made from: keeps the contract."""

    def __init__(self, task, width: int = 8):
        super().__init__()
        self.task, self.shape = task, (task.elements, 2, 2)
        self.hidden = nn.Linear(2 * task.snapshots * task.bs_antennas, width)
        self.out = nn.Linear(width, 4 * task.elements)

    def forward(self, snapshots, channel, codes, snr_db):
        x = snapshots.flatten(1)
        x = x / x.norm(dim=1, keepdim=True)
        return self.out(torch.tanh(self.hidden(x))).unflatten(1, self.shape)


class Complex(Right):
    def forward(self, *inputs):
        return torch.view_as_complex(super().forward(*inputs).contiguous())


class WithFeatures(Right):
    def features(self, snapshots, channel, codes, snr_db):
        return snapshots.flatten(1)

    def trunk(self, features):
        return self.out(torch.tanh(self.hidden(features))).unflatten(1, self.shape)

    def forward(self, *inputs):
        return self.trunk(self.features(*inputs))

    def head_parameters(self):
        return list(self.out.parameters())


class TorchvisionLike(Right):
    """Has a submodule called `features`, as many networks do."""

    def __init__(self, task):
        super().__init__(task)
        self.features, self.trunk = nn.Identity(), nn.Identity()


class NoParameters(Right):
    def __init__(self, task):
        nn.Module.__init__(self)
        self.task = task

    def forward(self, snapshots, channel, codes, snr_db):
        return torch.ones(len(snr_db), self.task.elements, 2, 2)


class ListOfLayers(Right):
    def __init__(self, task):
        super().__init__(task)
        self.layers = [nn.Linear(8, 8) for _ in range(2)]


class DictOfLayers(Right):
    def __init__(self, task):
        super().__init__(task)
        self.layers = {"a": nn.Linear(8, 8)}


class ListOfWeights(Right):
    def __init__(self, task):
        super().__init__(task)
        self.scales = [nn.Parameter(torch.ones(3))]


class TensorForParameter(Right):
    def __init__(self, task):
        super().__init__(task)
        self.scale = torch.ones(3, requires_grad=True)


class Frozen(Right):
    def __init__(self, task):
        super().__init__(task)
        self.requires_grad_(False)


class Half(Right):
    def __init__(self, task):
        super().__init__(task)
        self.half()


class WrongShape(Right):
    def forward(self, *inputs):
        return super().forward(*inputs).transpose(1, 2)


class WrongKind(Right):
    def forward(self, *inputs):
        return [super().forward(*inputs)]


class BatchLost(Right):
    def forward(self, *inputs):
        return super().forward(*inputs).mean(0, keepdim=True)


class WrongSources(Right):
    def forward(self, *inputs):
        factor = super().forward(*inputs)
        return Prediction(factor, azimuth=factor[:, :1, 0, 0])


class InPlace(Right):
    def forward(self, snapshots, channel, codes, snr_db):
        channel.div_(channel.norm())
        return super().forward(snapshots, channel, codes, snr_db)


class InPlaceInTraining(Right):
    def forward(self, snapshots, channel, codes, snr_db):
        if self.training:
            snapshots += torch.randn_like(snapshots)
        return super().forward(snapshots, channel, codes, snr_db)


class NotFinite(Right):
    def __init__(self, task):
        super().__init__(task)
        self.logarithm = Logarithm()

    def forward(self, snapshots, channel, codes, snr_db):
        return super().forward(self.logarithm(snapshots), channel, codes, snr_db)


class Logarithm(nn.Module):
    def forward(self, x):
        return x.log()


class Raises(Right):
    def forward(self, snapshots, channel, codes, snr_db):
        return self.hidden(snapshots)


class TooFewArguments(Right):
    def forward(self, snapshots, channel):
        return snapshots


class TaskNotTaken(nn.Module):
    def __init__(self):
        super().__init__()


class ConstructorRaises(Right):
    def __init__(self, task):
        super().__init__(task)
        self.width = 1 / math.floor(0.5)


class Needs(Right):
    def __init__(self, task, depth):
        super().__init__(task)


class Lazy(Right):
    def __init__(self, task):
        super().__init__(task)
        self.out = nn.LazyLinear(4 * task.elements)


class LearnedFeatures(WithFeatures):
    def features(self, snapshots, channel, codes, snr_db):
        return self.hidden(snapshots.flatten(1))

    def trunk(self, features):
        return self.out(torch.tanh(features)).unflatten(1, self.shape)


class StrayHeads(Right):
    def head_parameters(self):
        return [nn.Parameter(torch.ones(1))]


class WrongClassical(WithFeatures):
    def classical(self, features):
        return features


class Broken(Right):
    """torch.compile cannot take it whole."""

    def forward(self, *inputs):
        torch._dynamo.graph_break()
        return super().forward(*inputs)


class Normalised(Right):
    """Has buffers that a training step changes."""

    def __init__(self, task):
        super().__init__(task)
        self.norm = nn.BatchNorm1d(8)

    def forward(self, snapshots, channel, codes, snr_db):
        x = snapshots.flatten(1)
        x = x / x.norm(dim=1, keepdim=True)
        return self.out(torch.tanh(self.norm(self.hidden(x)))).unflatten(1, self.shape)


def no_network(task):
    return 3


def factory(task, width: int = 8):
    return Right(task, width)


class LateLayer(Right):
    def forward(self, *inputs):
        if not hasattr(self, "late"):
            self.late = nn.Linear(2, 2)
        return self.late(super().forward(*inputs))


class StateLost(Right):
    def state_dict(self, *args, **kwargs):
        return {}


class ExtraState(Right):
    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        pass


class Zeros(Right):
    def __init__(self, task):
        super().__init__(task)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)


class Squeezed(Right):
    def forward(self, *inputs):
        return super().forward(*inputs).squeeze(0)


class NotFiniteBefore(Right):
    def forward(self, snapshots, channel, codes, snr_db):
        return super().forward(snapshots * (snr_db - 100.0).sqrt()[:, None, None, None], channel, codes, snr_db)


class NeedsTwo(Right):
    """Batch normalisation over a dimension that one scene alone does not fill."""

    def __init__(self, task):
        super().__init__(task)
        self.norm = nn.BatchNorm1d(8, track_running_stats=False)

    def forward(self, snapshots, channel, codes, snr_db):
        return self.out(self.norm(self.hidden(snapshots.flatten(1)))).unflatten(1, self.shape)


def compiled(task):
    return torch.compile(Right(task))


def parallel(task):
    return nn.DataParallel(Right(task))


# ---- unusual, and right ----------------------------------------------------------------------------------------------


class Covariance(Right):
    """Returns R in the place of F, which no shape can tell."""

    def forward(self, *inputs):
        factor = torch.view_as_complex(super().forward(*inputs))
        return factor @ factor.mH


class Names(Right):
    """Has submodules of the names that the trainer's own view of a network uses."""

    def __init__(self, task):
        super().__init__(task)
        self.net, self.name, self.in_two = nn.Identity(), nn.Identity(), nn.Identity()


class Tied(Right):
    def __init__(self, task):
        super().__init__(task)
        self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8)
        self.third.weight = self.second.weight

    def forward(self, snapshots, channel, codes, snr_db):
        x = snapshots.flatten(1)
        x = torch.tanh(self.hidden(x / x.norm(dim=1, keepdim=True)))
        return self.out(self.third(torch.tanh(self.second(x)))).unflatten(1, self.shape)


class Parametrized(Right):
    def __init__(self, task):
        super().__init__(task)
        nn.utils.parametrizations.weight_norm(self.hidden)
        nn.utils.parametrizations.spectral_norm(self.out)


class Singular(Right):
    """Columns made of singular vectors, whose phases are free: they may jump, and R does not."""

    def forward(self, *inputs):
        u, s, _ = torch.linalg.svd(torch.view_as_complex(super().forward(*inputs)), full_matrices=False)
        return u * s[:, None]


class InputGradient(Right):
    def forward(self, snapshots, *others):
        return super().forward((snapshots * 1.0).requires_grad_(), *others)


class NeverUpdated(Normalised):
    def __init__(self, task):
        super().__init__(task)
        self.norm.momentum = 0.0
