"""The network of the report that started this project: 16,339,075 parameters on RIS-12x12, every one of them used.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K sources, Q = 2 K factor columns, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.config.schema import ConfigError, Task
from ris_fast.config.spelling import did_you_mean
from ris_fast.kernels.scale import rescaled
from ris_fast.models.hybrid_parts import AngleGrid, Block, CountHead, DiagonalMeans, factor_statistics, position_code
from ris_fast.models.inputs import network_inputs
from ris_fast.models.linear import Linear
from ris_fast.models.prediction import Prediction
from ris_fast.old_names import current_setting
from ris_fast.physics.channel import backproject, effective_channel
from ris_fast.physics.real_complex import power

INPUTS = ("backprojection", "effective_channel")
RANGE_SHARE = 0.3
MIN_RANGE_M = 1e-3


class Hybrid(nn.Module):
    """Convolutions and a transformer over the snapshots, beside a channel path and a code path; many heads.

    Args: inputs: what the (L, N, 2) input of the code path is. 'backprojection': conj(c_l) o (H^H y_l), which carries
        the sensing operator; 'effective_channel': the codes alone, as in the original, where the network sees the
        channel only as H c_l and its inputs cannot carry the answer. Both have the same parameters.
    Model: F = [A_angle, sqrt(0.3) A_range]. Azimuth and elevation are the angle grid's soft-argmax plus the auxiliary
        head's offset in grid steps. Every complex input is divided by its rms over the scene (measurements span
        70 dB), and measurements are then scaled by sqrt(SNR/(1 + SNR)), the share of them that is signal. With
        inputs='backprojection' the first column of A_angle is the matched filter, the sum of the back-projections,
        plus what its head says: from a factor that does not depend on the scene, an odd function of the field is
        invisible to the first-order gradient (F and -F are one covariance), and training stays on that plateau.
    Numerics: the units of snapshots and channel do not matter. Snapshots of zeros have no answer: a finite factor that
        means nothing.
    Source: public repository TahmidZee/ris-localization-mvdr (layer sizes); written anew.
    """

    def __init__(
        self,
        task: Task,
        *,
        width: int = 448,
        layers: int = 4,
        heads: int = 8,
        feedforward: int = 512,
        grid: int = 61,
        dropout: float = 0.0,
        inputs: str = "backprojection",
    ) -> None:
        super().__init__()
        inputs = current_setting("model.options.inputs", inputs)
        _check({"width": width, "layers": layers, "heads": heads, "feedforward": feedforward}, grid, dropout, inputs)
        self.task, self.inputs = task, inputs
        antennas, elements, sources, half = task.bs_antennas, task.elements, task.max_sources, width // 2
        self.y_mix = nn.Conv1d(2 * antennas, half, 5, padding=2)
        self.y_depth = nn.Conv1d(half, half, 3, padding=1, groups=half)
        self.y_widen = nn.Conv1d(half, width, 1)
        self.register_buffer("position_LD", position_code(task.snapshots, width), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, heads, feedforward, dropout) for _ in range(layers)))
        self.channel_path = Linear(2 * task.snapshots * antennas, half)
        self.code_path = nn.Conv1d(2 * elements, half, 5, padding=2)
        self.fuse = Linear(2 * width, width)
        self.angle_factor = Linear(width, 2 * elements * sources)
        self.range_factor = Linear(width, 2 * elements * sources)
        self.diagonal_means = DiagonalMeans(elements)
        self.pool = Linear(4 * elements - 2, width // 4)
        self.refine = Linear(width + width // 4, width)
        self.angle_grid = AngleGrid(
            width, sources, grid, math.radians(task.azimuth_deg), math.radians(task.elevation_deg)
        )
        self.angle_offset = Linear(width, 2 * sources)
        self.range_head = Linear(width, sources)
        self.count_head = CountHead(width, sources)
        self._initialise(layers)

    def head_parameters(self) -> list[nn.Parameter]:
        """The group with the higher learning rate, as in the original: factors, grid, auxiliary, count statistics."""
        heads = (
            self.angle_factor,
            self.range_factor,
            self.angle_grid,
            self.angle_offset,
            self.range_head,
            self.count_head.statistics,
        )
        return [parameter for head in heads for parameter in head.parameters()]

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        """Shapes: snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2) or (B, L, N, 2), snr_db (B,) dB.

        With inputs='effective_channel' the channel may be given as H c_l, (B, L, M, 2).
        """
        return self.trunk(self.features(snapshots, channel, codes, snr_db))

    def trunk(self, features: tuple[Tensor, Tensor, Tensor]) -> Prediction:
        """The trainable part, from what `features` returned."""
        snapshots, seen, pattern = features
        x_BD = self._fused(snapshots, seen, pattern)
        angle_BNK, range_BNK = (
            head(x_BD).float().view(x_BD.shape[0], self.task.elements, -1, 2)
            for head in (self.angle_factor, self.range_factor)
        )
        if self.inputs == "backprojection":
            angle_BNK = _add_to_first_column(angle_BNK, _unit_rms(pattern.sum(1).float()))
        factor_BNQ = torch.cat((angle_BNK, math.sqrt(RANGE_SHARE) * range_BNK), dim=2)
        with torch.autocast(x_BD.device.type, enabled=False):
            means, statistics = self.diagonal_means(angle_BNK), factor_statistics(factor_BNQ, angle_BNK.shape[2])
        x_BD = fn.gelu(self.refine(torch.cat((x_BD, self.pool(means.to(self.pool.weight.dtype))), dim=-1)))
        offset = self.angle_offset(x_BD).view(x_BD.shape[0], -1, 2)
        azimuth, elevation = self.angle_grid(x_BD, offset)
        range_m = fn.softplus(self.range_head(x_BD).float()) + MIN_RANGE_M
        count = self.count_head(x_BD, *(each.to(self.fuse.weight.dtype) for each in statistics))
        return Prediction(factor_BNQ, azimuth, elevation, range_m, count.float())

    @torch.no_grad()
    def features(
        self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised inputs of the three paths: (B, L, M, 2), (B, L, M, 2) and (B or 1, L, N, 2)."""
        given = network_inputs(
            "hybrid",
            self.task,
            snapshots,
            channel,
            codes,
            snr_db,
            products=self.inputs == "effective_channel",
            why=f" (inputs='{self.inputs}'; H c_l needs inputs='effective_channel')",
        )
        if given.snapshots.shape[1] != self.task.snapshots:
            raise ValueError(
                f"hybrid: there are {given.snapshots.shape[1]} snapshots a scene, expected task.snapshots ="
                f" {self.task.snapshots}: its layers are made for that many. Build it for a task with as many as the"
                " data."
            )
        snapshots, channel, codes = rescaled(given.snapshots), rescaled(given.channel), given.codes
        full = channel.shape[1:] == (self.task.bs_antennas, self.task.elements, 2)
        share = torch.sigmoid(given.snr_db * (math.log(10.0) / 10.0)).sqrt()[
            :, None, None, None
        ]  # SNR / (1 + SNR), never inf / inf
        seen = effective_channel(channel, codes) if full else channel
        pattern = (
            (codes if codes.dim() == 4 else codes[None])
            if self.inputs == "effective_channel"
            else _unit_rms(backproject(channel, codes, snapshots)) * share
        )
        return _unit_rms(snapshots) * share, _unit_rms(seen), pattern

    def _fused(self, snapshots: Tensor, seen: Tensor, pattern: Tensor) -> Tensor:
        """The fused features (B, D)."""
        snapshots, seen, pattern = (each.to(self.fuse.weight.dtype) for each in (snapshots, seen, pattern))
        y = fn.gelu(self.y_mix(snapshots.flatten(2).transpose(1, 2)))
        y = fn.gelu(self.y_widen(self.y_depth(y))).transpose(1, 2)
        y = self.blocks(y + self.position_LD).mean(1)
        h = fn.gelu(self.channel_path(seen.flatten(1)))
        c = fn.gelu(self.code_path(pattern.flatten(2).transpose(1, 2))).mean(2).expand(y.shape[0], -1)
        return fn.gelu(self.fuse(torch.cat((y, h, c), dim=-1)))

    @torch.no_grad()
    def _initialise(self, layers: int) -> None:
        """Keeps the variance of the features through the convolutions, which torch's default divides by 200."""
        for layer in (
            self.y_mix,
            self.y_depth,
            self.y_widen,
            self.channel_path,
            self.code_path,
            self.fuse,
            self.refine,
        ):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        for block in self.blocks:
            for layer in (block.out, block.narrow):
                layer.weight.div_(math.sqrt(2 * layers))
        for layer in (self.angle_factor, self.range_factor, self.angle_grid.logits, self.angle_offset, self.range_head):
            nn.init.normal_(layer.weight, std=0.3 / math.sqrt(layer.in_features))
        for layer in (self.angle_factor, self.range_factor):
            layer.bias.zero_()
        self.range_head.bias.fill_(0.5 * (self.task.range_min_m + self.task.range_max_m))


