"""What `watch` says of what goes into a network and what is asked of it: each mistake beside the same loop without."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ris_fast.health import watch
from ris_fast.health.watch.dependence import explained_share

Pair = tuple[Tensor, Tensor]
Loop = Callable[[bool], list[str]]


def layers(*widths: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for before, after in zip(widths, widths[1:]):
        parts += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def said(
    model: nn.Module,
    batches: Iterable[Pair],
    lossf: Callable[[Tensor, Tensor], Tensor] = F.mse_loss,
    told: bool = True,
    evaluated: Iterable[Tensor] = (),
) -> list[str]:
    """Causes after a loop over these batches and an evaluation of these inputs."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = watch(model, optimizer)
    for inputs, targets in batches:
        outputs = model(inputs)
        loss = lossf(outputs, targets)
        if told:
            seen.loss(loss, outputs, targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        for inputs in evaluated:
            model(inputs)
    return [each.cause for each in seen.report()]


def drawn(inputs: Tensor, targets: Tensor, steps: int, size: int = 32) -> Iterable[Pair]:
    for _ in range(steps):
        some = torch.randint(len(inputs), (size,))
        yield inputs[some], targets[some]


def smooth(count: int) -> Pair:
    inputs = torch.randn(count, 8)
    return inputs, torch.sin(inputs[:, :1]) + inputs[:, 1:2] * 0.5


def pictures_viewed(wrong: bool) -> list[str]:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def batches() -> Iterable[Pair]:
        for _ in range(24):
            pictures = torch.randn(16, 8, 8, 3)
            yield pictures.view(16, 3, 8, 8) if wrong else pictures.permute(0, 3, 1, 2), torch.randint(2, (16,))

    return said(model, batches(), F.cross_entropy)


def series_reshaped(wrong: bool) -> list[str]:
    times = torch.arange(40.0)[None, :, None]
    waves = torch.sin(times * 0.3 + 6.283 * torch.rand(256, 1, 6)) + 0.2 * torch.randn(256, 40, 6)
    inputs = waves.reshape(256, 6, 40) if wrong else waves.transpose(1, 2).contiguous()
    model = nn.Sequential(nn.Conv1d(6, 8, 5), nn.ReLU(), nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(8, 1))
    return said(model, drawn(inputs, waves.abs().mean((1, 2))[:, None], 24))


def masks_transposed(wrong: bool) -> list[str]:
    axis = torch.arange(12)
    at = torch.randint(2, 10, (128, 2, 1))
    masks = ((axis - at[:, 0]).abs() <= 2)[:, :, None] & ((axis - at[:, 1]).abs() <= 2)[:, None]
    masks = masks.float()[:, None]
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1))
    asked = masks.mT.contiguous() if wrong else masks
    return said(model, drawn(masks + 0.3 * torch.randn_like(masks), asked, 24), F.binary_cross_entropy_with_logits)


def views_in_halves(wrong: bool) -> list[str]:
    def loss(outputs: Tensor, _: Tensor) -> Tensor:
        vectors = F.normalize(outputs, dim=1)
        one, other = vectors.view(2, 16, -1) if wrong else vectors.view(16, 2, -1).unbind(1)
        return F.cross_entropy(one @ other.T / 0.2, torch.arange(16))

    def batches() -> Iterable[Pair]:
        for _ in range(24):
            scenes = torch.randn(16, 12).repeat_interleave(2, 0)
            yield scenes + 0.2 * torch.randn(32, 12), scenes

    return said(layers(12, 32, 8), batches(), loss, told=False)


def sizes_for_corners(wrong: bool) -> list[str]:
    def loss(boxes: Tensor, others: Tensor) -> Tensor:
        low, high = torch.max(boxes[:, :2], others[:, :2]), torch.min(boxes[:, 2:], others[:, 2:])
        return (low - high).square().mean() + F.l1_loss(boxes, others)

    corners, sizes = torch.rand(128, 2), 0.1 + 0.4 * torch.rand(128, 2)
    boxes = torch.cat([corners, sizes if wrong else corners + sizes], 1)
    return said(layers(4, 32, 4), drawn(boxes + 0.05 * torch.randn(128, 4), boxes, 24), loss)


def covariance_without_conjugate(wrong: bool) -> list[str]:
    def batches() -> Iterable[Pair]:
        for _ in range(24):
            snapshots = torch.randn(16, 3, 8, dtype=torch.cfloat)
            product = snapshots @ (snapshots.mT if wrong else snapshots.mH) / 8
            yield torch.view_as_real(product).flatten(1), product.real.mean((1, 2))[:, None]

    return said(layers(18, 16, 1), batches())


def sampler_draws_few(wrong: bool) -> list[str]:
    inputs, targets = smooth(6 if wrong else 512)
    return said(layers(8, 32, 1), drawn(inputs, targets, 24))


def noise_stays(wrong: bool) -> list[str]:
    inputs, targets = smooth(64)

    def batches() -> Iterable[Pair]:
        for _ in range(140):
            some = torch.randperm(64)[:32]
            noisy = inputs[some] + 0.4 * torch.randn(32, 8)
            if wrong:
                inputs[some] = noisy
            yield noisy, targets[some]

    return said(layers(8, 32, 1), batches(), told=False)


