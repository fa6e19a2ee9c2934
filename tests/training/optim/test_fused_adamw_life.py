"""FusedAdamW in a user's hands: gradients that come and go, models that move, saving, averages, loss scales, errors."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ris_fast import FusedAdamW

AdamW = torch.optim.AdamW
X = torch.randn(32, 6, generator=torch.Generator().manual_seed(5))


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 6))


def loss_of(model: nn.Module) -> Tensor:
    return (model(X) - X).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5, **zero: bool) -> None:
    for _ in range(steps):
        optimizer.zero_grad(**zero)
        loss_of(model).backward()
        optimizer.step()


def same(a: nn.Module, b: nn.Module, exactly: bool = False) -> bool:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return all(torch.equal(p, q) if exactly else torch.allclose(p, q, rtol=1e-5, atol=1e-7) for p, q in pairs)


def pair(**options: Any) -> tuple[nn.Module, FusedAdamW, nn.Module, AdamW]:
    ours, plain = make(), make()
    return ours, FusedAdamW(ours.parameters(), lr=1e-2, **options), plain, AdamW(plain.parameters(), lr=1e-2)


@pytest.mark.parametrize("clear", [False, True])
@pytest.mark.parametrize("to_none", [False, True])
@pytest.mark.parametrize("who", ["optimizer", "model"])
def test_fused_adamw_matches_torch_for_any_zero_grad(clear: bool, to_none: bool, who: str) -> None:
    ours, fused, plain, adamw = pair(clear_grads=clear)
    for _ in range(4):
        for model, optimizer in ((ours, fused), (plain, adamw)):
            (optimizer if who == "optimizer" else model).zero_grad(set_to_none=to_none)
            for _ in range(2):  # two micro-batches
                loss_of(model).backward()
            optimizer.step()
    assert same(ours, plain)


def test_fused_adamw_keeps_gradients_without_clear_grads() -> None:
    ours, fused, plain, adamw = pair(max_grad_norm=1e-3)
    train(ours, fused, 1)
    loss_of(make()).backward()
    train(plain, adamw, 1)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours.parameters(), plain.parameters(), strict=True))
    fused.clear_grads = True
    fused.step()
    assert not any(p.grad.any() for p in ours.parameters())
    loss_of(ours).backward()
    assert all(p.grad.any() for p in ours.parameters())
    fused.zero_grad(set_to_none=False)
    assert not any(p.grad.any() for p in ours.parameters())
    fused.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_fused_adamw_matches_torch_on_frozen_and_thawed() -> None:
    ours, fused, plain, adamw = pair()
    for model, optimizer in ((ours, fused), (plain, adamw)):
        model[0].weight.requires_grad_(False)
        train(model, optimizer, 3)
        model[0].weight.requires_grad_(True)
        train(model, optimizer, 3)
        model.zero_grad()
        (model[2].bias * 2).sum().backward()  # the others have no gradient now
        optimizer.step()
    assert same(ours, plain)
    assert (
        [float(fused.state[p]["step"]) for p in ours.parameters()]
        == [float(adamw.state[p]["step"]) for p in plain.parameters()]
        == [3, 6, 6, 7]
    )


def test_fused_adamw_matches_torch_on_tied_and_channels_last() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        ).to(memory_format=torch.channels_last)
        model[2].weight = model[0].weight
        return model

    ours, plain = build(), build()
    fused, adamw = FusedAdamW(ours.parameters()), AdamW(plain.parameters())
    x = torch.randn(2, 3, 8, 8)
    for _ in range(4):
        for model, optimizer in ((ours, fused), (plain, adamw)):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert same(ours, plain) and ours[2].weight is ours[0].weight
    assert ours[0].weight.is_contiguous(memory_format=torch.channels_last) and len(fused.tensor_names) == 5


def test_fused_adamw_refuses_memory_shared_but_not_tied() -> None:
    whole = torch.randn(10)
    with pytest.raises(ValueError, match="group0.0 and group0.1 are different but share memory"):
        FusedAdamW([nn.Parameter(whole[:6]), nn.Parameter(whole[4:])])


def test_fused_adamw_matches_torch_on_groups_and_closures() -> None:
    results = []
    for kind in (FusedAdamW, AdamW):
        model = make()
        optimizer = kind(
            [{"params": model[0].parameters(), "lr": 3e-2, "weight_decay": 0.3}, {"params": [model[2].weight]}], lr=1e-2
        )
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [3e-2, 1e-2], total_steps=12)
        for step in range(12):
            if step == 6:
                optimizer.add_param_group(
                    {
                        "params": [model[2].bias],
                        "lr": 5e-2,
                        "initial_lr": 5e-2,
                        "max_lr": 5e-2,
                        "min_lr": 0.0,
                        "max_momentum": 0.95,
                        "base_momentum": 0.85,
                    }
                )

            def closure() -> Tensor:
                optimizer.zero_grad()  # noqa: B023
                loss = loss_of(model)  # noqa: B023
                loss.backward()
                return loss

            assert float(optimizer.step(closure).detach()) > 0
            if step < 6:
                scheduler.step()
        results.append(model)
    assert same(*results)


def test_fused_adamw_refused_group_changes_nothing() -> None:
    model = make()
    optimizer = FusedAdamW(model[0].parameters(), lr=1e-2)
    for wrong in ({"lr": -1.0}, {"amsgrad": True}, {"eps": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            optimizer.add_param_group({"params": list(model[2].parameters()), **wrong})
    assert len(optimizer.param_groups) == 1
    train(model, optimizer)


def test_fused_adamw_state_dict_goes_both_ways_with_torch() -> None:
    ours, fused, plain, adamw = pair(ema_decay=0.9)
    train(ours, fused)
    train(plain, adamw)
    ours_2, plain_2 = copy.deepcopy(plain), copy.deepcopy(ours)
    fused_2, adamw_2 = FusedAdamW(ours_2.parameters()), AdamW(plain_2.parameters())
    fused_2.load_state_dict(copy.deepcopy(adamw.state_dict()))
    adamw_2.load_state_dict(copy.deepcopy(fused.state_dict()))
    for model, optimizer in ((ours, fused), (plain, adamw), (ours_2, fused_2), (plain_2, adamw_2)):
        train(model, optimizer)
    assert same(ours, plain) and same(ours_2, plain) and same(plain_2, plain)
    assert fused_2.param_groups[0]["lr"] == 1e-2
    with pytest.raises(ValueError, match="amsgrad"):
        fused.load_state_dict(AdamW(plain.parameters(), amsgrad=True).state_dict())


def refuse_on_load(saved: dict[str, Any], words: str) -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), ema_decay=0.9)
    train(model, optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=words):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(
        torch.equal(after["state"][i][key], value)
        for i, entry in before["state"].items()
        for key, value in entry.items()
    )


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "ema", "step"])
def test_fused_adamw_names_a_saved_tensor_of_another_shape(key: str) -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), ema_decay=0.9)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = torch.ones(6)
    refuse_on_load(
        saved,
        rf"saved '{key}' of group0.0 has shape \(6,\)"
        + ("" if key == "step" else r", but the parameter has shape \(20, 6\)"),
    )
    tensors = {name: value.clone() for name, value in optimizer.checkpoint_tensors()["optimizer"].items()}
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(ValueError, match=f"saved '{key}' of group0.1 has shape"):
        optimizer.load_checkpoint_tensors({"optimizer": tensors | {f"{key}.group0.1": torch.ones(1, 2)}})
    assert all(
        torch.equal(optimizer.state_dict()["state"][i][name], value)
        for i, entry in before.items()
        for name, value in entry.items()
    )
    for counters in ({}, {"counters": torch.ones(1)}):
        with pytest.raises(ValueError, match=r"saved 'counters' are (missing|of shape \(1,\))"):
            optimizer.load_checkpoint_tensors(
                {"optimizer": {name: t for name, t in tensors.items() if name != "counters"} | counters}
            )
    optimizer.state[model[0].weight]["exp_avg"] = torch.ones(6)
    with pytest.raises(ValueError, match=r"saved 'exp_avg' of group0.0 has shape \(6,\)"):
        train(model, optimizer)


@pytest.mark.parametrize("kind, words", [
    (lambda params: torch.optim.SGD(params, momentum=0.9), "no 'betas'"), (torch.optim.SGD, "no 'betas'"),
    (torch.optim.Adagrad, "no 'betas'"),
    (torch.optim.Adamax, "state of group0.0 has no 'exp_avg_sq'.*it has: step, exp_avg, exp_inf"),
])  # fmt: skip
def test_fused_adamw_refuses_the_state_of_another_optimizer(kind: Any, words: str) -> None:
    model = make()
    other = kind(model.parameters())
    train(model, other)
    refuse_on_load(other.state_dict(), f"{words}.*another kind of optimizer saved it")


def test_fused_adamw_keeps_its_weight_decay_kind_on_load() -> None:
    for decoupled in (False, True):
        model = make()
        optimizer = FusedAdamW(model.parameters(), decoupled_weight_decay=decoupled)
        train(model, optimizer)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert optimizer.param_groups[0]["decoupled_weight_decay"] is decoupled


def test_fused_adamw_ema_that_missed_steps_begins_again() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), lr=1e-2, ema_decay=0.9)
    train(model, optimizer, 3)
    detour = AdamW(model.parameters(), lr=1e-2)
    detour.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, detour, 5)
    with pytest.warns(RuntimeWarning, match="averages are dropped"):
        optimizer.load_state_dict(copy.deepcopy(detour.state_dict()))
    raw = copy.deepcopy(model)
    with optimizer.ema():
        assert same(model, raw, exactly=True)
    train(model, optimizer)  # and what is saved from now on is trusted
    other = make()
    other.load_state_dict(model.state_dict())
    restored = FusedAdamW(other.parameters(), ema_decay=0.9)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with optimizer.ema(), restored.ema():
        assert same(model, other, exactly=True) and not same(model, raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_adamw_ema_carried_by_torch_is_kept(dtype: torch.dtype) -> None:
    model = make()
    optimizer, start = FusedAdamW(model.parameters(), lr=1e-2, ema_decay=0.9), AdamW(model.parameters(), lr=1e-2)
    train(model, start, 7)
    optimizer.load_state_dict(
        copy.deepcopy(start.state_dict())
    )  # steps that nobody averaged, before the average begins
    train(model, optimizer, 258)  # which bfloat16 cannot hold exactly
    carrier = AdamW([p.detach().to(dtype).requires_grad_() for p in model.parameters()])
    carrier.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with optimizer.ema():
        averaged = copy.deepcopy(model)
    optimizer.load_state_dict(copy.deepcopy(carrier.state_dict()))
    with optimizer.ema():
        assert all(
            torch.allclose(p, q, rtol=1e-2, atol=1e-6)
            for p, q in zip(model.parameters(), averaged.parameters(), strict=True)
        )
        assert not same(model, make())


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("way", ["state_dict", "checkpoint_tensors", "deepcopy", "pickle"])
def test_fused_adamw_restored_continues_bitwise(way: str) -> None:
    model = make()
    options: dict[str, Any] = {
        "lr": 1e-2,
        "ema_decay": 0.9,
        "ema_warmup": True,
        "max_grad_norm": 0.05,
        "loss_scale": "dynamic",
    }
    optimizer = FusedAdamW(model.parameters(), **options)
    train(model, optimizer)
    if way in ("deepcopy", "pickle"):
        both = (model, optimizer)
        other, restored = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
        assert restored.param_groups[0]["params"][0] is other[0].weight
    else:
        other = make(1)
        restored = FusedAdamW(other.parameters(), **options)
        other.load_state_dict(through_file(model.state_dict()))
        if way == "state_dict":
            restored.load_state_dict(through_file(optimizer.state_dict()))
        else:
            restored.load_checkpoint_tensors(through_file(optimizer.checkpoint_tensors()))
    for each, its in ((model, optimizer), (other, restored)):
        train(each, its)
    assert same(model, other, exactly=True) and optimizer.counters() == restored.counters()
    assert restored.applied_steps() == 10
    with optimizer.ema(), restored.ema():
        assert same(model, other, exactly=True)
    assert not same(model, make())


def test_fused_adamw_refuses_a_checkpoint_of_another_model() -> None:
    saved = FusedAdamW(make().parameters(), ema_decay=0.9)
    loss_of(make()).backward()
    model = make()
    saved = FusedAdamW(model.parameters())
    train(model, saved, 1)
    with pytest.raises(ValueError, match="belongs to no parameter here"):
        FusedAdamW([nn.Parameter(torch.ones(3))]).load_checkpoint_tensors(saved.checkpoint_tensors())


def test_fused_adamw_weights_can_be_saved_with_safetensors(tmp_path: Any) -> None:
    from safetensors.torch import load_file, load_model, save_file, save_model

    model = make()
    train(model, FusedAdamW(model.parameters()))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    other = make(1)
    other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert same(model, other, exactly=True)
    save_model(model, str(tmp_path / "model.safetensors"))  # drops tensors that share a storage
    other = make(1)
    FusedAdamW(other.parameters())
    load_model(other, str(tmp_path / "model.safetensors"))
    assert same(model, other, exactly=True)


def test_fused_adamw_saved_tensor_is_no_larger_than_itself() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), ema_decay=0.9)
    train(model, optimizer, 1)
    for tensor in (model[0].bias, optimizer.state[model[0].bias]["exp_avg"], optimizer.extra_state()["ema.group0.1"]):
        assert tensor.untyped_storage().nbytes() == 4 * model[0].bias.numel()


def test_fused_adamw_ema_starts_at_the_first_steps_weights() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), ema_decay=0.5, lr=0.0)
    model.load_state_dict(make(1).state_dict())  # weights read after the optimizer was built
    with optimizer.ema():
        assert same(model, make(1), exactly=True)
    train(model, optimizer)
    with optimizer.ema():
        assert same(model, make(1), exactly=True)


def test_fused_adamw_ema_weights_never_stay() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters(), lr=0.1, ema_decay=0.9)
    train(model, optimizer)
    raw = copy.deepcopy(model)
    with pytest.raises(KeyError), optimizer.ema():
        assert not same(model, raw)
        with pytest.raises(RuntimeError, match="already in"), optimizer.ema():
            pass
        with pytest.raises(RuntimeError, match="Step outside"):
            optimizer.step()
        with torch.no_grad():
            model[0].weight.fill_(7.0)  # what happens inside is gone afterwards
        assert torch.is_grad_enabled()
        raise KeyError
    with torch.no_grad(), optimizer.ema():
        assert not torch.is_grad_enabled()
    assert same(model, raw, exactly=True)
    with optimizer.ema():
        assert float(model[0].weight.detach().max()) < 7.0
    manager = optimizer.ema()
    manager.__enter__()
    del manager  # never exited
    assert same(model, raw, exactly=True)
    optimizer.ema_decay = 0.5
    with pytest.raises(ValueError, match="cannot change"):
        optimizer.ema_decay = None
    with pytest.raises(RuntimeError, match="there is no average"), FusedAdamW(model.parameters()).ema():
        pass


def test_fused_adamw_follows_or_names_a_moved_model() -> None:
    """Before the first step the optimizer follows; after it, an error names the way out."""
    ours, plain = make(), make()
    fused, adamw = FusedAdamW(ours.parameters(), ema_decay=0.9), AdamW(plain.parameters())
    ours.double(), plain.double()
    x = X.double()
    for _ in range(2):
        for model, optimizer in ((ours, fused), (plain, adamw)):
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    assert same(ours, plain) and ours[0].weight.dtype == torch.float64
    before = copy.deepcopy(ours)
    ours.float()
    with pytest.raises(RuntimeError, match=r"4 of 4 parameters \(first: group0.0\) left the flat buffer.*rebind"):
        train(ours, fused, 1)
    ours.load_state_dict(before.state_dict())
    fused.rebind()
    plain.float()
    adamw_2 = AdamW(plain.parameters())
    adamw_2.load_state_dict(adamw.state_dict())
    train(ours, fused)
    train(plain, adamw_2)
    assert same(ours, plain) and fused.counters()["applied"] == 7


def test_fused_adamw_warns_about_a_copied_model() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters())
    loss_of(copy.deepcopy(model)).backward()
    with pytest.warns(RuntimeWarning, match="not of a copy"):
        optimizer.step()
    assert optimizer.counters()["attempted"] == 0


def test_fused_adamw_refuses_sparse_gradients() -> None:
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = FusedAdamW(table.named_parameters())
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="gradient of weight is torch.sparse_coo.*SparseAdam"):
        optimizer.step()


def test_fused_adamw_names_tensors_and_the_first_bad_one() -> None:
    model = make()
    optimizer = FusedAdamW(model.named_parameters())
    assert optimizer.tensor_names == [name for name, _ in model.named_parameters()]
    assert optimizer.counters()["first_bad_tensor"] is None
    loss_of(model).backward()
    before = copy.deepcopy(model)
    model[2].weight.grad[1, 1] = float("nan")
    optimizer.step()
    assert optimizer.counters()["first_bad_tensor"] == "2.weight" and same(model, before, exactly=True)
    assert float(optimizer.state[model[0].weight]["step"]) == 0


def test_fused_adamw_names_and_ema_follow_edited_lists() -> None:
    model = make()
    optimizer = FusedAdamW(model.named_parameters(), lr=1e-2, ema_decay=0.9, loss_scale="dynamic")
    train(model, optimizer)
    kept = {p: optimizer.state[p]["ema"].clone() for p in model.parameters()}
    new, params = nn.Parameter(torch.ones(3)), optimizer.param_groups[0]["params"]
    gone = params.pop(0)
    params.append(new)
    optimizer.zero_grad()
    new.grad = torch.full((3,), float("inf"))
    optimizer.step()
    assert (
        optimizer.tensor_names
        == optimizer.param_groups[0]["param_names"]
        == ["0.bias", "2.weight", "2.bias", "group0.3"]
    )
    counters = optimizer.counters()
    assert (counters["applied"], counters["skipped"], counters["first_bad_tensor"], counters["loss_scale"]) == (
        5,
        1,
        "group0.3",
        32768.0,
    )
    with optimizer.ema():
        assert all(torch.equal(p, kept[p]) for p in params[:-1]) and torch.equal(new, torch.ones(3))
    params[-1] = gone
    with optimizer.ema():
        assert torch.equal(gone, kept[gone])


def test_fused_adamw_matches_torch_on_any_choice_of_gradients() -> None:
    runs = []
    for kind in (FusedAdamW, AdamW):
        params = [nn.Parameter(torch.linspace(-1, 1, n)) for n in range(60, 68)]
        optimizer, generator = kind(params, lr=1e-2), torch.Generator().manual_seed(0)
        for _ in range(150):
            optimizer.zero_grad()
            sum(
                p.square().sum()
                for p, there in zip(params, torch.rand(8, generator=generator) < 0.5, strict=True)
                if there or p is params[0]
            ).backward()
            optimizer.step()
        runs.append((params, optimizer))
    for p, q in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        assert float(runs[0][1].state[p]["step"]) == float(runs[1][1].state[q]["step"])
    assert len(runs[0][1].buckets[0].tables) <= 64


@pytest.mark.parametrize("scale", [1024.0, "dynamic"])
def test_fused_adamw_loss_scale_does_not_change_the_result(scale: float | str) -> None:
    ours, fused, plain, adamw = pair(loss_scale=scale, max_grad_norm=0.01)
    for _ in range(5):
        fused.zero_grad(), adamw.zero_grad()
        fused.scale(loss_of(ours)).backward()
        loss_of(plain).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        fused.step(), adamw.step()
    assert same(ours, plain)
    ours[0].weight.grad[0, 0] = float("inf")
    fused.step()
    assert fused.counters()["loss_scale"] == (1024.0 if scale == 1024.0 else 32768.0)


def test_fused_adamw_works_with_torchs_grad_scaler() -> None:
    ours, fused, plain, adamw = pair()
    scalers = [torch.amp.GradScaler("cpu", init_scale=256.0) for _ in range(2)]
    for step in range(5):
        for model, optimizer, scaler in zip((ours, plain), (fused, adamw), scalers, strict=True):
            optimizer.zero_grad()
            scaler.scale(loss_of(model)).backward()
            if step == 2:
                model[0].bias.grad[0] = float("inf")
            if step == 3:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
    assert same(ours, plain) and scalers[0].get_scale() == scalers[1].get_scale() == 128.0
    counters = fused.counters()
    assert (counters["applied"], counters["skipped"]) == (4, 1)
    train(ours, fused, 1), train(plain, adamw, 1)  # without the scaler again
    assert same(ours, plain)


def test_fused_adamw_step_is_seen_by_autograd() -> None:
    model = make()
    optimizer = FusedAdamW(model.parameters())
    train(model, optimizer, 1)
    loss = loss_of(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_fused_adamw_sync_hyperparameters_renews_them() -> None:
    """What a CUDA graph needs: the step runs on the device's values, `sync_hyperparameters` renews them."""
    ours, fused, plain, adamw = pair(max_grad_norm=1.0)
    train(ours, fused, 1), train(plain, adamw, 1)
    state = fused.buckets[0].hyper
    fused.param_groups[0]["lr"] = adamw.param_groups[0]["lr"] = 0.3
    fused.max_grad_norm = 1e-3
    pushed = state.clone()
    fused.sync_hyperparameters()
    assert not torch.equal(pushed, state)
    loss_of(ours).backward(), loss_of(plain).backward()
    nn.utils.clip_grad_norm_(plain.parameters(), 1e-3)
    fused.step(), adamw.step()
    assert same(ours, plain)


