"""A network of your own for ris-fast: change whatever you like.

    ris-fast check --set model.name=FILE:BeamNet      what is wrong with it, before anything is trained
    ris-fast train --set model.name=FILE:BeamNet      options of __init__: --set model.options.width=256

The idea of this one: estimate the field on the surface from the snapshots, look at it through a grid of beams (a
Fourier transform over the aperture), let a perceptron say how much of each beam belongs to each column of the factor,
and put the columns together from the weighted beams. Only `__init__` and `forward` are required.

Letters: B scenes, L snapshots, M antennas, N = V H elements (V rows of H), Q columns. Complex numbers are real pairs,
(..., 2), unless you convert them: torch.view_as_complex(x) and torch.view_as_real(z).
"""

import torch
from torch import Tensor, nn

from ris_fast.config.schema import Task
from ris_fast.kernels.field.op import aperture_field
from ris_fast.models import Prediction


class BeamNet(nn.Module):
    def __init__(self, task: Task, width: int = 512, depth: int = 2) -> None:
        """`task` has the sizes: bs_antennas M, ris_horizontal H, ris_vertical V, snapshots L, max_sources K."""
        super().__init__()
        self.columns = 2 * task.max_sources
        self.register_buffer("fourier", fourier(task), persistent=False)  # a buffer moves to the GPU with the rest
        self.stem = nn.Linear(task.elements + 1, width)
        self.blocks = nn.ModuleList(  # a plain python list would hide them from torch
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 2 * self.columns * task.elements)

    def forward(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Prediction:
        """Snapshots y (B, L, M, 2), channel H (B, M, N, 2), codes c (L, N, 2) or (B, L, N, 2), snr_db (B,) in dB, all
        float32: y_l = H diag(c_l) x + noise. Returns the factor F of the covariance R = F F^H of x, as real pairs
        (B, N, Q, 2) or complex (B, N, Q). Its scale does not matter: the loss compares covariances of trace 1.
        """
        return self.trunk(self.features(snapshots, channel, codes, snr_db))

    # ---- optional: docs/own-network.md says what each of these buys -------------------------------------------------

    @torch.no_grad()
    def features(self, snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> tuple[Tensor, ...]:
        """What holds no parameter: it is not compiled, and validation computes it only once."""
        field = aperture_field(
            channel, codes, snapshots, snr_db, steps=8
        )  # x by regularised least squares, (B, N, 1, 2)
        field = field / field.square().mean((1, 2, 3), keepdim=True).clamp_min(1e-30).sqrt()  # no units from here on
        beams = field[:, :, 0].transpose(1, 2).flatten(1) @ self.fourier  # [real | imaginary] of each, (B, 2 N)
        return beams, snr_db, field

    def trunk(self, features: tuple[Tensor, ...]) -> Prediction:
        """What is trained, from what `features` returned."""
        beams, snr_db, _ = features
        real, imag = beams.chunk(2, 1)
        power = (real.square() + imag.square()).log1p()  # a covariance does not have the phase of its scene
        x = self.stem(torch.cat((power, snr_db[:, None] / 20.0), 1))
        for block in self.blocks:
            x = x + block(x)
        a, b = self.head(x).float().unflatten(1, (2, self.columns, -1)).unbind(1)  # gain a + jb of each beam and column
        real, imag = real[:, None], imag[:, None]
        columns = torch.cat((a * real - b * imag, a * imag + b * real), 2) @ self.fourier.t()  # (B, Q, 2 N)
        return Prediction(columns.unflatten(2, (2, -1)).permute(0, 3, 1, 2))

    def head_parameters(self) -> list[nn.Parameter]:
        """Those that learn at optimizer.head_lr; the others learn at optimizer.backbone_lr."""
        return list(self.head.parameters())

    def classical(self, features: tuple[Tensor, ...]) -> tuple[str, Tensor, bool]:
        """What the features say without a network: (name, its factor, whether that is one field of all sources). Runs
        are shown beside it, and have learned only where they beat it."""
        return "least_squares", features[2], True


def fourier(task: Task) -> Tensor:
    """The unitary Fourier transform over the aperture, for rows [real | imaginary]: real, (2 N, 2 N)."""

    def axis(elements: int) -> Tensor:
        place = torch.arange(elements, dtype=torch.float64)
        turn = torch.outer(place - (elements - 1) / 2, place) * 2 * torch.pi / elements
        return torch.polar(torch.full_like(turn, elements**-0.5), -turn)

    matrix = torch.kron(axis(task.ris_vertical), axis(task.ris_horizontal))
    top, bottom = torch.cat((matrix.real, matrix.imag), 1), torch.cat((-matrix.imag, matrix.real), 1)
    return torch.cat((top, bottom)).float()
