"""The operators `ris_fast::attention` and `ris_fast::attention_backward`, and the function `attention`.

Letters: B batch, L tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as fn

from ..native import loader
from ..registration import register
from ..registry import Cost, Family, Sample
from . import native, reference


def attention(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of H heads: softmax(Q K^T / sqrt(D / H)) V.

    On a CPU by the operator, which is made for few tokens: torch's flash kernel takes four to ten times as long there.
    Elsewhere by torch's scaled_dot_product_attention.

    Args: qkv: (B, L, 3 D), [Q | K | V] with heads side by side, as one product leaves them; float32, float64, bfloat16.
    Returns: (B, L, D), in the dtype of qkv.
    Raises: ValueError for a width that is not 3 H d.
    Numerics: bfloat16 is read and written; everything between is float32.
    """
    if qkv.dim() != 3 or heads < 1 or qkv.shape[2] % (3 * heads):
        raise ValueError(
            f"attention: qkv is {tuple(qkv.shape)} with {heads} heads, expected (B, L, 3 D) with D a multiple of the"
            " heads."
        )
    if qkv.device.type == "cpu":
        return torch.ops.ris_fast.attention.default(qkv, heads)
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return fn.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


class _Attention(torch.autograd.Function):
    """The backward operator has no derivative of its own, so a second one is refused."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            out = torch.ops.ris_fast.attention.default(qkv, heads)
        ctx.save_for_backward(qkv)
        ctx.heads = heads
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "ris_fast::attention: create_graph=True asks for a second derivative, which it does not have. Use"
                " torch.nn.functional.scaled_dot_product_attention there."
            )
        return torch.ops.ris_fast.attention_backward.default(grad, *ctx.saved_tensors, ctx.heads), None


def _served(cpp: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The C++ for the dtypes that it has, else the definition."""

    def run(*args: Any) -> Tensor:
        return (cpp if args[-2].dtype in native.DTYPES and loader.available() else plain)(*args)

    return run


def _packed(name: str, batch: int, tokens: int, heads: int, channels: int, backward: bool, **kind: Any) -> Sample:
    def make(device: torch.device | str, dtype: torch.dtype) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(0)
        shapes = [(batch, tokens, heads * channels)] * backward + [(batch, tokens, 3 * heads * channels)]
        return *(torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype) for s in shapes), heads

    return Sample(name, make, **kind)


def _samples(backward: bool) -> tuple[Sample, ...]:
    return (
        _packed("standard", 64, 16, 8, 56, backward),
        _packed("standard-few", 64, 9, 8, 56, backward),
        _packed("many-tokens", 2, 64, 4, 16, backward),
        _packed("odd", 3, 5, 3, 7, backward),
        _packed("one-token", 2, 1, 2, 8, backward),
        _packed("empty-batch", 0, 4, 2, 8, backward),
        _packed("small", 2, 6, 2, 4, backward, small=True),
    )


def _cost(products: int, rows: int) -> Callable[..., Cost]:
    """products: of L x L by d, with those that compute the scores again; rows: widths D read and written."""

    def cost(*args: Any) -> Cost:
        qkv = args[-2]
        batch, tokens, width = qkv.shape
        return Cost(rows * qkv.nbytes // 3, 2 * products * batch * tokens * tokens * (width // 3))

    return cost


FORWARD = register(
    "attention(Tensor qkv, int heads) -> Tensor",
    cpu=_served(native.attention, reference.attention),
    cuda=reference.attention,
    elsewhere=reference.attention,
    fake=lambda qkv, heads: qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3),
    autograd=lambda qkv, heads: _Attention.apply(qkv, heads),
    reference=reference.attention,
    samples=_samples(False),
    cost=_cost(2, 4),
    backends={"cpp": native.attention},
)
BACKWARD = register(
    "attention_backward(Tensor grad, Tensor qkv, int heads) -> Tensor",
    cpu=_served(native.attention_backward, reference.attention_backward),
    cuda=reference.attention_backward,
    elsewhere=reference.attention_backward,
    fake=lambda grad, qkv, heads: qkv.new_empty(qkv.shape),
    reference=reference.attention_backward,
    samples=_samples(True),
    cost=_cost(5, 7),
    backends={"cpp": native.attention_backward},
)
FAMILY = Family("attention", (FORWARD, BACKWARD))
