"""The parts of the hybrid network: encoder block, factor statistics, angle grid, count head.

Legend: B batch, L tokens, N RIS elements, K sources, Q factor columns, D width, G grid points a side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as fn

from ris_fast.kernels.attention.op import attention
from ris_fast.models.constants import Constants
from ris_fast.models.linear import Linear, linear
from ris_fast.physics.real_complex import adjoint_matmul, power

TINY = 1e-12


class Block(nn.Module):
    """A pre-norm transformer layer: attention over the tokens, then a two-layer perceptron."""

    def __init__(self, width: int, heads: int, feedforward: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attend, self.norm_feed = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = Linear(width, 3 * width), Linear(width, width)
        self.widen, self.narrow = Linear(width, feedforward), Linear(feedforward, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD + self._drop(self.out(self._mix(self.qkv(self.norm_attend(x_BLD)))))
        return x_BLD + self._drop(self.narrow(fn.gelu(self.widen(self.norm_feed(x_BLD)))))

    def _mix(self, qkv: Tensor) -> Tensor:
        return attention(qkv, self.heads)

    def _drop(self, x: Tensor) -> Tensor:
        return fn.dropout(x, self.dropout, self.training)


class PositionCode(Constants):
    """Adds fixed sinusoids to tokens (B, L, D): which of them each is, at no parameter."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(1e3) / width))
        angle = torch.arange(length)[:, None] * rate
        self.register_buffer("code_LD", torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1), persistent=False)

    def forward(self, x_BLD: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """`dtype`: of the code in the sum."""
        return x_BLD + self.code_LD.to(dtype)


class DiagonalMeans(Constants):
    """Means of A A^H, unit diagonal, along its diagonals and anti-diagonals, without forming it: (B, 4N - 2).

    Model: with rows of A scaled to unit norm, sum_{i-j=s} R_ij is the autocorrelation of A's columns and
        sum_{i+j=s} R_ij their convolution with their own conjugate. Both are products after a Fourier transform of
        length 2N (long enough not to wrap), here two products with constant matrices, so no complex dtype appears:
        with X(f) the transform of a column, |X(f)|^2 and, for f >= 0 alone, X(f) X(-f)^*, which X(-f) X(f)^* mirrors.
        Of a Hermitian R the anti-diagonal sums are real (2N - 1 numbers) and the diagonal sums come in conjugate
        pairs (N real and N - 1 imaginary parts); together 4N - 2 numbers, none of them zero for every input.
    Cost: 8 B K N^2 + 16 B N^2 multiply-adds, O(B K N) memory.
    """

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements = elements
        self.register_buffer("forward_DFT", _forward_dft(elements), persistent=False)
        self.register_buffer("inverse_DFT", _inverse_dft(elements), persistent=False)

    def forward(self, factor_BNK: Tensor) -> Tensor:
        unit = factor_BNK * torch.rsqrt(power(factor_BNK).sum(-1) + TINY)[..., None, None]
        columns = unit.permute(0, 2, 3, 1).flatten(2)  # (B, K, 2N): real parts, then imaginary
        re, im = linear(columns, self.forward_DFT.t()).chunk(2, dim=-1)  # (B, K, 2N + 2) each: at f, then at -f
        (re_f, re_minus), (im_f, im_minus) = re.chunk(2, dim=-1), im.chunk(2, dim=-1)
        spectra = (re * re + im * im, re_f * re_minus + im_f * im_minus, im_f * re_minus - re_f * im_minus)
        return linear(torch.cat(spectra, dim=-1).sum(1), self.inverse_DFT.t())


def _phases(rows: Tensor, columns: Tensor, period: int) -> Tensor:
    """2 pi (row * column mod period) / period in float64; the integer remainder keeps large products exact."""
    return (rows[:, None] * columns % period).double() * (2.0 * math.pi / period)


def _forward_dft(elements: int) -> Tensor:
    """(2N, 4N + 4): [re | im] of a column -> [re | im] of its transform of length 2N at f = 0 .. N and 0 .. -N."""
    frequency = torch.arange(elements + 1)
    angle = _phases(torch.arange(elements), torch.cat((frequency, -frequency)), 2 * elements)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((torch.cat((cos, -sin), 1), torch.cat((sin, cos), 1)), 0).float()


def _inverse_dft(elements: int) -> Tensor:
    """(4N + 4, 4N - 2): the spectra -> real and imaginary diagonal means, then anti-diagonal means."""
    period, frequency = 2 * elements, torch.arange(elements + 1)
    both = torch.cat((frequency, -frequency))
    lag, total = torch.arange(elements), torch.arange(2 * elements - 1)
    once = torch.where((frequency == 0) | (frequency == elements), 0.5, 1.0).double()[:, None]  # f and -f are one there
    lag_angle, total_angle = _phases(both, lag, period), _phases(frequency, total, period)
    lag_share = once.repeat(2, 1) / (elements - lag)
    total_share = 2.0 * once / torch.minimum(total + 1, 2 * elements - 1 - total)
    rows = len(both)
    table = torch.zeros(2 * rows, 4 * elements - 2, dtype=torch.float64)
    table[:rows, :elements] = lag_share * lag_angle.cos()
    table[:rows, elements : 2 * elements - 1] = (lag_share * lag_angle.sin())[:, 1:]
    table[rows:, 2 * elements - 1 :] = torch.cat((total_share * total_angle.cos(), -total_share * total_angle.sin()))
    return (table / period).float()


@torch.no_grad()
def factor_statistics(factor_BNQ: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """How many directions a factor spans, said without an eigendecomposition: (B, 2K + 2) and (B, 4K + 2).

    First: column powers as sorted shares, the inverse of sum lambda^2, the mean coherence. Second: logs of the
    shares, then Renyi entropies -log(tr C^k)/(k - 1) of the trace-normalised Gram matrix C, orders 2 .. K + 3 for the
    whole factor and 2 .. K + 1 for its first K columns: smooth functions of the eigenvalues of F F^H, finite for
    equal, repeated and zero ones. Not differentiated: the count reads the covariance and does not bend it.
    """
    gram = adjoint_matmul(factor_BNQ, factor_BNQ)
    whole, first = _unit_trace(gram), _unit_trace(gram[:, :sources, :sources])
    shares = whole.diagonal(dim1=1, dim2=2)[:, 0].sort(dim=-1, descending=True).values
    entropies, entropies_first = _entropies(whole, sources + 3), _entropies(first, sources + 1)
    purity = power(whole).sum((1, 2))
    coherence = (purity - shares.square().sum(-1)) / (1.0 - shares.square().sum(-1) + 1e-6)
    short = torch.cat((shares, torch.stack((torch.exp(entropies[:, 0]), coherence), -1)), -1)
    return short, torch.cat(((shares + 1e-6).log(), entropies, entropies_first), -1)


def _unit_trace(gram: Tensor) -> Tensor:
    return gram / (gram.diagonal(dim1=1, dim2=2)[:, 0].sum(-1) + TINY)[:, None, None, None]


def _entropies(gram_BQQ: Tensor, highest: int) -> Tensor:
    """-log(tr C^k)/(k - 1) for k = 2 .. highest, from powers up to half of it: (B, highest - 1)."""
    re, im = gram_BQQ.unbind(-1)
    powers = [torch.cat((torch.cat((re, -im), -1), torch.cat((im, re), -1)), -2)]
    while 2 * len(powers) < highest:
        powers.append(powers[-1] @ powers[0])
    moments = [0.5 * (powers[k // 2 - 1] * powers[k - k // 2 - 1]).sum((1, 2)) for k in range(2, highest + 1)]
    order = torch.arange(1, highest, device=re.device)
    entropies = -(torch.stack(moments, -1) + TINY).log() / order
    return entropies.clamp_max(math.log(gram_BQQ.shape[1]))  # the most there is; a zero factor would have more


class AngleGrid(Constants):
    """Soft-argmax over a (G, G) grid of directions for each of K slots: coarse azimuth and elevation, (B, K) each."""

    def __init__(
        self, width: int, sources: int, grid: int, azimuth: float, elevation: float, temperature: float = 0.15
    ) -> None:
        super().__init__()
        self.sources, self.temperature = sources, temperature
        self.logits = Linear(width, sources * grid * grid)
        points = torch.cartesian_prod(
            *(torch.linspace(-end, end, grid, dtype=torch.float32) for end in (azimuth, elevation))
        )
        self.register_buffer("points_G2", points, persistent=False)
        self.register_buffer(
            "step", torch.tensor((azimuth, elevation), dtype=torch.float32) * (2.0 / (grid - 1)), persistent=False
        )

    def forward(self, x_BD: Tensor, offset_BK2: Tensor) -> tuple[Tensor, Tensor]:
        """`offset_BK2`: what to add to the grid's answer, in units of a grid step."""
        logits = self.logits(x_BD).view(x_BD.shape[0], self.sources, -1).float()
        chance = torch.softmax(logits / self.temperature, dim=-1)
        angles = chance @ self.points_G2 + offset_BK2.float() * self.step
        return angles[..., 0], angles[..., 1]


class CountHead(nn.Module):
    """Logits of 1 .. K sources: the mean of what the factor's statistics say and what the features say."""

    def __init__(self, width: int, sources: int) -> None:
        super().__init__()
        short, long = 2 * sources + 2, 4 * sources + 2
        self.statistics = _perceptron(long, sources)
        self.project = nn.Sequential(Linear(short, width // 4), nn.GELU(), Linear(width // 4, width // 4))
        self.fuse = Linear(width + width // 4, width)
        self.direct = _perceptron(width, sources)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x_BD: Tensor, short: Tensor, long: Tensor) -> Tensor:
        fused = fn.gelu(self.fuse(torch.cat((x_BD, self.project(short)), dim=-1)))
        return 0.5 * (self.statistics(long) + self.direct(fused)) * self.scale


def _perceptron(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(inputs), Linear(inputs, 128), nn.ReLU(), Linear(128, outputs))
