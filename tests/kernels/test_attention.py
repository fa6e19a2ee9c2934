"""Attention of few tokens: torch's own function and gradient, to the rounding of each dtype."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as fn

from ris_fast.kernels.attention.op import attention


def flash(qkv: Tensor, heads: int) -> Tensor:
    query, key, value = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return fn.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def value_and_gradient(call: object, qkv: Tensor, heads: int, grad: Tensor) -> list[Tensor]:
    qkv = qkv.detach().clone().requires_grad_()
    out = call(qkv, heads)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad.to(out.dtype))]


def distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("batch, tokens, heads, channels", [(3, 16, 8, 56), (2, 9, 8, 56), (1, 64, 2, 8), (4, 5, 3, 7)])
def test_attention_errs_no_more_than_torchs(
    dtype: torch.dtype, batch: int, tokens: int, heads: int, channels: int
) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * channels).to(dtype)
    grad = torch.randn(batch, tokens, heads * channels).to(dtype)
    exact = value_and_gradient(flash, qkv.double(), heads, grad.double())
    ours, theirs = (value_and_gradient(call, qkv, heads, grad) for call in (attention, flash))
    for mine, plain, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        floor = {torch.float64: 1e-15, torch.float32: 3e-7}.get(dtype, 0.0)
        assert distance(mine, truth) <= 1.1 * distance(plain, truth) + floor


def test_attention_gradient_matches_its_numerical_jacobian() -> None:
    qkv = torch.randn(2, 5, 3 * 2 * 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attention(x, 2), (qkv,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_finite_for_large_scores_and_shows_a_nan(dtype: torch.dtype) -> None:
    qkv = (200 * torch.randn(2, 6, 3 * 2 * 4)).to(dtype)
    torch.testing.assert_close(attention(qkv, 2).float(), flash(qkv.float(), 2), rtol=1e-2, atol=1e-2)
    qkv[1, 3, 1] = float("nan")
    out = attention(qkv, 2)
    assert out[0].isfinite().all() and out[1, 3, :4].isnan().all()


def test_attention_reads_strided_products_and_leaves_them() -> None:
    whole = torch.randn(24, 4, 3, dtype=torch.float64).permute(2, 1, 0)
    before = whole.clone()
    torch.testing.assert_close(attention(whole, 2), attention(whole.contiguous(), 2), rtol=0.0, atol=0.0)
    assert torch.equal(whole, before)


def test_attention_names_a_width_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"attention: qkv is \(2, 4, 20\) with 3 heads"):
        attention(torch.zeros(2, 4, 20), 3)


def test_attention_refuses_a_second_derivative() -> None:
    qkv = torch.randn(1, 3, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(attention(qkv, 2).sum(), qkv, create_graph=True)


def test_attention_trains_compiled_without_graph_break() -> None:
    qkv, grad = torch.randn(2, 5, 24), torch.randn(2, 5, 8)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for mine, eager in zip(*(value_and_gradient(call, qkv, 2, grad) for call in (compiled, attention)), strict=True):
        torch.testing.assert_close(mine, eager, rtol=0.0, atol=0.0)
