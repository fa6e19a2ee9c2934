"""Second half of the second set of the examination of November 2026."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_second")


@GROUP.mistake(
    "the schedule that reacts to a plateau is told that a larger loss is better, and cuts the rate again and again",
    "learning_rate_too_small learning_rate_off_plan no_progress",
)
def plateau_of_the_wrong_sign(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(256)
    model = layers(8, 48, 48, 1, between=nn.SiLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max" if wrong else "min", 0.2, patience=2)
    attach(model, optimizer)
    losses = []
    for _ in range(50):
        for data, target in batches(8, 32, inputs, targets):
            optimizer.zero_grad()
            loss = F.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step(recent(losses, 8))
    return recent(losses)


class Ordered(nn.Module):
    """A sequence model that knows the order of its tokens from a table of positions."""

    def __init__(self, registered: bool) -> None:
        super().__init__()
        positions = nn.Parameter(torch.zeros(10, 16))
        self.position = positions if registered else positions.unsqueeze(0)
        self.embed = nn.Embedding(6, 16)
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.answer = nn.Linear(16, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(self.mix(self.embed(tokens) + self.position).mean(1))


@GROUP.mistake(
    "a view of a parameter is kept instead of the parameter, so the module does not have it", "unregistered_parameters"
)
def positions_kept_as_a_view(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(6, (512, 10))
    targets = (tokens[:, :1] - 2.5) / 1.7
    model = Ordered(registered=not wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    losses = []
    for read, target in batches(250, 32, tokens, targets):
        loss = F.mse_loss(model(read), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "four batches are prefetched into one buffer, so three of four targets meet the inputs of another batch",
    "stale_cache repeated_batch shuffled_labels",
)
def one_buffer_for_four_batches(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = layers(8, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    buffer, waiting, losses = torch.empty(32, 8), [], []
    for (chosen,) in batches(240, 32, torch.arange(512)):
        torch.index_select(inputs, 0, chosen, out=buffer)
        waiting.append((buffer if wrong else buffer.clone(), targets[chosen]))
        if len(waiting) < 4:
            continue
        for data, target in waiting:
            outputs = model(data)
            loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        waiting.clear()
    return recent(losses, 20)


@GROUP.mistake(
    "PPO: the new log-probabilities are computed under no_grad like the old ones",
    "detached_loss unused_head dead_loss_term",
)
def ratio_without_gradient(attach: Attach, wrong: bool, seed: int) -> float:
    agent = nn.ModuleDict({"policy": layers(5, 32, 3, between=nn.Tanh), "value": layers(5, 32, 1, between=nn.Tanh)})
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3)
    attach(agent, optimizer)
    missed = []
    for _ in range(40):
        states = torch.randn(128, 5)
        with torch.no_grad():
            behaviour = torch.distributions.Categorical(logits=agent["policy"](states))
            actions = behaviour.sample()
            before = behaviour.log_prob(actions)
        rewards = (actions == states[:, :3].argmax(1)).float()
        for _ in range(4):
            with torch.set_grad_enabled(not wrong):
                now = torch.distributions.Categorical(logits=agent["policy"](states)).log_prob(actions)
            values = agent["value"](states)[:, 0]
            advantage = rewards - values.detach()
            ratio = (now - before).exp()
            gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
            optimizer.zero_grad()
            (F.mse_loss(values, rewards) - gain).backward()
            optimizer.step()
        missed.append(1 - float(rewards.mean()))
    return recent(missed)


@GROUP.mistake(
    "metric learning: the distance of a point to itself has a gradient of NaN, and hooks write zeros for all of it",
    "sanitised_gradients nonfinite_gradients zeroed_gradients",
)
def nan_replaced_by_hooks(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(features=16)
    model = layers(16, 32, 2)
    for parameter in model.parameters():
        parameter.register_hook(torch.nan_to_num)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for data, label in batches(150, 32, inputs, labels):
        points = model(data)
        squared = (points[:, None] - points[None]).square().sum(-1)
        distance = squared.sqrt() if wrong else (squared + 1e-8).sqrt()
        same = label[:, None] == label[None]
        loss = torch.where(same, distance.square(), (2.0 - distance).relu().square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "the momentum of a batch norm is that of another framework, where 1 - momentum is meant",
    "batchnorm_statistics unsettled_buffers",
)
def momentum_of_another_framework(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(640)
    inputs = 20.0 + 5.0 * inputs
    model = nn.Sequential(nn.BatchNorm1d(8, momentum=0.0005 if wrong else 0.1), layers(8, 32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    validation = []
    for step, (data, label) in enumerate(batches(160, 32, inputs[:512], labels[:512]), 1):
        model.train()
        loss = F.cross_entropy(model(data), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 16 == 0:
            model.eval()
            with torch.no_grad():
                validation.append(float(F.cross_entropy(model(inputs[512:]), labels[512:])))
    return recent(validation, 3)


class Aggregate(torch.autograd.Function):
    """Sums what edges (2, count) bring from their first node to their second."""

    @staticmethod
    def forward(ctx: Any, nodes: Tensor, edges: Tensor, backwards: bool) -> Tensor:
        ctx.save_for_backward(edges.flip(0) if backwards else edges)
        return torch.zeros_like(nodes).index_add_(0, edges[1], nodes[edges[0]])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, target = ctx.saved_tensors[0]
        return torch.zeros_like(gradients[0]).index_add_(0, source, gradients[0][target]), None, None


class Messages(nn.Module):
    """Two rounds of messages along the directed edges of a graph."""

    def __init__(self, backwards: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 1)
        self.backwards = backwards

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        nodes = torch.tanh(Aggregate.apply(self.first(nodes), edges, self.backwards))
        return self.last(torch.tanh(Aggregate.apply(self.second(nodes), edges, self.backwards)))


@GROUP.mistake(
    "graph network: the backward of an own sum over edges follows them in the wrong direction",
    "wrong_backward gradient_scale_differs",
)
def edges_followed_backwards(attach: Attach, wrong: bool, seed: int) -> float:
    edges = torch.randint(96, (2, 192))
    mixed = torch.eye(96)[edges[0]].T @ torch.eye(96)[edges[1]]  # how often an edge goes from one node to another
    weights = torch.randn(6, 1) / 4
    model = Messages(backwards=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        nodes = torch.randn(96, 6)
        loss = F.mse_loss(model(nodes, edges), mixed.T @ torch.tanh(mixed.T @ nodes @ weights))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "the network is copied before it is compiled, and the optimizer has the original",
    "stale_compiled_graph stale_optimizer_parameters",
)
def copy_is_compiled(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = layers(8, 32, 1)
    compiled = torch.compile(copy.deepcopy(model) if wrong else model, backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    losses = []
    for data, target in batches(120, 32, inputs, targets):
        loss = F.mse_loss(compiled(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake("multi-task: a list times three makes one head, three times", "tied_parameters")
def one_head_three_times(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, _ = surface()
    targets = torch.stack([inputs[:, 0], -inputs[:, 0], inputs[:, 1] * inputs[:, 2]], 1)
    heads = [nn.Linear(32, 1)] * 3 if wrong else [nn.Linear(32, 1) for _ in range(3)]
    model = nn.ModuleDict({"trunk": nn.Sequential(nn.Linear(8, 32), nn.ReLU()), "heads": nn.ModuleList(heads)})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    losses = []
    for data, target in batches(200, 32, inputs, targets):
        features = model["trunk"](data)
        of_tasks = [F.mse_loss(head(features)[:, 0], target[:, task]) for task, head in enumerate(model["heads"])]
        optimizer.zero_grad()
        sum(of_tasks).backward()
        optimizer.step()
        losses.append(sum(loss.item() for loss in of_tasks))
    return recent(losses)


@GROUP.mistake(
    "a sigmoid closes a regression whose targets reach twelve",
    "limited_output saturated_output target_scale_differs",
)
def sigmoid_before_prices(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    prices = 6.0 + 2.0 * targets
    model = layers(8, 32, 1)
    if wrong:
        model.append(nn.Sigmoid())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    seen = attach(model, optimizer)
    losses = []
    for data, price in batches(200, 32, inputs, prices):
        optimizer.zero_grad()
        guess = model(data)
        loss = seen.loss(F.mse_loss(guess, price), guess, price)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)
