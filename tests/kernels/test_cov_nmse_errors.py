"""Every wrong call of cov_nmse is answered with who, what was given, what was expected and what to do."""

from __future__ import annotations

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
    "infinite loading": ({"target_factor": S, "loading": float("inf")}, "loading is inf, expected a finite number"),
    "infinite shrinkage": ({"target_factor": S, "shrink": float("inf"), "snr_db": 0.0}, "shrink is inf"),
    "nan blend": ({"target_factor": S, "blend": float("nan")}, "blend is nan"),
    "zero target": ({"target_factor": S}, "the target of scene 0 has no power"),
    "zero covariance": ({"target_cov": torch.zeros(4, 36, 36, 2)}, "the target of scene 0 has no power"),
}
G = torch.Generator().manual_seed(0)
FACTOR = torch.randn(3, 12, 4, dtype=torch.complex64, generator=G)
SOURCES = torch.randn(3, 12, 2, dtype=torch.complex64, generator=G)
TRUE = SOURCES @ SOURCES.mH
NO_COVARIANCE = {
    "negative": (-TRUE, "negative power on the diagonal of scene 0"),
    "one scene negative": (torch.stack((TRUE[0], TRUE[1], -TRUE[2])), "negative power on the diagonal of scene 2"),
    "one negative power": (
        TRUE - 2 * torch.diag_embed(torch.eye(12)[5] * TRUE[:, 5, 5].real[:, None]),
        "negative power",
    ),
    "upper triangle": (TRUE.triu(), "scene 0 is not Hermitian"),
    "lower triangle": (TRUE.tril(), "scene 0 is not Hermitian"),
    "transposed product": (SOURCES @ SOURCES.mT + 9 * torch.eye(12), "scene 0 is not Hermitian"),
    "symmetric": (torch.complex(TRUE.real, TRUE.imag.triu() - TRUE.imag.tril().abs()), "scene 0 is not Hermitian"),
    "imaginary diagonal": (TRUE + 1j * TRUE.abs().amax() * torch.eye(12), "scene 0 is not Hermitian"),
}


@pytest.mark.parametrize("case", BAD)
def test_cov_nmse_wrong_call_says_what_to_do(case: str) -> None:
    arguments, says = BAD[case]
    with pytest.raises(ValueError, match=says) as error:
        ris_fast.cov_nmse(F, **arguments)
    assert str(error.value).startswith("cov_nmse: ")


@pytest.mark.parametrize("case", NO_COVARIANCE)
def test_cov_nmse_names_a_target_that_is_no_covariance(case: str) -> None:
    target, says = NO_COVARIANCE[case]
    for validate in (None, True):
        with pytest.raises(ValueError, match=f"cov_nmse: target_cov .*{says}"):
            ris_fast.cov_nmse(FACTOR, target_cov=target, validate=validate)
    assert ris_fast.cov_nmse(FACTOR, target_cov=target, validate=False).isfinite()


def test_cov_nmse_validate_looks_at_every_entry() -> None:
    crooked = TRUE.repeat(4, 1, 1)
    crooked[11, 7, 3] += 5
    with pytest.raises(ValueError, match="scene 11 is not Hermitian: .* by up to 5"):
        ris_fast.cov_nmse(FACTOR.repeat(4, 1, 1), target_cov=crooked, validate=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_cov_nmse_takes_covariances_of_any_precision(dtype: torch.dtype) -> None:
    factor = torch.view_as_real(FACTOR).to(dtype)
    for target in (TRUE, TRUE.conj(), torch.eye(12).expand(3, -1, -1), 1e-4 * TRUE):
        pair = torch.view_as_real(target.to(torch.complex64).resolve_conj()).to(dtype)
        for validate in (None, True):
            assert ris_fast.cov_nmse(factor, target_cov=pair, validate=validate).isfinite()


def test_cov_nmse_of_nan_is_nan_and_zero_targets_can_be_loaded() -> None:
    broken = SOURCES.clone()
    broken[1, 2, 0] = float("nan")
    loss = ris_fast.cov_nmse(FACTOR, target_factor=broken, reduction="none")
    assert loss[1].isnan() and loss[[0, 2]].isfinite().all()
    assert ris_fast.cov_nmse(FACTOR, target_cov=broken @ broken.mH, reduction="none").isnan().tolist() == [
        False,
        True,
        False,
    ]
    assert ris_fast.cov_nmse(FACTOR, target_factor=0 * SOURCES, loading=0.5).isfinite()
    assert ris_fast.cov_nmse(FACTOR, target_factor=0 * SOURCES, validate=False).isinf()


@pytest.mark.parametrize("option", ["blend", "loading", "shrink"])
@pytest.mark.parametrize("value", [torch.tensor(0.1), "0.1", None], ids=["tensor", "text", "none"])
def test_cov_nmse_option_that_is_no_number_is_a_type_error(option: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"cov_nmse: {option} is a .*expected a number"):
        ris_fast.cov_nmse(FACTOR, target_factor=SOURCES, **{option: value})


def test_cov_nmse_names_text_for_snr_and_an_empty_array() -> None:
    with pytest.raises(TypeError, match="cov_nmse: snr_db is '3 dB'"):
        ris_fast.cov_nmse(FACTOR, target_factor=SOURCES, shrink=1e-3, snr_db="3 dB")
    with pytest.raises(ValueError, match="an array of N = 0 elements"):
        ris_fast.cov_nmse(FACTOR[:, :0], target_factor=SOURCES[:, :0])


@pytest.mark.parametrize("option", ["diag_weight", "offdiag_weight"])
def test_cov_nmse_removed_weight_says_what_to_write_instead(option: str) -> None:
    with pytest.raises(TypeError, match=f"cov_nmse: {option} was removed.* Leave it out.*in torch"):
        ris_fast.cov_nmse(FACTOR, target_factor=SOURCES, **{option: 1.0})


def test_cov_nmse_unknown_option_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cov_nmse: unexpected keyword argument 'loadings'"):
        ris_fast.cov_nmse(FACTOR, target_factor=SOURCES, loadings=1.0)


def test_cov_nmse_target_that_is_no_tensor_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cov_nmse: target_factor is a list"):
        ris_fast.cov_nmse(F, target_factor=[1.0])


def test_cov_nmse_positional_target_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="cov_nmse: 2 arguments without a name.* target_factor=T .* target_cov=T"):
        ris_fast.cov_nmse(F, S)


def loss(factor: Tensor) -> Tensor:
    return ris_fast.cov_nmse(factor, target_factor=torch.ones(4, 36, 3, 2))


def test_cov_nmse_refuses_a_second_derivative() -> None:
    """A penalty on the gradient would lack the share that runs through the gradient, without a word."""
    factor = torch.ones_like(F).requires_grad_()
    with pytest.raises(RuntimeError, match="cov_nmse: a second derivative"):
        torch.autograd.grad(loss(factor), factor, create_graph=True)
