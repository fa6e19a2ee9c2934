"""Preflight of padding: what is read of a sequence is what scenes differ in, and not what pads it.

Legend: B batch, T places of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ris_fast.health.finding import Finding
from ris_fast.health.preflight.derivatives import derivatives
from ris_fast.health.preflight.probe import PreflightContext, layer_calls

EQUAL = 1e-5  # relative, of two scenes' numbers at one place
BOTH = 0.05  # share of the places that pad, and of those that do not
MOSTLY, HARDLY = 0.5, 0.01  # share of the places that are read: of padding, and of the others


def reads_no_padding(context: PreflightContext) -> Iterator[Finding]:
    """Where a sequence has places that differ between scenes and places that are padded, the first are read."""
    scenes = context.scenes
    layers: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, inputs: tuple, output: object) -> None:
        if isinstance(output, Tensor) and output.requires_grad and output.is_floating_point():
            if output.dim() > 2 and len(output) == scenes.batch:
                layers[name] = output

    with layer_calls(context.model, keep):
        total = context.run()[0]
    if scenes.batch < 3 or not layers or not total.requires_grad:
        return
    for name, part in zip(layers, derivatives(total, list(layers.values()))):
        if part is None or not bool(part.isfinite().all()):
            continue
        padding, read = _equal(layers[name].detach()), part.flatten(2).bool().any(2)
        share = float(padding.float().mean())
        if not BOTH < share < 1 - BOTH or not float(read[padding].float().mean()) > MOSTLY:
            continue
        if float(read[~padding].float().mean()) < HARDLY:
            yield Finding(
                "ignored_input",
                f"of the output of {name} the loss depends on the {int(padding.sum())} places that are the same in"
                f" several scenes, and not on the {int((~padding).sum())} in which scenes differ, as where a mask is"
                " true for what is there and is taken for what is to be left out.",
                advice="Turn the mask: key_padding_mask and masked_fill are true where nothing is to be read, and the"
                " boolean attn_mask of scaled_dot_product_attention where something is.",
                certain=False,
            )
            return


def _equal(output: Tensor) -> Tensor:
    """Places at which another scene has the same numbers, (B, T). Args: (B, T, ...)."""
    rows = output.float().flatten(2)
    gaps = torch.stack([(rows - row).norm(dim=2) for row in rows])  # (B, B, T)
    same = gaps <= EQUAL * rows.norm(dim=2)
    return same.sum(0) > 1


CHECKS = {"what pads a sequence is not read in its place": reads_no_padding}
