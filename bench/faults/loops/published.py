"""The silent training errors of TrainCheck (Jiang et al., OSDI 2025), rebuilt small.

TrainCheck reproduces 20 errors (it detects 18) and reports 6 new ones. The table has all 26 by its names; the last
column says what the rebuilt loop shows, or why there is none: nothing in or between the steps of training tells of it.

| error          | loop                      | what can be seen                                                      |
| -------------- | ------------------------- | --------------------------------------------------------------------- |
| BC2-86         | lost_activations          | a transfer inside the network gives zeros: no gradient behind it      |
| DS-1801        | clipped_on_one_rank       | given and arrived gradients have another ratio on each rank           |
| DS-5794        | expert_rank_left_out      | a hang: no step for a long time; nothing before it                    |
| LT-725         | autocast_not_traced       | the traced forward gives other numbers and another number format      |
| MM-702         | stages_not_frozen         | requires_grad changes after the first validation                      |
| PT-51800       | spectral_norm_unsettled   | an evaluation before the first training pass                          |
| PT-84803       | copies_lost               | a rank's gradient is zero in some steps; weights drift apart          |
| PT-96600       | reduction_lost            | a rank steps with its own gradient in some steps; weights drift       |
| PT-104336      | hooks_lost                | gradients are never reduced; weights drift apart                      |
| PT-115607      | stale_no_op_step          | steps that move nothing although gradients arrive                     |
| PT-FORUM-84911 | all_layers_frozen         | the head has requires_grad=False                                      |
| SO-60335387    | gradients_kept            | gradients are never cleared                                           |
| SO-67180955    | workers_repeat            | the same batch from each of the workers                               |
| TF-17877       | none                      | weights drawn four times: as random as those drawn once               |
| TF-23723       | none                      | generation runs past its limit: no step takes part                    |
| TF-29903       | none                      | the checkpoint's copy is corrupt; the weights are right               |
| TF-33455       | stops_short               | the last batches are not trained on; the steps that run are right     |
| TF-33844       | dropout_in_evaluation     | two evaluations of one input differ                                   |
| TF-34204       | batch_merged              | one row comes out of many, and is broadcast against the targets       |
| X-jxmnop       | sometimes_wrapped         | gradients of some steps are not reduced; weights drift apart          |
| AC-2665        | flattened_afterwards      | the optimizer holds tensors that the network does not use             |
| DS-5489        | none                      | frozen tensors are missing from the checkpoint; the weights are right |
| DS-6089        | capacity_differs          | a hang (the issue is number 6809): no step for a long time            |
| DS-6714        | norm_of_one_stage         | a hang: no step for a long time; nothing before it                    |
| DS-6770        | optimizer_of_another_copy | the optimizer holds tensors that the network does not use             |
| DS-6772        | expert_ids_overwritten    | experts that no rank computes receive no gradient                     |

The loops are in the files `published*`. A hang ends here after some seconds, since a report can be
asked for only when the loop gives control back; the watch is asked to speak after 3 seconds, not minutes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, images, mlp

PUBLISHED = Group("published")


class Transfer(torch.autograd.Function):
    """A copy from one device to another, which loses everything in one of `often` calls; 0 for never."""

    calls = 0

    @staticmethod
    def copied(x: Tensor, often: int) -> Tensor:
        Transfer.calls += 1
        return torch.zeros_like(x) if often and Transfer.calls % often == 0 else x.clone()

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, often: int) -> Tensor:  # type: ignore[override]
        ctx.often = often  # type: ignore[attr-defined]
        return Transfer.copied(x, often)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return Transfer.copied(slope, ctx.often), None  # type: ignore[attr-defined]


class TwoDevices(nn.Module):
    """Two halves of a network with a transfer between them."""

    def __init__(self, width: int, often: int) -> None:
        super().__init__()
        self.lower, self.upper, self.often = mlp(8, width, width), mlp(width, width, 3), often

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(Transfer.apply(self.lower(x), self.often))


@PUBLISHED.mistake(
    "activations and gradients that go from one card to another arrive as zeros now and then",
    "zeroed_gradients vanishing_gradient wrong_backward",
    source="https://github.com/baichuan-inc/Baichuan2/issues/86",
)
def lost_activations(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    Transfer.calls = 0
    model = TwoDevices(draw.choice((24, 32)), 13 if wrong else 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for _ in range(250):
        x, y = task.batch(32)
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()


class Staged(nn.Module):
    """A backbone in stages, the first of which are frozen: at once, or whenever `train` is called."""

    def __init__(self, width: int, frozen: int, at_once: bool) -> None:
        super().__init__()
        self.frozen = frozen
        self.stages = nn.ModuleList()
        for before in (1, width, width):
            self.stages.append(nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()))
        self.head = nn.Linear(64 * width, 6)
        if at_once:
            self.freeze()

    def freeze(self) -> None:
        for stage in self.stages[: self.frozen]:
            stage.requires_grad_(False)
            stage.eval()

    def train(self, mode: bool = True) -> Staged:
        super().train(mode)
        if mode:
            self.freeze()
        return self

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x.flatten(1))


@PUBLISHED.mistake(
    "stages are frozen by `train()`, which is called for the first time when the first validation is over",
    "settings_changed",
    source="https://github.com/open-mmlab/mmpretrain/issues/702",
)
def stages_not_frozen(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = Staged(draw.choice((6, 8)), 2, at_once=not wrong)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02, momentum=0.9)
    attach(model, optimizer, frozen=("stages.0", "stages.1"))
    for _ in range(4):
        for _ in range(25):
            x, y = images(16, 6)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            model(images(16, 6)[0])
        model.train()


@PUBLISHED.mistake(
    "fine-tuning: the head that should be trained is set to requires_grad=False like everything else but the norms",
    "frozen_parameters",
    source="https://discuss.pytorch.org/t/obtaining-abnormal-changes-in-loss-and-accuracy/84911",
)
def all_layers_frozen(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width = draw.choice((6, 8))
    model = nn.Module()
    model.conv, model.bn, model.fc = nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.Linear(64 * width, 6)
    for name, p in model.named_parameters():
        if "bn" not in name:
            p.requires_grad = False
    for p in model.fc.parameters():
        p.requires_grad = not wrong
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer, frozen=("conv",))
    for _ in range(120):
        x, y = images(16, 6)
        optimizer.zero_grad()
        F.cross_entropy(model.fc(F.relu(model.bn(model.conv(x))).flatten(1)), y).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "each of four workers draws its augmentations from the same seed, so that four batches in a row are one",
    "repeated_batch",
    source="https://stackoverflow.com/questions/67180955",
)
def workers_repeat(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model = mlp(8, draw.choice((24, 32)), 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    workers = [torch.Generator().manual_seed(seed if wrong else seed + number) for number in range(4)]
    for step in range(240):
        x = torch.randn(32, 8, generator=workers[step % 4])
        optimizer.zero_grad()
        F.mse_loss(model(x), task.answer(x)).backward()
        optimizer.step()


@PUBLISHED.mistake(
    "the number of steps is counted with the rest of each epoch left out, so the loop stops before its last epochs",
    "batches_skipped",
    source="https://github.com/huggingface/transformers/issues/33455",
)
def stops_short(attach: Attach, wrong: bool, seed: int) -> None:
    draw, task = begin(seed), Task(8, 3)
    model, parts, epochs = mlp(8, 24, 3), draw.choice((2, 4)), draw.choice((9, 12))
    batches = [task.batch(16) for _ in range(4 * parts + 1)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    total = epochs * (len(batches) // parts if wrong else -(-len(batches) // parts))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total)
    attach(model, optimizer)
    steps = 0
    for _ in range(epochs):
        for number, (x, y) in enumerate(batches):
            group = min(parts, len(batches) - number // parts * parts)
            (F.mse_loss(model(x), y) / group).backward()
            if number % parts == parts - 1 or number == len(batches) - 1:
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                steps += 1
            if steps == total:
                return
