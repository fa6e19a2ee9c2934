"""The default network: a small residual perceptron that weighs and corrects what a pursuit of the scene has found.

The features know the physics and nothing of the statistics: how many sources there are, which atoms are noise, how far
an estimate at low SNR is to be trusted. That is what the network learns, from the covariance loss alone. It starts at
random: its first factors mix all columns and score about 1.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, R basis columns, Q factor columns.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ris_fast.config.schema import ConfigError, Task
from ris_fast.models.classical import Classical
from ris_fast.models.features import Features
from ris_fast.models.inputs import network_inputs
from ris_fast.models.linear import Linear
from ris_fast.models.prediction import Prediction
from ris_fast.models.simultaneous_pursuit import features_for

NO_PRODUCTS = " (the channel H itself: products H c_l cannot carry the answer)"


class ResidualBlock(nn.Module):
    """x + W2 gelu(W1 norm(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = Linear(width, width)
        self.outer = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(nn.functional.gelu(self.inner(self.norm(x)), approximate="tanh"))


class Backprojection(nn.Module):
    """Pursuit features -> residual perceptron -> factor F = basis x coefficients.

    Snapshots of zeros have no answer: their factor is zero. Any other finite scale of snapshots and channel gives one
        factor.
    Args:
        task: array, codes, symbols and ranges of the scenes.
        width, depth: of the perceptron; 2 width^2 parameters a block.
        atoms: sources that the pursuit looks for; 0: as many as `features_for` says.
    """

    def __init__(self, task: Task, *, width: int = 512, depth: int = 2, atoms: int = 0) -> None:
        super().__init__()
        if min(width, depth + 1) < 1 or atoms < 0:
            raise ConfigError(f"backprojection: width {width}, depth {depth} and atoms {atoms} must be positive.")
        self.task, self.columns = task, 2 * task.max_sources
        self.extract = features_for(task, atoms)
        self.rank = self.extract.rank
        self.stem = Linear(self.extract.width, width)
        self.blocks = nn.Sequential(*(ResidualBlock(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = Linear(width, 2 * self.rank * self.columns)

    def head_parameters(self) -> list[nn.Parameter]:
        """The group with a learning rate of its own: the last layer."""
        return list(self.head.parameters())

    def features(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Features:
        """Everything that holds no parameter: (B, L, M, 2), (B, M, N, 2), ([B,] L, N, 2), (B,) -> `Features`.

        Raises: TypeError or ValueError naming the input, what was given and what is expected.
        """
        return self.extract(
            *network_inputs("backprojection", self.task, snapshots, channel, codes, snr_db, why=NO_PRODUCTS)
        )

    def classical(self, features: Features) -> Classical:
        """What the features say without a network: the sources that the pursuit found, one by one."""
        return Classical("pursuit", self.extract.sources(features))

    def trunk(self, features: Features) -> Prediction:
        """The trainable part: inputs -> coefficients -> factor (B, N, Q, 2)."""
        hidden = self.norm(self.blocks(self.stem(features.inputs.to(self.stem.weight.dtype))))
        mix = self.head(hidden).float().unflatten(1, (2, self.rank, self.columns))
        with torch.autocast(mix.device.type, enabled=False):
            real, imag = mix.unbind(1)
            planar = features.basis @ torch.cat((torch.cat((real, imag), 2), torch.cat((-imag, real), 2)), dim=1)
        return Prediction(torch.stack(planar.chunk(2, dim=2), dim=-1))

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        return self.trunk(self.features(snapshots, channel, codes, snr_db))
