"""The convolution by products: torch's values and gradients, whatever stride, padding and groups."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast.models.convolution import Conv1d

FORMS = {
    "taps": {"kernel_size": 5, "padding": 2},
    "one tap": {"kernel_size": 1},
    "strided": {"kernel_size": 4, "stride": 3, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False},
    "channel by channel": {"kernel_size": 3, "padding": 1, "groups": 6},
    "channel by channel, strided": {"kernel_size": 2, "stride": 2, "groups": 6, "bias": False},
    "groups": {"kernel_size": 3, "groups": 2},  # these two by torch's own convolution
    "dilated": {"kernel_size": 3, "dilation": 2},
}


def value_and_gradients(layer: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    value = layer(x)
    value.square().sum().backward()
    return [value.detach(), x.grad, *(each.grad for each in layer.parameters())]


@pytest.mark.parametrize("form", FORMS)
def test_conv1d_is_torchs(form: str) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = FORMS[form]
    ours, theirs = Conv1d(6, 6, **settings).double(), nn.Conv1d(6, 6, **settings).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 11, 6, dtype=torch.float64).transpose(1, 2)
    for mine, plain in zip(value_and_gradients(ours, x), value_and_gradients(theirs, x), strict=True):
        torch.testing.assert_close(mine, plain)


def test_conv1d_calls_no_convolution_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("torch's convolution was called")

    monkeypatch.setattr(nn.Conv1d, "forward", never)
    for form in ("taps", "strided", "channel by channel"):
        assert Conv1d(6, 6, **FORMS[form])(torch.randn(2, 6, 9)).shape[:2] == (2, 6)
