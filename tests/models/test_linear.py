"""The linear layer's laws: torch's own values and gradients, whichever library computes them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ris_fast.models import linear as module
from ris_fast.models.linear import Linear, linear, onednn_linear

onednn = pytest.mark.skipif(not module.ONEDNN, reason="this torch was built without oneDNN")


def loss_and_gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    value = layer(x)
    value.square().sum().backward()
    return [value.detach(), x.grad, *(each.grad for each in layer.parameters())]


@pytest.mark.parametrize(
    "shape, outputs, bias", [((7, 33), 5, True), ((3, 16, 48), 29, False), ((1, 1), 1, True), ((0, 8), 3, True)]
)
def test_linear_is_as_near_to_float64_as_torchs(shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    torch.manual_seed(0)
    ours, x = Linear(shape[-1], outputs, bias), torch.randn(shape)
    theirs = nn.Linear(shape[-1], outputs, bias)
    theirs.load_state_dict(ours.state_dict())
    exact = loss_and_gradients(copy.deepcopy(theirs).double(), x.double())
    for mine, plain, truth in zip(loss_and_gradients(ours, x), loss_and_gradients(theirs, x), exact):
        scale = truth.abs().max() if truth.numel() else 1.0
        allowed = 2 * (plain - truth).abs().max() + 1e-6 * scale if truth.numel() else 0.0
        assert truth.numel() == 0 or (mine - truth).abs().max() <= allowed


@onednn
def test_onednn_linear_reads_strided_arguments() -> None:
    x, weight = torch.randn(6, 9).t(), torch.randn(6, 4).t()
    torch.testing.assert_close(onednn_linear(x, weight, None), x @ weight.t())


@onednn
def test_onednn_linear_passes_opcheck() -> None:
    x, weight, bias = (
        torch.randn(2, 3, 4, requires_grad=True),
        torch.randn(5, 4, requires_grad=True),
        torch.randn(5, requires_grad=True),
    )
    torch.library.opcheck(onednn_linear, (x, weight, bias))


def test_linear_leaves_other_dtypes_and_autocast_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("oneDNN was asked for what it does not serve")

    monkeypatch.setattr(module, "onednn_linear", never)
    x, weight = torch.randn(2, 4), torch.randn(3, 4)
    assert linear(x.double(), weight.double()).dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_linear_compiles_without_graph_break() -> None:
    layer, x = Linear(4, 3), torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
