"""The network of the report that started this project: 16,339,075 parameters on RIS-12x12, all of them used there.

Legend: B batch, L snapshots, M base-station antennas, N = N_V N_H RIS elements, K sources, Q = 2 K factor columns,
T tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.config.schema import ConfigError, Task
from ris_fast.config.spelling import did_you_mean
from ris_fast.kernels.field.op import aperture_field
from ris_fast.kernels.scale import rescaled
from ris_fast.models.beams import GRID_ONLY, Beams, FieldPrior
from ris_fast.models.classical import Classical
from ris_fast.models.convolution import Conv1d
from ris_fast.models.hybrid_parts import AngleGrid, Block, CountHead, DiagonalMeans, PositionCode, factor_statistics
from ris_fast.models.inputs import network_inputs
from ris_fast.models.linear import Linear
from ris_fast.models.prediction import Prediction
from ris_fast.old_names import current_setting
from ris_fast.physics.channel import effective_channel
from ris_fast.physics.matched_filter import least_squares_channel

INPUTS = ("channel", "effective_channel")
RANGE_SHARE = 0.3
MIN_RANGE_M = 1e-3
TAPS = 5  # of the first convolutions
FIELD_STEPS, FIELD_SNR_DB = 8, (-40.0, 40.0)  # conjugate-gradient steps; beyond, the SNR makes no difference
POWER_STEPS = 4  # of the iteration that finds the phases of several fields
TINY = 1e-30


class HybridFeatures(NamedTuple):
    """What the trainable part sees; no unit, no parameter. Q focal planes, one for each column of the factor."""

    re: Tensor  # (B, Q, N_H, N_V)   coefficient of each beam; the powers of a scene have rms 1
    im: Tensor  # (B, Q, N_H, N_V)
    fine: Tensor  # (B, 2 L M)       powers of more beams, of one plane, times SNR / (1 + SNR)
    field: Tensor  # (B, N, P, 2)    the estimate of the field that all are made of


class Hybrid(nn.Module):
    """Convolutions and a transformer over near-field beams, beside two paths that see all of them; many heads.

    Args: inputs: what of the BS-RIS channel it is shown. 'channel': H itself; 'effective_channel': only H c_l, as the
        original's network was, from which the answer cannot be found: the channel is then the smallest one that
        explains them. Both have the same parameters.
    Model: the field on the surface is estimated from the snapshots by linear least squares with a prior
        (`aperture_field`, `FieldPrior`), and looked at through N beams in each of Q focal planes (`Beams`). The powers
        of these coefficients go into the network. What its factor heads say is a complex gain for each beam: column q
        of F = [A_angle, sqrt(0.3) A_range] is the sum of plane q's beams, each times its coefficient and its gain.
        So the phase of a scene, which a covariance does not have, never enters, and a network that has learned nothing
        of directions still puts power only where some was measured. Azimuth and elevation are the angle grid's
        soft-argmax plus the auxiliary head's offset in grid steps.
        Where each snapshot has symbols of its own, a coefficient is the rms over the snapshots' fields, with the phase
        of their principal component.
    Numerics: the units of snapshots and channel do not matter. Snapshots of zeros have no answer: a finite factor that
        means nothing.
    Source: public repository TahmidZee/ris-localization-mvdr (layer sizes); written anew. What its paths are fed and
        what its factors multiply are ours; the lab book says why.
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
        inputs: str = "channel",
    ) -> None:
        super().__init__()
        if task.elements_file:
            raise ConfigError(f"hybrid: its beams are products over rows and columns of elements. {GRID_ONLY}")
        inputs = current_setting("model.options.inputs", inputs)
        _check({"width": width, "layers": layers, "heads": heads, "feedforward": feedforward}, grid, dropout, inputs)
        self.task, self.inputs = task, inputs
        antennas, elements, sources, half = task.bs_antennas, task.elements, task.max_sources, width // 2
        self.beams, self.prior = Beams(task, 2 * sources), FieldPrior(task)
        self.fine_beams = Beams(task, 1, across=2 * task.snapshots, down=antennas)
        numbers = 2 * sources * elements
        tokens = math.ceil(numbers / (2 * antennas * TAPS))
        self._wrap("token_index", tokens * TAPS * 2 * antennas, numbers)
        self._wrap("plane_index", max(sources, TAPS) * 2 * elements, numbers)
        self.token_mix = Conv1d(2 * antennas, half, TAPS, stride=TAPS)
        self.token_depth = Conv1d(half, half, 3, padding=1, groups=half)
        self.token_widen = Conv1d(half, width, 1)
        self.position = PositionCode(tokens, width)
        self.blocks = nn.Sequential(*(Block(width, heads, feedforward, dropout) for _ in range(layers)))
        self.fine_path = Linear(2 * task.snapshots * antennas, half)
        self.plane_path = Conv1d(2 * elements, half, TAPS)
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

    def _wrap(self, name: str, count: int, numbers: int) -> None:
        """Which of `numbers` beams feed `count` inputs: all, and the first ones again where some are left."""
        self.register_buffer(name, torch.arange(count) % numbers, persistent=False)

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

    def trunk(self, features: HybridFeatures) -> Prediction:
        """The trainable part, from what `features` returned."""
        x_BD = self._fused(features)
        factor_BNQ, sources = self._factor(x_BD, features), self.task.max_sources
        with torch.autocast(x_BD.device.type, enabled=False):
            means = self.diagonal_means(factor_BNQ[:, :, :sources])
            statistics = factor_statistics(factor_BNQ, sources)
        x_BD = fn.gelu(self.refine(torch.cat((x_BD, self.pool(means.to(self.pool.weight.dtype))), dim=-1)))
        offset = self.angle_offset(x_BD).view(x_BD.shape[0], -1, 2)
        azimuth, elevation = self.angle_grid(x_BD, offset)
        range_m = fn.softplus(self.range_head(x_BD).float()) + MIN_RANGE_M
        count = self.count_head(x_BD, *(each.to(self.fuse.weight.dtype) for each in statistics))
        return Prediction(factor_BNQ, azimuth, elevation, range_m, count.float())

    @torch.no_grad()
    def features(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> HybridFeatures:
        """What the network is shown of scenes. Shapes as in `forward`."""
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
        with torch.autocast(given.snapshots.device.type, enabled=False):
            channel = self._channel(rescaled(given.channel), given.codes)
            field = aperture_field(
                channel,
                given.codes,
                rescaled(given.snapshots),
                given.snr_db.clamp(*FIELD_SNR_DB),
                static=self.task.symbols == "static",
                root=self.prior.root,
                steps=FIELD_STEPS,
            )
            re, im = _coefficients(*self.beams(field))
            fine = _coefficients(*self.fine_beams(field))
            share = torch.sigmoid(given.snr_db * (math.log(10.0) / 10.0))  # SNR / (1 + SNR), never inf / inf
            return HybridFeatures(re, im, _power(*fine).flatten(1) * share[:, None], field)

    def classical(self, features: HybridFeatures) -> Classical:
        """What the features say without a network: the estimate of the field that they are made of, (B, N, P, 2)."""
        return Classical("lmmse", features.field, field=True)

    def _channel(self, channel: Tensor, codes: Tensor) -> Tensor:
        """(B, M, N, 2), as the network may know it."""
        if self.inputs == "channel":
            return channel
        full = channel.shape[1:] == (self.task.bs_antennas, self.task.elements, 2)
        return least_squares_channel(effective_channel(channel, codes) if full else channel, codes)

    def _fused(self, features: HybridFeatures) -> Tensor:
        """The fused features (B, D)."""
        powers, dtype = _power(features.re, features.im), self.fuse.weight.dtype
        by_direction = powers.permute(0, 2, 3, 1).flatten(1)[:, self.token_index].to(dtype)
        tokens = by_direction.unflatten(1, (-1, self.token_mix.in_channels)).transpose(1, 2)
        y = fn.gelu(self.token_mix(tokens))
        y = fn.gelu(self.token_widen(self.token_depth(y))).transpose(1, 2)
        y = self.blocks(self.position(y, dtype)).mean(1)
        h = fn.gelu(self.fine_path(features.fine.to(dtype)))
        planes = powers.flatten(1)[:, self.plane_index].to(dtype).unflatten(1, (-1, self.plane_path.in_channels))
        c = fn.gelu(self.plane_path(planes.transpose(1, 2))).mean(2)
        return fn.gelu(self.fuse(torch.cat((y, h, c), dim=-1)))

    def _factor(self, x_BD: Tensor, features: HybridFeatures) -> Tensor:
        """F = [A_angle, sqrt(0.3) A_range]: to each column the beams of its plane, as the heads weigh them."""
        angle, range_ = self.angle_factor(x_BD).float(), self.range_factor(x_BD).float()
        gains = torch.cat((angle, math.sqrt(RANGE_SHARE) * range_), -1).unflatten(1, (-1, *self.beams.size, 2))
        with torch.autocast(x_BD.device.type, enabled=False):
            re, im = gains.unbind(-1)
            return self.beams.field(re * features.re - im * features.im, re * features.im + im * features.re)

    @torch.no_grad()
    def _initialise(self, layers: int) -> None:
        """Keeps the variance of the features through the convolutions, which torch's default divides by 200."""
        for layer in (
            self.token_mix,
            self.token_depth,
            self.token_widen,
            self.fine_path,
            self.plane_path,
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


def _power(re: Tensor, im: Tensor) -> Tensor:
    return re.square() + im.square()


def _coefficients(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """Of a scene's fields, its coefficients, their powers with rms 1: (B, P, ...) twice -> (B, ...) twice."""
    re, im = (re[:, 0], im[:, 0]) if re.shape[1] == 1 else _rms_in_phase(re, im)
    power = _power(re, im).flatten(1)
    level = power.amax(1).clamp_min(TINY)  # first, so that squares of powers stay representable
    rms = (power / level[:, None]).square().mean(1).sqrt().clamp_min(1e-6)
    scale = (level * rms).rsqrt().view(-1, *[1] * (re.dim() - 1))
    return re * scale, im * scale


def _rms_in_phase(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
    """The rms over fields, with the phases of their principal component: (B, P, ...) twice -> (B, ...) twice.

    By power iteration, from the fields' values in the strongest beam.
    """
    shape, x_re, x_im = re.shape[2:], re.flatten(2), im.flatten(2)
    power = _power(x_re, x_im).mean(1)
    x_re, x_im = (each * power.amax(1).clamp_min(TINY).rsqrt()[:, None, None] for each in (x_re, x_im))
    strongest = power.argmax(1)[:, None, None].expand(-1, re.shape[1], 1)
    v_re, v_im = x_re.gather(2, strongest), x_im.gather(2, strongest)  # (B, P, 1)
    for _ in range(POWER_STEPS):
        c_re, c_im = ((v_re * x_re + v_im * x_im).sum(1), (v_re * x_im - v_im * x_re).sum(1))  # v^H x, (B, ...)
        v_re = (x_re * c_re[:, None] + x_im * c_im[:, None]).sum(2, keepdim=True)  # x c^H
        v_im = (x_im * c_re[:, None] - x_re * c_im[:, None]).sum(2, keepdim=True)
        size = _power(v_re, v_im).sum(1, keepdim=True).clamp_min(TINY).rsqrt()
        v_re, v_im = v_re * size, v_im * size
    c_re, c_im = (v_re * x_re + v_im * x_im).sum(1), (v_re * x_im - v_im * x_re).sum(1)
    turn = power.sqrt() * _power(c_re, c_im).clamp_min(TINY).rsqrt()
    return (c_re * turn).unflatten(1, shape), (c_im * turn).unflatten(1, shape)


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
