"""The peer that a careful user assembles from torch: autocast, dense loss, fused AdamW, foreach clip and average.

Legend: B batch, N RIS elements, Q factor columns.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Config
from ris_fast.physics.real_complex import to_complex, to_pairs
from ris_fast.physics.scenes import Scenes
from ris_fast.training.loss import CovarianceLoss
from ris_fast.training.mfu import plain_network
from ris_fast.training.step import autocast, network_inputs, parameter_groups


def with_dense_target(scenes: Scenes) -> Scenes:
    """The scenes with R = S S^H, trace N, as a data set of dense targets stores it: (B, N, N, 2)."""
    target = to_complex(scenes.factor)
    return replace(scenes, covariance=to_pairs(unit_trace(target @ target.mH)))


def unit_trace(cov_BNN: Tensor) -> Tensor:
    """Complex (B, N, N) scaled to trace N."""
    trace = cov_BNN.diagonal(dim1=1, dim2=2).real.sum(-1).clamp_min(1e-9)
    return cov_BNN * (cov_BNN.shape[-1] / trace)[:, None, None]


class DenseLoss(CovarianceLoss):
    """The same objective; the covariance NMSE in complex arithmetic through N x N, without loading or shrinkage."""

    def nmse(self, factor: Tensor, scenes: Scenes, *, blend: bool) -> Tensor:
        if blend or self.settings.loading or self.settings.shrink:
            raise ValueError("DenseLoss: serves loss.beta = loss.loading = loss.shrink = 0 only.")
        field, target = to_complex(factor), to_complex(scenes.covariance)
        error = unit_trace(field @ field.mH) - target
        return error.abs().square().sum((1, 2)) / target.abs().square().sum((1, 2))


class EagerLoop:
    """`step(scenes)`: one optimizer step. `compile`: the network under torch.compile, as a user would put it there."""

    def __init__(self, config: Config, device: torch.device, compile: bool = False) -> None:
        self.config, self.device = config, device
        self.model = plain_network(config, device)
        self.network = torch.compile(self.model, dynamic=False) if compile else self.model
        self.loss = DenseLoss(config.loss, config.task).to(device)
        groups = [
            {**group, "params": [parameter for _, parameter in group["params"]]}
            for group in parameter_groups(self.model, config.optimizer)
        ]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    def step(self, scenes: Scenes) -> Tensor:
        """Forward, loss, backward, clip, update, average; the loss stays on the device."""
        with autocast(self.device, self.config.training.precision):
            prediction = self.network(*network_inputs(scenes))
        loss, _ = self.loss(prediction, scenes)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.max_grad_norm or float("inf"), foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1.0 - self.config.optimizer.ema_decay)
        return loss.detach()
