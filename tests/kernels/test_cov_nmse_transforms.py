"""cov_nmse under torch.vmap and torch.func equals a loop over scenes sets, with its gradients, one transform inside
another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ris_fast import cov_nmse
from ris_fast.kernels.native import loader

V, B, N = 5, 3, 14
G = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


F, S, X = normal(V, B, N, 4, 2), normal(V, B, N, 2, 2), normal(V, B, N, 1, 2)
SNR = 10 * normal(V, B)
R = torch.view_as_real(torch.view_as_complex(S) @ torch.view_as_complex(S).mH)
CASES: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "factor": (lambda f, s: cov_nmse(f, target_factor=s), (F, S)),
    "covariance": (lambda f, r: cov_nmse(f, target_cov=r, reduction="sum"), (F, R)),
    "everything": (
        lambda f, s, x, snr: cov_nmse(
            f, target_factor=s, sample_factor=x, blend=0.3, loading=0.2, shrink=1e-2, snr_db=snr
        ),
        (F, S, X, SNR),
    ),
    "complex": (lambda f, s: cov_nmse(torch.view_as_complex(f), target_factor=torch.view_as_complex(s)), (F, S)),
    "float32": (lambda f, s: cov_nmse(f.float(), target_factor=s.float()).double(), (F, S)),
}
cases = pytest.mark.parametrize("case", CASES)


def by_loop(function: Callable[..., Tensor], args: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Values (V,) and gradients in the first argument, one call after the other."""
    values, gradients = [], []
    for given in zip(*args, strict=True):
        first = given[0].clone().requires_grad_()
        values.append(function(first, *given[1:]))
        gradients.append(torch.autograd.grad(values[-1], first)[0])
    return torch.stack(values).detach(), torch.stack(gradients)


@cases
@pytest.mark.parametrize("compiler", [True, False], ids=["C++", "torch"])
def test_cov_nmse_vmap_and_grad_equal_a_loop(case: str, compiler: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiler:
        monkeypatch.setattr(loader, "available", lambda: False)
    function, args = CASES[case]
    values, gradients = by_loop(function, args)
    first = args[0].clone().requires_grad_()
    mapped = torch.vmap(function)(first, *args[1:])
    torch.testing.assert_close(mapped.detach(), values)
    torch.testing.assert_close(torch.autograd.grad(mapped.sum(), first)[0], gradients)
    torch.testing.assert_close(torch.vmap(torch.func.grad(function))(*args), gradients)
    each, whole = torch.vmap(torch.func.grad_and_value(function))(*args)
    torch.testing.assert_close(each, gradients)
    torch.testing.assert_close(whole, values)
    torch.testing.assert_close(torch.func.grad(lambda *a: torch.vmap(function)(*a).sum())(*args), gradients)


def test_cov_nmse_vmap_takes_any_axes_and_shared_arguments() -> None:
    function, (f, s) = CASES["factor"]
    moved = torch.vmap(function, in_dims=(2, -1))(f.movedim(0, 2), s.movedim(0, -1))
    torch.testing.assert_close(moved, by_loop(function, (f, s))[0])
    shared = torch.vmap(torch.func.grad(function), in_dims=(0, None))(f, s[0])
    torch.testing.assert_close(shared, by_loop(function, (f, s[:1].expand_as(s)))[1])
    targets = torch.vmap(function, in_dims=(None, 0))(f[0], s)
    torch.testing.assert_close(targets, by_loop(function, (f[:1].expand_as(f), s))[0])


def test_cov_nmse_vmap_inside_another() -> None:
    function, (f, s) = CASES["factor"]
    twice = torch.vmap(torch.vmap(function))(torch.stack((f, 2 * f + 1)), torch.stack((s, s)))
    torch.testing.assert_close(twice, torch.stack((by_loop(function, (f, s))[0], by_loop(function, (2 * f + 1, s))[0])))


def test_cov_nmse_jacrev_is_the_gradient_of_each_scene() -> None:
    rows = torch.func.jacrev(lambda f: cov_nmse(f, target_factor=S[0], reduction="none"))(F[0])
    f = F[0].clone().requires_grad_()
    (own,) = torch.autograd.grad(cov_nmse(f, target_factor=S[0], reduction="sum"), f)
    for row in range(B):
        torch.testing.assert_close(rows[row, row], own[row])
        assert not rows[row, [i for i in range(B) if i != row]].any()


def test_cov_nmse_func_grad_reaches_the_sample_factor() -> None:
    function, args = CASES["everything"]
    found = torch.func.grad(function, argnums=(0, 2))(*(each[0] for each in args))
    leaves = [each[0].clone().requires_grad_() for each in (F, X)]
    wanted = torch.autograd.grad(function(leaves[0], S[0], leaves[1], SNR[0]), leaves)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_cov_nmse_per_sample_gradients_of_a_network() -> None:
    """What people use vmap(grad) for: one gradient a scene."""
    layer = torch.nn.Linear(6, N * 4 * 2).double()
    inputs = normal(V, 6)

    def loss(parameters: dict[str, Tensor], x: Tensor, s: Tensor) -> Tensor:
        return cov_nmse(
            torch.func.functional_call(layer, parameters, (x[None],)).view(1, N, 4, 2), target_factor=s[None]
        )

    found = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(
        {k: v.detach() for k, v in layer.named_parameters()}, inputs, S[:, 0]
    )
    for row in range(V):
        wanted = torch.autograd.grad(
            loss(dict(layer.named_parameters()), inputs[row], S[row, 0]), list(layer.parameters())
        )
        torch.testing.assert_close(found["weight"][row], wanted[0])
        torch.testing.assert_close(found["bias"][row], wanted[1])


def test_cov_nmse_vmap_of_the_bare_operator_is_one_call() -> None:
    """No warning of torch that it has to loop, which the tests would take for an error."""
    call = lambda f, s: torch.ops.ris_fast.cov_nmse(f, s, None, None, None, 0.0, 0.0, 0.0, 0.0, 1)  # noqa: E731
    loss, unit, none = torch.vmap(call, out_dims=(0, 0, None))(F, S)
    assert loss.shape == (V, B) and unit.shape == F.shape and none.numel() == 0
    torch.testing.assert_close(loss, torch.stack([call(f, s)[0] for f, s in zip(F, S, strict=True)]))


def test_cov_nmse_vmap_under_no_grad_makes_no_gradient() -> None:
    with torch.no_grad():
        assert not torch.vmap(CASES["factor"][0])(F.requires_grad_(), S).requires_grad
    F.requires_grad_(False)


SECOND = {
    "grad of grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).square().sum()),
    "backward through grad": lambda f: lambda x: torch.func.grad(f)(x.requires_grad_()).square().sum().backward(),
    "hessian": torch.func.hessian,
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
    "jacfwd": torch.func.jacfwd,
}


@pytest.mark.parametrize("how", SECOND)
def test_cov_nmse_refuses_second_order_and_forward_mode(how: str) -> None:
    with pytest.raises(RuntimeError, match="cov_nmse: (a second derivative|called under forward-mode).*in torch"):
        SECOND[how](lambda x: cov_nmse(x, target_factor=S[0]))(F[0].clone())
