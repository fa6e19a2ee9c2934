"""Every wrong call of cov_nmse is answered with who, what was given, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import ris_fast

F, S = torch.zeros(4, 36, 6, 2), torch.zeros(4, 36, 3, 2)
BAD = {
    "neither": ({}, "neither target_factor nor target_cov"),
    "both": ({"target_factor": S, "target_cov": torch.zeros(4, 36, 36, 2)}, "both target_factor and target_cov"),
    "other array": ({"target_factor": torch.zeros(4, 64, 3, 2)}, "N = 36"),
    "other batch": ({"target_factor": torch.zeros(5, 36, 3, 2)}, "B = 4"),
    "square": ({"target_cov": torch.zeros(4, 36, 35, 2)}, "expected|N = 36"),
    "precision": ({"target_factor": S.double()}, "float64"),
    "integers": ({"target_factor": S.long()}, "int64"),
    "no pair": ({"target_cov": torch.zeros(4, 36, 36)}, "last axis of 2"),
    "device": ({"target_factor": S.to("meta")}, "meta"),
    "target gradient": ({"target_factor": S.clone().requires_grad_()}, "detach"),
    "covariance gradient": ({"target_cov": torch.zeros(4, 36, 36, 2, requires_grad=True)}, "detach"),
    "blend alone": ({"target_factor": S, "blend": 0.3}, "sample_factor"),
    "blend above one": ({"target_factor": S, "blend": 1.5}, r"\[0, 1\]"),
    "sample shape": ({"target_factor": S, "blend": 0.3, "sample_factor": torch.zeros(4, 30, 3, 2)}, "sample_factor"),
    "shrink alone": ({"target_factor": S, "shrink": 1e-3}, "snr_db"),
    "snr shape": ({"target_factor": S, "shrink": 1e-3, "snr_db": torch.zeros(3)}, "snr_db"),
    "reduction": ({"target_factor": S, "reduction": "avg"}, "'mean', 'sum' or 'none'"),
    "loading side": ({"target_factor": S, "loading_side": "target"}, "'both' or 'prediction'"),
    "negative loading": ({"target_factor": S, "loading": -1.0}, "loading"),
    "nan weight": ({"target_factor": S, "diag_weight": float("nan")}, "diag_weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_every_wrong_call_is_answered_with_what_to_do(case: str) -> None:
    arguments, says = BAD[case]
    with pytest.raises(ValueError, match=says) as error:
        ris_fast.cov_nmse(F, **arguments)
    assert str(error.value).startswith("cov_nmse: ")


def test_not_a_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cov_nmse: target_factor is a list"):
        ris_fast.cov_nmse(F, target_factor=[1.0])


def test_a_target_without_a_name_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cov_nmse: 2 arguments without a name.* target_factor=T .* target_cov=T"):
        ris_fast.cov_nmse(F, S)


def loss(factor: Tensor) -> Tensor:
    return ris_fast.cov_nmse(factor, target_factor=torch.ones(4, 36, 3, 2))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))],
                         ids=["grad", "jacrev", "jvp"])
def test_transforms_of_functions_are_refused(transform: Callable[..., Callable[[Tensor], Tensor]]) -> None:
    with pytest.raises(RuntimeError, match=r"cov_nmse: called under torch.func .* Use loss.backward\(\)"):
        transform(loss)(torch.ones_like(F))


def test_a_second_derivative_is_refused_and_not_left_out() -> None:
    """A penalty on the gradient would lack the share that runs through the gradient, without a word."""
    factor = torch.ones_like(F).requires_grad_()
    with pytest.raises(RuntimeError, match="cov_nmse: a second derivative"):
        torch.autograd.grad(loss(factor), factor, create_graph=True)