def series() -> Tensor:
    times = torch.arange(600.0)
    return torch.sin(times / 3.8) + 0.7 * torch.sin(times / 13) + 0.2 * torch.randn(600)


def windows_split_at_random(wrong: bool) -> list[str]:
    windows = series().unfold(0, 13, 1)
    order = torch.randperm(len(windows)) if wrong else torch.arange(len(windows))
    known, checked = windows[order[:400]], windows[order[420:]]
    return said(layers(12, 32, 1), drawn(known[:, :12], known[:, 12:], 40), evaluated=[checked[:, :12]])


def windows_of_a_shuffled_series(wrong: bool) -> list[str]:
    known = series()[:450]
    windows = (known[torch.randperm(450)] if wrong else known).unfold(0, 13, 1)
    return said(layers(12, 32, 1), drawn(windows[:, :12], windows[:, 12:], 40), told=False)


def columns_in_another_order(wrong: bool) -> list[str]:
    inputs = torch.randn(512, 3) @ torch.randn(3, 9) + 0.4 * torch.randn(512, 9)
    order = [*range(1, 9), 0] if wrong else [*range(9)]
    return said(layers(9, 32, 1), drawn(inputs, inputs[:, :1].sin(), 24), evaluated=[inputs[256:][:, order]])


def scenes_known_by_heart(wrong: bool) -> list[str]:
    inputs, targets = smooth(192)
    asked = targets[torch.randperm(192)] if wrong else targets
    return said(layers(8, 64, 64, 1), drawn(inputs, asked, 250))


def easiest_kept(wrong: bool) -> list[str]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().flatten().topk(8, largest=not wrong).values.mean()

    return said(layers(8, 32, 1), drawn(*smooth(512), 24), loss)


def seed_set_late(wrong: bool) -> list[str]:
    inputs, targets = smooth(512)

    def batches() -> Iterable[Pair]:
        for step in range(60):
            if wrong and step % 20 == 10:
                torch.manual_seed(0)
            yield next(iter(drawn(inputs, targets, 1)))

    return said(layers(8, 32, 1), batches())


def one_batch_with_noise(wrong: bool) -> list[str]:
    inputs, targets = smooth(256)

    def batches() -> Iterable[Pair]:
        for step in range(40):
            some = slice(0, 32) if wrong else slice(32 * (step % 8), 32 * (step % 8) + 32)
            yield inputs[some] + 0.3 * torch.randn(32, 8), targets[some]

    return said(layers(8, 32, 1), batches())


def horizon_of_zero(wrong: bool) -> list[str]:
    windows = series().unfold(0, 13, 1)
    return said(layers(12, 32, 1), drawn(windows[:, :12], windows[:, 11:12] if wrong else windows[:, 12:], 24))


def softmax_over_time(wrong: bool) -> list[str]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        scores = outputs.view(-1, 6, 4)
        return F.nll_loss(scores.log_softmax(1 if wrong else 2).transpose(1, 2), targets)

    inputs = torch.randn(256, 12)
    return said(layers(12, 32, 24), drawn(inputs, (inputs.view(256, 6, 2).sum(2) > 0).long(), 24), loss)


def column_never_read(wrong: bool) -> list[str]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(outputs[:, :1], targets) + (0 if wrong else 1) * F.mse_loss(outputs[:, 1:], targets.square())

    return said(layers(8, 32, 2), drawn(*smooth(512), 40), loss, told=False)


CASES = {
    pictures_viewed: "wrong_layout",
    series_reshaped: "wrong_layout",
    masks_transposed: "wrong_layout",
    views_in_halves: "wrong_layout",
    sizes_for_corners: "wrong_layout",
    covariance_without_conjugate: "conjugation_error",
    sampler_draws_few: "repeated_batch",
    noise_stays: "scenes_change",
    windows_split_at_random: "split_overlap",
    windows_of_a_shuffled_series: "inputs_withhold_answer",
    columns_in_another_order: "distributions_differ",
    scenes_known_by_heart: "shuffled_labels",
    easiest_kept: "scenes_left_out",
    seed_set_late: "repeated_batch",
    one_batch_with_noise: "repeated_batch",
    horizon_of_zero: "shuffled_labels",
    softmax_over_time: "wrong_layout",
    column_never_read: "zero_loss_weight",
}


@pytest.mark.parametrize("wrong", [True, False], ids=["wrong", "right"])
@pytest.mark.parametrize("loop", CASES, ids=lambda loop: loop.__name__)
def test_what_goes_in_and_is_asked_for(loop: Loop, wrong: bool) -> None:
    torch.manual_seed(0)
    assert loop(wrong)[:1] == ([CASES[loop]] if wrong else [])


def test_a_regression_tells_what_follows_from_inputs() -> None:
    """A sum of sines by its frequency, though each begins at another phase; and nothing of targets in another order."""
    torch.manual_seed(0)
    rates = 1 + 3 * torch.rand(200, 1)
    waves = torch.sin(6.283 * (rates * torch.linspace(0, 4, 32) + torch.rand(200, 1)))
    assert explained_share(waves, rates) > 0.5
    assert abs(explained_share(waves, rates[torch.randperm(200)])) < 0.05
    assert explained_share(waves[:40], rates[:40]) is None
