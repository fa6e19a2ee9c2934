"""What a classical estimator makes of a network's inputs: the figure that the network has to beat.

A network says so itself with a method `classical(features)`; any other one is judged by the scenes that it is handed.

Legend: B batch, N RIS elements, K columns of an estimate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ris_fast.physics.channel import backproject
from ris_fast.physics.least_squares import least_squares_factor
from ris_fast.physics.matched_filter import matched_filter, matched_filter_of_products
from ris_fast.physics.scenes import Scenes


class Classical(NamedTuple):
    """An estimate of the covariance of each scene, F F^H, without a network."""

    name: str  # of the estimator; its figure stands under it beside the baselines
    factor: Tensor  # (B, N, K, 2)  F
    field: bool = False  # of the field, with cross terms between sources that no target has: it is scored shrunk


@torch.no_grad()
def classical_estimate(model: nn.Module, features: Any, scenes: Scenes, *, static: bool) -> Classical | None:
    """What `model.classical(features)` returns; for a network without it the field by least squares, or the matched
    filter where symbols are not static or only H c_l is known; None where nothing is known of the channel.

    Args: features: what the network's own `features` makes of these scenes; static: one symbol a source and scene.
    Raises: TypeError where `model.classical` returns something else than a name and a factor.
    """
    if hasattr(model, "classical"):
        return _checked(model.classical(features))
    snapshots, codes = scenes.snapshots, scenes.codes
    if scenes.channel is not None and static:
        return Classical("least_squares", least_squares_factor(scenes), field=True)
    if scenes.channel is not None:
        factor = matched_filter(backproject(scenes.channel, codes, snapshots), static)
    elif scenes.effective_channel is not None:
        factor = matched_filter_of_products(scenes.effective_channel, codes, snapshots, static)
    else:
        return None
    return Classical("matched_filter", factor, field=True)


def _checked(found: Any) -> Classical:
    """The answer of a network's own method; a plain (name, factor) is sources that were found one by one."""
    if isinstance(found, tuple) and len(found) in (2, 3) and isinstance(found[0], str) and isinstance(found[1], Tensor):
        return Classical(*found)
    raise TypeError(
        f"classical_estimate: `classical(features)` of the network returned {type(found).__name__}, expected the"
        " estimator's name and its factor (B, N, K, 2). Return ris_fast.models.classical.Classical(name, factor,"
        " field=True) for an estimate of the field, (name, factor) for sources that were found one by one."
    )
