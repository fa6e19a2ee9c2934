"""The pursuit's Triton kernels restated in plain torch for a whole batch: same arguments, layouts, strips and order of
elimination, in float32. Runs the launcher on thousands of scenes, which the interpreter cannot.

`restated(monkeypatch)` puts them in the place of the launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ris_fast.kernels.pursuit.reference import TINY, WORKING_SNR_DB, Pursuit, _basis, _inputs
from ris_fast.kernels.pursuit.search import TANGENTS, Atoms, Geometry, Normal
from ris_fast.kernels.scale import power_of_two

STRIP = 16


def scene_kernel(levels: Tensor, moment: Tensor, y: Tensor, h: Tensor, codes: Tensor, *sizes: Any) -> None:
    energy, ratio = sizes[-2:]
    y_scale, h_scale = power_of_two(y), power_of_two(h)
    column = ((h_scale * h).square().sum((1, 2, 3)) * ratio).clamp_min(1e-18)
    level = ((y_scale * y).square().sum((1, 2, 3)) / energy).clamp_min(1e-18)
    levels.copy_(torch.stack((h_scale.flatten(), 1 / column), 1))
    back = torch.einsum("bmn,blm->bnl", complex_of(h_scale * h).conj(), complex_of(y_scale * y))
    b = torch.einsum("xln,bnl->bn" if codes.dim() == 3 else "bln,bnl->bn", sets(codes).conj(), back)
    moment.copy_(torch.view_as_real(b / (column * level).sqrt()[:, None]))


def gram_kernel(gram: Tensor, h: Tensor, codes: Tensor, levels: Tensor, *sizes: Any) -> None:
    scaled = complex_of(levels[:, :1, None, None] * h)
    p = (scaled.mH @ scaled) * (sets(codes).mH @ sets(codes)) * levels[:, 1:, None]
    gram.copy_(torch.cat((p.real, -p.imag), 2))


def search_kernel(
    position: Tensor,
    moment: Tensor,
    image: Tensor,
    fit: Tensor,
    along_x: Tensor,
    along_y: Tensor,
    grid: Tensor,
    atom: int,
    wide: int,
    high: int,
    *_: Any,
) -> None:
    residual = torch.empty_like(moment)
    if atom:
        residual_kernel(residual, moment, image, fit, atom)
    rows = complex_of(residual if atom else moment).view(-1, high, wide)
    scores = torch.einsum("byx,wxu,wyv->buvw", rows, complex_of(along_x).conj(), complex_of(along_y).conj())
    position[:, atom] = grid[scores.abs().square().flatten(1).argmax(1)]


def pick_kernel(position: Tensor, scores: Tensor, grid: Tensor, atom: int, *sizes: Any) -> None:
    real, imag = scores.chunk(2, 1)
    position[:, atom] = grid[(real.square() + imag.square()).argmax(1)]


def tangents_kernel(
    columns: Tensor, position: Tensor, x: Tensor, y: Tensor, curvature: Tensor, scale: Tensor, atoms: int, *rest: Any
) -> None:
    pursuit = pursuit_of(x, y, curvature, scale, wavenumber=rest[2])
    real, imag = pursuit.tangents(position[:, :atoms]).transpose(1, 2).chunk(2, 1)
    columns.copy_(torch.cat((torch.cat((real, imag), 2), torch.cat((imag, -real), 2)), 1))


def inner_kernel(
    gram: Tensor, inner: Tensor, columns: Tensor, image: Tensor, moment: Tensor, atoms: int, *_: Any
) -> None:
    count, (re, im) = TANGENTS * atoms, image.chunk(2, 1)
    d_re, d_im = columns[:, :count].chunk(2, 2)
    gram[:, :, :count, :count], inner[:, :, :count] = 0.0, 0.0
    for part in torch.arange(re.shape[2]).split(STRIP):
        a, b, c, d = d_re[..., part], d_im[..., part], re[..., part].mT, im[..., part].mT
        gram[:, 0, :count, :count] += a @ c + b @ d
        gram[:, 1, :count, :count] += a @ d - b @ c
        b_re, b_im = moment[:, None, part].unbind(-1)
        inner[:, 0, :count] += (a * b_re + b * b_im).sum(2)
        inner[:, 1, :count] += (a * b_im - b * b_re).sum(2)


def spd_solve(a: Tensor, side: Tensor) -> Tensor:
    """By rank-one updates with the row alone, the way back by rows: (B, n, n), (B, n)."""
    size = a.shape[1]
    a, least = torch.cat((a, side[..., None]), 2), 1e-6 * a.diagonal(dim1=1, dim2=2)
    inverse, x = torch.empty_like(side), torch.zeros_like(side)
    for k in range(size):
        row = a[:, k].clone()
        inverse[:, k] = 1 / torch.maximum(row[:, k], least[:, k])
        factor = row[:, k + 1 : size] * inverse[:, k, None]
        a[:, k + 1 :, k:] -= factor[..., None] * row[:, None, k:]
    for k in reversed(range(size)):
        x[:, k] = (a[:, k, size] - (a[:, k, k + 1 : size] * x[:, k + 1 :]).sum(1)) * inverse[:, k]
    return x


def solve_kernel(
    fit: Tensor,
    position: Tensor,
    left: Tensor,
    explained: Tensor,
    stage_positions: Tensor,
    stage_amplitudes: Tensor,
    gram: Tensor,
    inner: Tensor,
    snr_db: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    trust: Tensor,
    atoms: int,
    energy: float,
    **_: Any,
) -> None:
    batch, count = len(fit), TANGENTS * atoms
    noise, ridge = noise_of(snr_db, energy)
    g = torch.complex(gram[:, 0, :count, :count], gram[:, 1, :count, :count])
    m = torch.complex(inner[:, 0, :count], inner[:, 1, :count])
    own, g_own = m[:, ::TANGENTS], g[:, ::TANGENTS, ::TANGENTS]
    matrix = torch.cat((torch.cat((g_own.real, -g_own.imag), 2), torch.cat((g_own.imag, g_own.real), 2)), 1)
    matrix = matrix + ridge[:, None, None] * torch.eye(2 * atoms)
    s = torch.complex(*spd_solve(matrix, torch.cat((own.real, own.imag), 1)).chunk(2, 1))
    source = (TANGENTS * torch.arange(atoms)[:, None] + torch.tensor([0, 0, 1, 2, 3])).flatten()
    turn = torch.stack((torch.ones_like(s), 1j * torch.ones_like(s), s, s, s), 2).flatten(1)
    side = ((m - (g[:, :, ::TANGENTS] @ s[..., None])[..., 0])[:, source] * turn.conj()).real
    matrix = (turn.conj()[:, :, None] * g[:, source][:, :, source] * turn[:, None]).real
    damping = torch.cat((ridge[:, None].expand(batch, 2), noise[:, None] / trust.square()), 1).repeat(1, atoms)
    change = spd_solve(matrix + torch.diag_embed(damping), side).view(batch, atoms, 5)
    move = change[..., 2:].clamp(-2 * trust, 2 * trust)
    x = torch.cat(((s + torch.complex(change[..., 0], change[..., 1]))[..., None], s[..., None] * move), 2).flatten(1)
    fit[:, 0, :count], fit[:, 1, :count] = x.real, x.imag
    position[:, :atoms] = (position[:, :atoms] + move / scale).clamp(low, high)
    rest = m - (g @ x[..., None])[..., 0]
    left[:, 0, :count], left[:, 1, :count] = rest.real, rest.imag
    explained[:, atoms - 1] = (x.conj() * (m + rest)).real.sum(1)
    early = slice(atoms * (atoms - 1) // 2, atoms * (atoms + 1) // 2)
    if early.stop <= stage_positions.shape[1]:
        stage_positions[:, early], stage_amplitudes[..., early] = position[:, :atoms], fit[:, :, :count:TANGENTS]


def residual_kernel(
    residual: Tensor, moment: Tensor, image: Tensor, fit: Tensor, atoms: int, *_: Any, **__: Any
) -> None:
    p_d = torch.complex(*image.chunk(2, 1))
    x = torch.complex(fit[:, 0], fit[:, 1])[:, : TANGENTS * atoms]
    residual.copy_(moment - torch.view_as_real((x[:, None] @ p_d)[:, 0]))


def inputs_kernel(
    inputs: Tensor,
    position: Tensor,
    fit: Tensor,
    gram: Tensor,
    left: Tensor,
    explained: Tensor,
    stage_positions: Tensor,
    stage_amplitudes: Tensor,
    snr_db: Tensor,
    scale: Tensor,
    low: Tensor,
    high: Tensor,
    energy: float,
    *_: Any,
    **__: Any,
) -> None:
    stages, (noise, _) = position.shape[1], noise_of(snr_db, energy)
    gains = torch.diff(explained, dim=1, prepend=torch.zeros(len(fit), 1))
    found = Atoms(
        position,
        fit[..., ::TANGENTS],
        gram.unflatten(3, (stages, TANGENTS)).unflatten(2, (stages, TANGENTS)),
        left.unflatten(2, (stages, TANGENTS)),
        gains,
        stage_positions,
        stage_amplitudes,
    )
    normal = Normal(gram, gram, noise, noise, torch.full_like(noise, energy))
    inputs.copy_(_inputs(pursuit_of(scale=scale, low=low, high=high), normal, found, snr_db.clamp(*WORKING_SNR_DB)))


def basis_kernel(
    basis: Tensor,
    position: Tensor,
    fit: Tensor,
    stage_positions: Tensor,
    stage_amplitudes: Tensor,
    x: Tensor,
    y: Tensor,
    curvature: Tensor,
    scale: Tensor,
    elements: int,
    norm: float,
    wavenumber: float,
    **_: Any,
) -> None:
    none = fit[:, :1]
    found = Atoms(position, fit[..., ::TANGENTS], none, none, none, stage_positions, stage_amplitudes)
    basis.copy_(_basis(pursuit_of(x, y, curvature, scale, wavenumber=wavenumber), found))


def complex_of(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.contiguous())


def sets(codes: Tensor) -> Tensor:
    return complex_of(codes if codes.dim() == 4 else codes[None])


def noise_of(snr_db: Tensor, energy: float) -> tuple[Tensor, Tensor]:
    snr = 10.0 ** (snr_db.clamp(*WORKING_SNR_DB) / 10)
    noise = 1 / (1 + snr)
    return noise, noise / (energy * snr * noise).clamp_min(TINY)


def pursuit_of(
    x: Any = None, y: Any = None, curvature: Any = None, scale: Any = None, wavenumber: float = 0.0, **box: Any
):
    low, high = box.get("low"), box.get("high")
    return Pursuit(
        Geometry(x, y, curvature, scale, low, high, None, None, torch.zeros(1, 1), None, None), wavenumber, 0
    )


@contextmanager
def restated(monkeypatch: Any) -> Iterator[None]:
    """Every launch calls the function above of the kernel's name."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: Any, num_warps: int, **constexprs: Any) -> None:
        globals()[self.fn.__name__](*args)

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", run)
        yield