def test_fused_adamw_capture_needs_gradients_in_the_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    optimizer = FusedAdamW(model.named_parameters(), clear_grads=True)
    monkeypatch.setattr(optimizer.buffers, "capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"4 gradients are not in the flat buffer \(first: 0.weight\)"):
        optimizer.step()
    monkeypatch.setattr(optimizer.buffers, "capturing", lambda: False)
    train(model, optimizer, 1)
    monkeypatch.setattr(optimizer.buffers, "capturing", lambda: True)
    optimizer.step()
    model.zero_grad()
    (model[2].bias * 2).sum().backward()
    with pytest.raises(RuntimeError, match=r"clear with zero_grad\(set_to_none=False\)"):
        optimizer.step()
    optimizer.state.clear()
    with pytest.raises(RuntimeError, match="captured after parameters, their data or their state were replaced"):
        optimizer.step()


@pytest.mark.parametrize("options, words", [
    ({"lr": -1.0}, "lr is -1.0"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": 0.0}, "eps is 0.0"),
    ({"weight_decay": -0.1}, "weight_decay"), ({"amsgrad": True}, "amsgrad"),
    ({"differentiable": True}, "differentiable"), ({"foreach": True, "fused": True}, "exclude each other"),
    ({"max_grad_norm": 0.0}, "max_grad_norm"), ({"ema_decay": 1.0}, "ema_decay"),
    ({"loss_scale": "static"}, "loss_scale"), ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"backend": "triton"}, "cannot serve float32 parameters on cpu"), ({"lr": torch.ones(2)}, "one element"),
    ({"lr": "a"}, "lr is 'a'"), ({"lr": None}, "lr is None"), ({"lr": float("inf")}, "lr is inf"),
    ({"lr": float("nan")}, "lr is nan"), ({"betas": 0.9}, "betas are 0.9"), ({"betas": ("a", 0.9)}, "betas are"),
    ({"eps": "x"}, "eps is 'x'"), ({"eps": float("inf")}, "eps is inf"), ({"weight_decay": "x"}, "weight_decay is 'x'"),
    ({"weight_decay": float("inf")}, "weight_decay is inf"), ({"max_grad_norm": "x"}, "max_grad_norm is 'x'"),
    ({"ema_decay": "x"}, "ema_decay is 'x'"), ({"records": 1.5}, "records is 1.5"),
    ({"records": "x"}, "records is 'x'"), ({"loss_scale": [1]}, "loss_scale is"),
    ({"clear_grads": "no"}, "clear_grads is 'no'"), ({"maximize": "no"}, "maximize is 'no'"),
    ({"telemetry": "no"}, "telemetry is 'no'"), ({"ema_warmup": None}, "ema_warmup is None"),
    ({"decoupled_weight_decay": 0.5}, "decoupled_weight_decay is 0.5"),
])  # fmt: skip
def test_fused_adamw_names_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FusedAdamW(make().parameters(), **options)


@pytest.mark.parametrize(
    "options", [{"foreach": True}, {"fused": True}, {"capturable": True}, {"foreach": False, "fused": False}]
)
def test_fused_adamw_accepts_torchs_implementation_flags(options: dict[str, bool]) -> None:
    ours, plain = make(), make()
    train(ours, FusedAdamW(ours.parameters(), lr=1e-2, **options))
    train(plain, AdamW(plain.parameters(), lr=1e-2))
    assert same(ours, plain)


def test_fused_adamw_refuses_float8_parameters_by_name() -> None:
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(ValueError, match=f"parameter w is {dtype}.*bfloat16"):
            FusedAdamW([("w", nn.Parameter(torch.ones(2).to(dtype), requires_grad=False))])
