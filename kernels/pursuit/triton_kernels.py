"""The pursuit of search.py on the GPU, a program a scene or a tile of one.

once              scene_kernel      powers of two, levels, b = G^H y                                  (triton_normal.py)
                  gram_kernel       P = (H^H H) o (C^H C), tiles of the upper triangle, mirrored
each of K atoms   search_kernel     b - P x of the last fit, and the grid's position with the largest |a^H r|, by its
                                    factors; where it has none: residual_kernel, torch.matmul with the dictionary,
                                    pick_kernel                                                       (triton_search.py)
                  step_kernel       P D of new bases, amplitudes, joint Newton step; with the last atom also the polish
                                                                                                      (triton_step.py)
each of 3 more    the same two      of the doubtful scenes alone; with the last atom the polish and the way back to K
once              step_kernel       every lower order
                  inputs_kernel, basis_kernel                                                         (triton_answer.py)

Which scenes are doubtful and which steps they need, a program decides for its scene; the host launches a fixed
sequence.

Layouts: gram (B, N, 2N) [Re P | -Im P]; moment, residual (B, N, 2) pairs; a scene's state in triton_state.py.
A size that is 1 is a constant to Triton, not a tensor: what must be a float comes as one.
float32 throughout. Every scene has its own bits but for the product with the dictionary, whose order of summation may
depend on the batch.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
from torch import Tensor

from . import reference
from .search import EXTRA
from .triton_answer import basis_kernel, inputs_kernel
from .triton_normal import gram_kernel, scene_kernel
from .triton_search import add_by_dictionary, add_by_factors
from .triton_state import UNKNOWNS, T, state_size
from .triton_step import POLISH, step_kernel

SIDE = 32  # of a tile of P
LANES = 1024  # entries a pass over a scene's numbers takes
WIDE_STRIP, ROWS = 32, 4  # elements that a step of b takes, and one of the basis and of P D
WARPS = 4


def step_sizes(atoms: int, elements: int) -> dict[str, int]:
    """Tile, lanes and warps of a step: as few warps as registers allow, since a sum over several needs a barrier."""
    size = max(triton.next_power_of_2(int(UNKNOWNS) * atoms + 1), 16)
    wide = triton.next_power_of_2(elements)
    warps = max(2 * WARPS if size > 32 else 2, min(wide // 256, 2 * WARPS))
    return {"SIZE": size, "LANES": min(wide, 128 * warps), "ROWS": ROWS, "num_warps": warps}


@torch.no_grad()
def pursuit_features(
    snapshots: Tensor,
    channel: Tensor,
    codes: Tensor,
    snr_db: Tensor,
    constants: list[Tensor],
    wavenumber: float,
    stages: int,
    factored: bool,
) -> tuple[Tensor, Tensor]:
    """The operator on the device of `snapshots`; arguments as in reference.py.

    factored: searches by the factors of the grid, else by the dictionary; what it does not read may be empty.
    """
    y, h, c, snr_db, *constants = (
        each.float().contiguous() for each in (snapshots, channel, codes, snr_db, *constants)
    )
    x, y_axis, bend, scale, low, high, trust, grid, dictionary, along_x, along_y = constants
    (batch, length, antennas, _), elements = y.shape, h.shape[2]
    enough = 2 * min(elements, length * antennas) >= int(UNKNOWNS) * (stages + EXTRA)  # else more would fit anything
    slots, early = stages + EXTRA * enough, stages * (stages - 1) // 2
    new, power = y.new_empty, triton.next_power_of_2
    inputs, basis = new((batch, reference.width(stages))), new((batch, elements, 2 * reference.rank(stages)))
    if batch == 0:
        return inputs, basis
    levels, moment, normal = new((batch, 2)), new((batch, elements, 2)), new((batch, elements, 2 * elements))
    found, image = (new((batch, int(T) * slots, 2 * elements)) for _ in range(2))
    state, flags = new((batch, state_size(slots))), new((batch, 2 * slots + 1), dtype=torch.int32)
    task = torch.cat((scale, low, high, trust, x, y_axis, bend))
    spherical, norm = bool(wavenumber), elements**-0.5
    stride, energy = 2 * length * elements if c.dim() == 4 else 0, float(length * antennas)
    tiles, sizes = triton.cdiv(elements, SIDE), {"STAGES": stages, "A": slots}
    if factored:
        add = partial(add_by_factors, state, flags, moment, image, grid, along_x, along_y, slots)
    else:
        add = partial(add_by_dictionary, state, flags, moment, image, grid, dictionary, slots)

    def step(atoms: int, last: int, steps: int, retry: int) -> None:
        step_kernel[(batch,)](
            state,
            flags,
            found,
            image,
            normal,
            moment,
            snr_db,
            task,
            atoms,
            last,
            steps,
            retry,
            elements,
            energy,
            norm,
            wavenumber,
            **sizes,
            SPHERICAL=spherical,
            **step_sizes(atoms, elements),
        )

    with torch.cuda.device_of(y), torch.autocast(y.device.type, enabled=False):
        scene_kernel[(batch,)](
            levels,
            moment,
            y,
            h,
            c,
            stride,
            antennas,
            elements,
            length,
            energy,
            length / elements,
            LANES=LANES,
            STRIP=WIDE_STRIP,
            num_warps=WARPS,
        )
        gram_kernel[(batch, tiles, tiles)](
            normal, h, c, levels, stride, antennas, elements, length, SIDE=SIDE, num_warps=WARPS
        )
        for atoms in range(1, slots + 1):
            retry = int(atoms > stages)
            add(atoms - 1, retry)
            step(atoms, stages if atoms in (stages, slots) else atoms + 1, -1, retry)
        step(stages, 1, int(POLISH), 0)
        inputs_kernel[(batch,)](
            inputs,
            state,
            flags,
            snr_db,
            task,
            energy,
            inputs.shape[1],
            **sizes,
            ATOMS=power(stages),
            LANES=power(int(T) * stages),
            EARLY_LANES=power(max(early, 1)),
            num_warps=1,
        )
        basis_kernel[(batch,)](
            basis,
            state,
            flags,
            task,
            elements,
            norm,
            wavenumber,
            **sizes,
            ATOMS=power(stages),
            SPHERICAL=spherical,
            ROWS=ROWS,
            SIZE=power(reference.rank(stages)),
            num_warps=WARPS,
        )
    return inputs, basis
