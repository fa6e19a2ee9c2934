"""Newtonized orthogonal matching pursuit with elimination: the sources of a scene, at every model order.

Forward, each stage adds the dictionary atom that best explains the residual of G^H y and takes one joint Gauss-Newton
step on the amplitudes and positions of all atoms so far, on the true cost |y - G A s|^2. Where what is left is more
than noise, a few atoms too many are added: they lead out of a wrong choice. Backward, the atom that the fit misses
least is taken away and the others are polished, down to one atom. Every order from K to 1 is thereby a hypothesis with
its own estimate and cost; orders are nested, and atoms stand in the order of their worth, the last to go first.

A step works on a linearisation: the tangents and their images P D stay at the atom's `base`, and the atom at
base + offset is a + sum_d offset_d t_d, until the offset is no longer small. An implementation need form P D of the
atoms that got a new base alone.

Shapes are static. No gradient passes through it; a network reads its outcome.
Source: Mamandipoor, Ramasamy, Madhow, "Newtonized orthogonal matching pursuit: frequency estimation over the
continuum", IEEE Transactions on Signal Processing 64 (2016) 5066-5081; here with a step on all atoms jointly. Taking
the least missed away is backward elimination: Couvreur, Bresler, "On the optimality of the backward greedy algorithm
for the subset selection problem", SIAM Journal on Matrix Analysis 21 (2000) 797-808.

Legend: B batch, L snapshots, M base-station antennas, N RIS elements, K atoms, T = 4 tangents of an atom, E = K (K - 1)
/ 2 atoms of all lower orders, G grid points. Complex arrays are planar here, (..., 2C) = [real C | imaginary C]: one
real matrix product then does a complex one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..scale import rescaled
from .solve import spd_solve, spd_solve_log_det

TANGENTS = 4  # a, and its normalised derivatives along u, v and w = 1/range
REBASE = 0.05  # radians of phase, rms over the aperture: offsets beyond get a new base; it costs 1e-3 of the amplitude
NOISE_REBASE = 0.5  # the same where noise hides more: offset^2 beyond this many noise over the atom's power
POLISH = 2  # Gauss-Newton steps at an order, at most; the second where the first gave an atom a new base
EXTRA = 3  # atoms beyond K where the fit of K leaves more than noise
SHARE = 0.1  # of the field's energy that an atom is expected to have: keeps close atoms from growing against each other
DOUBT = 1.5  # standard deviations of the noise's energy that count as more

TINY_POWER = 1e-12
NOTHING = 1e-18  # mean squares of rescaled numbers are far above it, unless all of them are zero


class Normal(NamedTuple):
    """The normal equations of one batch, in units where y has mean power 1 and G^H G has mean diagonal 1."""

    gram: Tensor  # (B, N, 2N)  [Re P | -Im P], P = G^H G
    moment: Tensor  # (B, N, 2)   b = G^H y, planar
    noise: Tensor  # (B,)        sigma^2
    signal: Tensor  # (B,)        expected |x|^2
    energy: Tensor  # (B,)        |y|^2
    measurements: int  # L M

    @property
    def ridge(self) -> Tensor:
        """(B,) of an amplitude: the noise beside what is expected of |s|^2."""
        return self.noise / (SHARE * self.signal)


class Atoms(NamedTuple):
    """What the pursuit found, the atom that was eliminated last first: the first k atoms are those of order k."""

    position: Tensor  # (B, K, 3)       u, v, w = 1/range
    amplitude: Tensor  # (B, 2, K)       s, real and imaginary parts
    gram: Tensor  # (B, 2, K, T, K, T)  D^H P D, real and imaginary parts
    gains: Tensor  # (B, K)          fall of the cost |y - G x|^2 + ridge |s|^2 from the order below
    log_det: Tensor  # (B, K)          of the last Gauss-Newton system at each order
    order_positions: Tensor  # (B, E, 3)       positions at each lower order: 1, then 2, ... K - 1 atoms
    order_amplitudes: Tensor  # (B, 2, E)       their amplitudes there


class Fit(NamedTuple):
    """Atoms at base + offset and their amplitudes by least squares."""

    base: Tensor  # (B, K, 3)       where the tangents are
    offset: Tensor  # (B, K, 3)       from there, times scale
    image: Tensor  # (B, N, 2KT)     P D at the bases
    gram: Tensor  # (B, 2, K, T, K, T)  D^H P D, the first column of each atom shifted by its offset
    moment: Tensor  # (B, 2, K, T)    D^H b, likewise
    amplitude: Tensor  # (B, 2, K)
    cost: Tensor  # (B,)            |y - G x|^2 + ridge |s|^2
    log_det: Tensor  # (B,)            of the last step's system


class Geometry(NamedTuple):
    """The constants of a task: the array in radians of phase, the box of positions and the grid of the first guess."""

    x: Tensor  # (N,)       k x
    y: Tensor  # (N,)       k y
    curvature: Tensor  # (N,)       k (x^2 + y^2) / 2
    scale: Tensor  # (3,)       spread of psi over the aperture by u, v, w
    low: Tensor  # (3,)       least u, v, w
    high: Tensor  # (3,)       largest u, v, w
    trust: Tensor  # (3,)       step that a Gauss-Newton step is damped to, times scale
    grid: Tensor  # (G, 3)     positions
    dictionary: Tensor  # (2N, 2G)   residual (N, 2), flattened, to the two parts of a^H r; (2N, 0): not made yet
    along_x: (
        Tensor  # (W, X, U, 2)   factors of the Fresnel steering vectors of the grid, G = U V W, N = X Y, by w: a = x y
    )
    along_y: Tensor  # (W, Y, V, 2)   (0, 0, 0, 2) both: the array is no rectangle


def normal_equations(snapshots: Tensor, channel: Tensor, codes: Tensor, snr_db: Tensor) -> Normal:
    """P = sum_l diag(c_l)^H H^H H diag(c_l) = (H^H H) o (C^H C) and b = sum_l conj(c_l) o (H^H y_l), normalised.

    Args: snapshots (B, L, M, 2), channel (B, M, N, 2), codes (L, N, 2) or (B, L, N, 2), snr_db (B,), all of one dtype.
    Numerics: snapshots and channel of any finite scale give the same; those of zeros give b = 0, and P = 0 for the
        channel.
    Cost: 8 M N^2 FLOPs a scene; P is 8 N^2 bytes.
    """
    batch, length, antennas, _ = snapshots.shape
    elements = channel.shape[2]
    snapshots, channel = rescaled(snapshots), rescaled(channel)
    column = (channel.square().sum(-1).sum((1, 2)) * (length / elements)).clamp_min(NOTHING)
    level = snapshots.square().sum(-1).mean((1, 2)).clamp_min(NOTHING)
    planes = channel.permute(0, 3, 1, 2)
    stacked = planes.reshape(batch, 2 * antennas, elements)
    turned = torch.stack((planes[:, 1], -planes[:, 0]), dim=1).reshape(batch, 2 * antennas, elements)
    adjoint = (stacked / column[:, None, None]).transpose(1, 2)
    sets = codes if codes.dim() == 4 else codes[None]
    overlap = _adjoint_matmul(sets, sets)
    gram = _times(adjoint @ stacked, adjoint @ turned, overlap[..., 0], overlap[..., 1])
    back = _adjoint_matmul(channel, snapshots.transpose(1, 2))
    moment = _conj_multiply(codes.transpose(-3, -2), back).sum(2) * (column * level).rsqrt()[:, None, None]
    snr = 10.0 ** (snr_db / 10.0)
    size = float(length * antennas)
    return Normal(
        gram, moment, 1.0 / (1.0 + snr), size * snr / (1.0 + snr), torch.full_like(snr, size), length * antennas
    )


def _times(real: Tensor, imag: Tensor, other_real: Tensor, other_imag: Tensor) -> Tensor:
    """[Re | -Im] of an elementwise complex product, written in place: at 8 N^2 bytes a scene every copy is felt."""
    size = real.shape[-1]
    out = real.new_empty(*real.shape[:-1], 2 * size)
    out[..., :size] = real
    out[..., :size].mul_(other_real).addcmul_(imag, other_imag, value=-1)
    out[..., size:] = real
    out[..., size:].mul_(-other_imag).addcmul_(imag, other_real, value=-1)
    return out


def _adjoint_matmul(a_BNM: Tensor, b_BNP: Tensor) -> Tensor:
    """a^H b for pairs (B, N, M, 2) and (B, N, P, 2), without a transposed copy of `a`: (B, M, P, 2)."""
    (batch, inner, rows, _), columns = a_BNM.shape, b_BNP.shape[-2]
    both = a_BNM.reshape(batch, inner, 2 * rows).transpose(-1, -2) @ b_BNP.reshape(b_BNP.shape[0], inner, 2 * columns)
    both = both.reshape(batch, rows, 2, columns, 2)
    return torch.stack((both[:, :, 0, :, 0] + both[:, :, 1, :, 1], both[:, :, 0, :, 1] - both[:, :, 1, :, 0]), dim=-1)


def _conj_multiply(a: Tensor, b: Tensor) -> Tensor:
    """conj(a) b elementwise for pairs (..., 2), broadcast."""
    a_re, a_im, b_re, b_im = a[..., 0], a[..., 1], b[..., 0], b[..., 1]
    return torch.stack((a_re * b_re + a_im * b_im, a_re * b_im - a_im * b_re), dim=-1)


def turn(planar: Tensor) -> Tensor:
    """[re | im] -> [im | -re]: -j times a planar array."""
    real, imag = planar.chunk(2, dim=-1)
    return torch.cat((imag, -real), dim=-1)


def with_dictionary(geometry: Geometry, wavenumber: float) -> Geometry:
    """The same constants and their dictionary, for whoever searches by it more than once.

    Cost: 16 N G bytes, G about N^2 / 31 for the ranges of RIS-12x12: 1.5 MB there, 0.6 GB at 32 x 32.
    """
    return geometry._replace(dictionary=Pursuit(geometry, wavenumber, 0).dictionary)


class Pursuit:
    """Finds `atoms` atoms and what is left of them at each lower order.

    Args: geometry: constants of the task; wavenumber: rad/m where the wavefront is spherical, 0 where it is Fresnel.
    """

    def __init__(self, geometry: Geometry, wavenumber: float, atoms: int) -> None:
        self.x, self.y, self.curvature, self.scale, self.low, self.high, self.trust, self.grid = geometry[:8]
        self.dictionary = geometry.dictionary
        self.wavenumber, self.atoms = wavenumber, atoms
        if not self.dictionary.shape[1]:
            self.dictionary = self.correlator()

    def correlator(self) -> Tensor:
        """The dictionary as one real matrix (2N, 2G)."""
        real, imag = self.steer(self.grid[None])[0].chunk(2, dim=1)
        return torch.stack((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), dim=1).flatten(0, 1)

    def phase_slopes(self, position: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """psi and its derivatives by u, v and w at (B, K, 3) positions, each broadcast to (B, N, K)."""
        u, v, w = position.transpose(1, 2)[:, :, None].unbind(1)
        x, y, bend = self.x[:, None], self.y[:, None], self.curvature[:, None]
        line = u * x + v * y
        if not self.wavenumber:
            zero = torch.zeros_like(line)
            return line - bend * w, x + zero, y + zero, zero - bend
        k = self.wavenumber
        q = (1.0 + 2.0 / k * w * (w * bend - line)).clamp_min(1e-12).sqrt()
        psi = 2.0 * (line - w * bend) / (1.0 + q)
        slope_q = (2.0 * w * bend - line) / (k * q)
        return psi, x / q, y / q, -(2.0 * bend + psi * slope_q) / (1.0 + q)

    def tangents(self, position: Tensor) -> Tensor:
        """Unit-norm a and j (psi' - mean psi') a / scale for u, v, w: (B, K, 3) -> (B, N, 2KT) planar."""
        psi, *slopes = self.phase_slopes(position)
        norm = 1.0 / math.sqrt(self.x.numel())
        cosine, sine = psi.cos() * norm, psi.sin() * norm
        weights = [(slope - slope.mean(1, keepdim=True)) / scale for slope, scale in zip(slopes, self.scale)]
        real = torch.stack([cosine, *(-weight * sine for weight in weights)], dim=-1)
        imag = torch.stack([sine, *(weight * cosine for weight in weights)], dim=-1)
        return torch.stack((real, imag), dim=2).flatten(2)

    def steer(self, position: Tensor) -> Tensor:
        """Unit-norm atoms alone: (B, K, 3) -> (B, N, 2K) planar."""
        psi = self.phase_slopes(position)[0]
        return torch.cat((psi.cos(), psi.sin()), dim=2) / math.sqrt(self.x.numel())

    def __call__(self, normal: Normal) -> Atoms:
        """All of it: static shapes, no host synchronisation, no gradient."""
        none = normal.moment.new_zeros(normal.moment.shape[0], 0, 3)
        top = self.polished(normal, *self.extended(normal, none, none, normal.moment, self.atoms))
        top = self.retried(normal, top)
        fits, dropped = [top], []
        for _ in range(self.atoms - 1):
            least = least_missed(fits[-1], normal)
            dropped.append(least)
            fits.append(self.without(normal, fits[-1], least))
        return self.ordered(normal, fits[::-1], dropped[::-1])

    def extended(
        self, normal: Normal, base: Tensor, offset: Tensor, residual: Tensor, atoms: int
    ) -> tuple[Tensor, Tensor]:
        """Bases and offsets of `atoms` atoms: those given, then each new one where the residual points, with a step of
        all after each."""
        for _ in range(atoms - base.shape[1]):
            base = torch.cat((base, self.strongest(residual)[:, None]), dim=1)
            offset = torch.cat((offset, torch.zeros_like(base[:, :1])), dim=1)
            fit = self.fitted(normal, base, offset)
            change, _ = newton(fit, self.trust, normal)
            move = torch.clamp(change[..., 2:], -2 * self.trust, 2 * self.trust)
            residual = unexplained(normal, fit, fit.amplitude + change[..., :2].transpose(1, 2), offset + move)
            base, offset, _ = self.moved(normal, fit, move)
        return base, offset

    def polished(self, normal: Normal, base: Tensor, offset: Tensor) -> Fit:
        """At most POLISH steps; a scene whose last step gave no atom a new base is done."""
        going, log_det = torch.ones_like(normal.noise, dtype=torch.bool), torch.zeros_like(normal.noise)
        for _ in range(POLISH):
            fit = self.fitted(normal, base, offset)
            change, determinant = newton(fit, self.trust, normal)
            move = torch.clamp(change[..., 2:], -2 * self.trust, 2 * self.trust)
            log_det = torch.where(going, determinant, log_det)
            there, off, far = self.moved(normal, fit, move)
            base = torch.where(going[:, None, None], there, base)
            offset = torch.where(going[:, None, None], off, offset)
            going = going & far.any(1)
        return self.fitted(normal, base, offset)._replace(log_det=log_det)

    def fitted(self, normal: Normal, base: Tensor, offset: Tensor) -> Fit:
        """Ridge least squares of the amplitudes at base + offset."""
        image, gram, moment = self.project(normal, base)
        gram, moment = shifted(gram, moment, offset)
        s = amplitudes(gram, moment, normal)
        cost = normal.energy - (s * moment[..., 0]).sum((1, 2))
        return Fit(base, offset, image, gram, moment, s, cost, torch.zeros_like(cost))

    def moved(self, normal: Normal, fit: Fit, move: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Bases and offsets after the scaled move (B, K, 3), and which atoms got a new base (B, K)."""
        target = torch.clamp(fit.base + (fit.offset + move) / self.scale, self.low, self.high)
        offset = (target - fit.base) * self.scale
        power = fit.amplitude.square().sum(1).clamp_min(TINY_POWER)
        limit = (NOISE_REBASE * normal.noise[:, None] / power).clamp_min(REBASE**2)
        far = offset.square().sum(-1) > limit
        return torch.where(far[..., None], target, fit.base), torch.where(far[..., None], 0.0, offset), far

    def doubtful(self, normal: Normal, fit: Fit) -> Tensor:
        """(B,) whether the fit leaves more than noise: energy beyond its mean, less what the fit takes of it."""
        expected = normal.energy - 2.5 * self.atoms + DOUBT * normal.energy.sqrt()
        return fit.cost > normal.noise * expected

    def retried(self, normal: Normal, top: Fit) -> Fit:
        """The same fit; where it is doubtful, the fit of as many atoms by way of EXTRA more."""
        if 2 * min(len(self.x), normal.measurements) < 5 * (self.atoms + EXTRA):
            return top  # so many atoms would fit anything
        doubtful = self.doubtful(normal, top)
        readable = doubtful.device.type == "cpu" and not torch.compiler.is_exporting()
        if readable:  # where reading costs nothing, only the scenes that need it
            rows = doubtful.nonzero()[:, 0]
            again = self.by_way_of_more(
                Normal(*(each[rows] for each in normal[:-1]), normal.measurements), Fit(*(each[rows] for each in top))
            )
            return Fit(*(each.index_copy(0, rows, new) for each, new in zip(top, again)))
        again = self.by_way_of_more(normal, top)
        return Fit(*(torch.where(doubtful.reshape(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(again, top)))

    def by_way_of_more(self, normal: Normal, top: Fit) -> Fit:
        residual = unexplained(normal, top, top.amplitude, top.offset)
        fit = self.polished(normal, *self.extended(normal, top.base, top.offset, residual, self.atoms + EXTRA))
        for _ in range(EXTRA):
            fit = self.without(normal, fit, least_missed(fit, normal))
        return fit

    def without(self, normal: Normal, fit: Fit, atom: Tensor) -> Fit:
        """One order lower: without the atom (B,) of each scene, the others polished."""
        count = fit.base.shape[1]
        kept = torch.arange(count - 1, device=atom.device).expand(atom.shape[0], -1)
        kept = (kept + (kept >= atom[:, None]))[..., None].expand(-1, -1, 3)
        return self.polished(normal, fit.base.gather(1, kept), fit.offset.gather(1, kept))

    def ordered(self, normal: Normal, fits: list[Fit], dropped: list[Tensor]) -> Atoms:
        """Orders 1 to K, each with its atoms in the order of their worth; `dropped` from orders 2 to K."""
        order, orders = torch.zeros(normal.noise.shape[0], 1, dtype=torch.int64, device=normal.noise.device), []
        for fit, gone in zip(fits, [None, *dropped]):
            if gone is not None:
                order = torch.cat((order + (order >= gone[:, None]), gone[:, None]), dim=1)
            positions = (fit.base + fit.offset / self.scale).gather(1, order[..., None].expand(-1, -1, 3))
            orders.append((positions, fit.amplitude.gather(2, order[:, None].expand(-1, 2, -1))))
        *lower, (position, amplitude) = orders
        gram = fits[-1].gram
        for axis in (2, 4):
            index = order.reshape(order.shape[0], *(self.atoms if each == axis else 1 for each in range(1, 6)))
            gram = gram.gather(axis, index.expand(gram.shape))
        costs = torch.stack([normal.energy, *(fit.cost for fit in fits)], dim=1)
        return Atoms(
            position,
            amplitude,
            gram,
            costs[:, :-1] - costs[:, 1:],
            torch.stack([fit.log_det for fit in fits], dim=1),
            torch.cat([position[:, :0], *(each for each, _ in lower)], dim=1),
            torch.cat([amplitude[:, :, :0], *(each for _, each in lower)], dim=2),
        )

    def strongest(self, residual: Tensor) -> Tensor:
        """The grid position with the largest |a^H r|: (B, N, 2) -> (B, 3)."""
        real, imag = (residual.flatten(1) @ self.dictionary).chunk(2, dim=1)
        return self.grid[(real.square() + imag.square()).argmax(1)]

    def project(self, normal: Normal, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Image P D of the tangents D (planar), D^H P D (B, 2, K, T, K, T) and D^H b (B, 2, K, T)."""
        tangents = self.tangents(position)
        image = normal.gram @ torch.cat((tangents, turn(tangents)), dim=1)
        batch, atoms, size = position.shape[0], position.shape[1], position.shape[1] * TANGENTS
        both = tangents.transpose(1, 2) @ torch.cat((image, normal.moment), dim=2)
        left, right = both[:, :size], both[:, size:]
        real = left[..., :size] + right[..., size : 2 * size]
        imag = left[..., size : 2 * size] - right[..., :size]
        moment = torch.stack((left[..., -2] + right[..., -1], left[..., -1] - right[..., -2]), dim=1)
        gram = torch.stack((real, imag), dim=1).reshape(batch, 2, atoms, TANGENTS, atoms, TANGENTS)
        return image, gram, moment.reshape(batch, 2, atoms, TANGENTS)


def combine(planar: Tensor, coefficient: Tensor) -> Tensor:
    """Complex product of a planar (B, N, 2KT) with (B, 2, K, T): (B, N, 2)."""
    real, imag = coefficient.flatten(2).unbind(1)
    return planar @ torch.stack((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), dim=2)


def apply_gram(gram: Tensor, s: Tensor) -> Tensor:
    """gram (B, 2, K, T, K, T') times s (B, 2, K, T'): (B, 2, K, T)."""
    flat = gram.flatten(4).flatten(2, 3)
    real, imag = s.flatten(2)[:, :, None].unbind(1)
    out = torch.stack(
        ((flat[:, 0] * real - flat[:, 1] * imag).sum(-1), (flat[:, 0] * imag + flat[:, 1] * real).sum(-1)), dim=1
    )
    return out.reshape(gram.shape[:4])


def shifted(gram: Tensor, moment: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
    """D^H P D and D^H b with a + sum_d offset_d t_d in the place of each atom's a."""
    change = torch.zeros(*offset.shape[:2], TANGENTS, TANGENTS, device=offset.device, dtype=offset.dtype)
    change += torch.eye(TANGENTS, device=offset.device, dtype=offset.dtype)
    change[..., 1:, 0] = offset
    gram = torch.einsum("bkst,bckslu,bluv->bcktlv", change, gram, change)
    return gram, torch.einsum("bkst,bcks->bckt", change, moment)


def unexplained(normal: Normal, fit: Fit, s: Tensor, offset: Tensor) -> Tensor:
    """G^H (y - G x) with the atoms s_k (a_k + sum_d offset_d t_d) at the bases of a fit: (B, N, 2)."""
    return normal.moment - combine(fit.image, torch.cat((s[..., None], s[..., None] * offset[:, None]), dim=3))


def least_missed(fit: Fit, normal: Normal) -> Tensor:
    """The atom without which the regularised cost rises least: (B,).

    The rise is |s_k|^2 over the k-th diagonal entry of the inverse normal matrix.
    """
    batch, _, atoms = fit.amplitude.shape
    matrix, ridge = _amplitude_system(fit.gram, normal)
    unit = torch.eye(2 * atoms, device=matrix.device, dtype=matrix.dtype)[..., None].expand(-1, -1, batch)
    inverse = spd_solve(matrix, unit, ridge).diagonal(dim1=0, dim2=1)[:, :atoms]
    return (fit.amplitude.square().sum(1) / inverse).argmin(1)


def amplitudes(gram: Tensor, moment: Tensor, normal: Normal) -> Tensor:
    """Ridge least squares over the amplitudes alone: (B, 2, K)."""
    batch, _, atoms, _ = moment.shape
    matrix, ridge = _amplitude_system(gram, normal)
    return spd_solve(matrix, moment[..., 0].flatten(1).T, ridge).reshape(2, atoms, batch).permute(2, 0, 1)


def _amplitude_system(gram: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    """The real normal matrix of [re s, im s], (2K, 2K, B), and its ridge, (2K, B)."""
    real, imag = gram[:, :, :, 0, :, 0].permute(1, 2, 3, 0).unbind(0)
    matrix = torch.cat((torch.cat((real, -imag), 1), torch.cat((imag, real), 1)), 0)
    return matrix, normal.ridge.expand(len(matrix), -1)


def newton(fit: Fit, trust: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
    """The joint real system in (re s, im s, u, v, w) of every atom, damped by the grid's cell: what it changes,
    (B, K, 5), and the logarithm of its determinant, (B,)."""
    s = fit.amplitude
    batch, _, atoms = s.shape
    correlation = fit.moment - apply_gram(fit.gram[..., :1], s[..., None])
    unit = torch.eye(2, device=s.device, dtype=s.dtype)[:, None].expand(batch, 2, atoms, 2)
    turn_re, turn_im = torch.cat((unit, s[..., None].expand(batch, 2, atoms, 3)), dim=3).unbind(1)  # (B, K, 5)
    correlation_re, correlation_im = _twice_first(correlation).unbind(1)
    rhs = correlation_re * turn_re + correlation_im * turn_im
    real, imag = _twice_first(_twice_first(fit.gram).transpose(3, 5)).transpose(3, 5).unbind(1)
    right_re = real * turn_re[:, None, None] - imag * turn_im[:, None, None]
    right_im = real * turn_im[:, None, None] + imag * turn_re[:, None, None]
    full = right_re * turn_re[:, :, :, None, None] + right_im * turn_im[:, :, :, None, None]
    size = 5 * atoms
    ridge = torch.cat((normal.ridge[:, None].expand(batch, 2), normal.noise[:, None] / trust.square()), dim=1)
    matrix = full.reshape(batch, size, size).permute(1, 2, 0).contiguous()
    solved, log_det = spd_solve_log_det(matrix, rhs.reshape(batch, size).T, ridge.T.repeat(atoms, 1))
    return solved.T.reshape(batch, atoms, 5), log_det


def _twice_first(x: Tensor) -> Tensor:
    """Repeats the first entry of the last axis: an atom has a real and an imaginary amplitude, a move has neither."""
    return torch.cat((x[..., :1], x), dim=-1)