def _add_to_first_column(factor_BNK: Tensor, field_BN: Tensor) -> Tensor:
    return torch.cat((factor_BNK[:, :, :1] + field_BN[:, :, None], factor_BNK[:, :, 1:]), dim=2)


def _unit_rms(a: Tensor) -> Tensor:
    """(B, ..., 2) divided by its rms over the scene, for entries whose squares are representable; all zeros stay
    zeros."""
    mean = power(a).flatten(1).mean(1).clamp_min(torch.finfo(a.dtype).tiny)
    return a * mean.rsqrt().view(-1, *[1] * (a.dim() - 1))


def _check(sizes: Mapping[str, int], grid: int, dropout: float, inputs: str) -> None:
    if inputs not in INPUTS:
        raise ConfigError(f"hybrid: inputs is {inputs!r}.{did_you_mean(inputs, INPUTS)}")
    for name, size in sizes.items():
        if size < (0 if name == "layers" else 1):
            raise ConfigError(
                f"hybrid: {name} = {size} is too small; it must be at least {0 if name == 'layers' else 1}."
            )
    if sizes["width"] % 4 or sizes["width"] % sizes["heads"]:
        raise ConfigError(f"hybrid: width = {sizes['width']} must be a multiple of 4 and of heads = {sizes['heads']}.")
    if grid < 2:
        raise ConfigError(f"hybrid: grid = {grid} must be at least 2 points a side.")
    if not 0.0 <= dropout < 1.0:
        raise ConfigError(f"hybrid: dropout = {dropout} must be at least 0 and below 1.")
