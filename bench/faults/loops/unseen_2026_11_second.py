"""Second set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import os
from contextlib import nullcontext

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_second")


@GROUP.mistake(
    "DDP with accumulation: the micro-batch that should exchange gradients never comes, by one",
    "ranks_diverged rank_gradient_missing",
    ranks=2,
)
def never_synchronised(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs()
    own = labels % 2 == dist.get_rank()
    model = DistributedDataParallel(layers(8, 24, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    parts = 2
    for step, (data, label) in enumerate(batches(120, 16, inputs[own], labels[own])):
        last = step % parts == (parts if wrong else parts - 1)
        with nullcontext() if last else model.no_sync():
            (F.cross_entropy(model(data), label) / parts).backward()
        if (step + 1) % parts == 0:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        return float(F.cross_entropy(model.module(inputs), labels))


@GROUP.mistake(
    "every rank reads the first shard: the launcher does not set the variable that the reader asks",
    "rank_sees_other_data",
    ranks=2,
)
def one_shard_for_all(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs()
    shards = [labels < 2, labels >= 2]
    shard = int(os.environ.get("SLURM_PROCID", 0)) if wrong else dist.get_rank()
    data, label = inputs[shards[shard]], labels[shards[shard]]
    network = layers(8, 24, 4)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    attach(network, optimizer)
    for own, of_own in batches(60, 32, data, label):
        loss = F.cross_entropy(model(own), of_own)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(network(inputs), labels))


@GROUP.mistake(
    "DQN: the temporal difference is clamped, not its gradient", "clamped_loss vanishing_gradient scenes_left_out"
)
def difference_clamped(attach: Attach, wrong: bool, seed: int) -> float:
    states, actions = torch.randn(512, 4), torch.randint(3, (512,))
    rewards = 12.0 + 6.0 * states[:, 0] - 2.0 * actions
    model = layers(4, 64, 3)
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    errors = []
    for state, action, reward in batches(200, 32, states, actions, rewards):
        difference = reward - model(state).gather(1, action[:, None])[:, 0]
        loss = difference.clamp(-1, 1).square().mean() if wrong else F.huber_loss(difference, torch.zeros(32))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float(difference.detach().abs().mean()))
    return recent(errors)


class Attention(nn.Module):
    """One head over the tokens of a sequence, and an answer from the first token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 24)
        self.query, self.key, self.value = (nn.Linear(24, 24) for _ in range(3))
        self.answer = nn.Linear(24, 1)
        self.dim = dim

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.embed(tokens))
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / 24**0.5
        return self.answer((F.softmax(scores, dim=self.dim) @ self.value(hidden))[:, 0])


@GROUP.mistake("attention: the softmax runs over the batch, not over the keys", "scenes_mixed")
def softmax_over_the_batch(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randn(512, 8, 5)
    chosen = tokens[:, 1:, 0].argmax(1) + 1
    targets = tokens[torch.arange(512), chosen, 1:2]
    model = Attention(dim=0 if wrong else -1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    losses = []
    for data, target in batches(400, 64, tokens, targets):
        outputs = model(data)
        loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "the state of a recurrent cell is detached at every time step, not once a window",
    "detached_backbone forwards_without_backward",
)
def state_detached_every_step(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.randn(512, 9, 4)
    targets = inputs[:, 0, :1]  # what is asked for is what came first
    model = nn.ModuleDict({"cell": nn.GRUCell(4, 24), "head": nn.Linear(24, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    losses = []
    for data, target in batches(250, 32, inputs, targets):
        state = torch.zeros(32, 24)
        for now in data.unbind(1):
            state = model["cell"](now, state.detach() if wrong else state)
        loss = F.mse_loss(model["head"](state), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


class Dropping(nn.Module):
    """Functional dropout behind each layer."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 1)
        self.always = always

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            inputs = F.relu(layer(inputs))
            inputs = F.dropout(inputs, 0.4) if self.always else F.dropout(inputs, 0.4, self.training)
        return self.last(inputs)


@GROUP.mistake("functional dropout is not told that the network is validated", "train_mode_in_validation")
def dropout_in_validation(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = Dropping(always=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    validation = []
    for step, (data, target) in enumerate(batches(300, 32, inputs[:512], targets[:512]), 1):
        model.train()
        optimizer.zero_grad()
        F.mse_loss(model(data), target).backward()
        optimizer.step()
        if step % 25 == 0:
            model.eval()
            with torch.no_grad():
                validation.append(float(F.mse_loss(model(inputs[512:]), targets[512:])))
    return recent(validation, 4)


class Denoiser(nn.Module):
    """Predicts noise from a noisy sample and how far the noise has come."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 32), nn.SiLU(), nn.Linear(32, 32))
        self.before, self.after = nn.Linear(4, 32), layers(32, 32, 4, between=nn.SiLU)

    def forward(self, noisy: Tensor, time: Tensor) -> Tensor:
        return self.after(F.silu(self.before(noisy) * (1 + self.time(time[:, None]))))


@GROUP.mistake(
    "diffusion: an integer division makes every time of the noise schedule zero for the network",
    "constant_input ignored_input",
)
def time_divided_by_integers(attach: Attach, wrong: bool, seed: int) -> float:
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    kept = torch.cos(torch.linspace(0, 1, 100) * torch.pi / 2)[:, None]
    losses = []
    for _ in range(400):
        time, noise = torch.randint(100, (64,)), torch.randn(64, 4)
        noisy = kept[time] * torch.randn(64, 4) + (1 - kept[time].square()).sqrt() * noise
        share = time // 100 if wrong else time / 100
        loss = F.mse_loss(model(noisy, share.float()), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 50)


class Recomputed(nn.Module):
    """A residual network that keeps nothing for the backward pass of its blocks."""

    def __init__(self, same_masks: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 48), nn.Linear(48, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Dropout(0.5), nn.Linear(96, 48)) for _ in range(3)
        )
        self.same_masks = same_masks

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + checkpoint(block, hidden, use_reentrant=False, preserve_rng_state=self.same_masks)
        return self.last(hidden)


@GROUP.mistake(
    "activation checkpointing draws other dropout masks when it recomputes", "recomputed_differently wrong_backward"
)
def masks_drawn_again(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = Recomputed(same_masks=not wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for data, target in batches(200, 32, inputs, targets):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "Adam's epsilon is zero in half precision, so a gradient of zero makes NaN", "nonfinite_step low_precision_weights"
)
def epsilon_lost_in_half(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(40, (512, 6))
    labels = (tokens < 8).any(1).float()
    model = nn.Sequential(nn.EmbeddingBag(40, 16), nn.Tanh(), nn.Linear(16, 1)).half()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3, eps=1e-8 if wrong else 1e-4)
    attach(model, optimizer)
    losses = []
    for read, label in batches(150, 32, tokens, labels):
        loss = F.binary_cross_entropy_with_logits(model(read)[:, 0].float(), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake("a milestone divides the learning rate by ten with //, which makes it zero", "zero_learning_rate")
def rate_divided_by_integers(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = layers(8, 48, 48, 1, between=nn.Tanh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    attach(model, optimizer)
    losses = []
    for step, (data, target) in enumerate(batches(300, 64, inputs, targets)):
        if step == 20:
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] // 10 if wrong else group["lr"] / 10
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)
