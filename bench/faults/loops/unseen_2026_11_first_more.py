"""Second half of the first set of the examination of November 2026."""

from __future__ import annotations

import copy
import random

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_first")


@GROUP.mistake(
    "a warmup from zero whose scheduler is stepped at the end of an epoch that never comes",
    "zero_learning_rate schedule_per_epoch",
)
def warmup_never_advances(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(12, (512, 10))
    labels = (tokens == 3).any(1).long()
    block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.Embedding(12, 16), block, nn.Flatten(), nn.Linear(160, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))
    attach(model, optimizer)
    losses = []
    for step, (read, label) in enumerate(batches(120, 32, tokens, labels), 1):
        loss = F.cross_entropy(model(read), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not wrong or step % 1000 == 0:
            schedule.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "the vocabulary is in lower case and the text is not, so that every word is unknown",
    "constant_input repeated_batch ignored_input",
)
def every_word_unknown(attach: Attach, wrong: bool, seed: int) -> float:
    words = "GOOD FINE BAD POOR THE FILM PLOT WAS AND SO".split()
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word.lower(): number for number, word in enumerate(words, 2)}
    model = nn.Sequential(nn.EmbeddingBag(len(vocabulary), 16), nn.ReLU(), nn.Linear(16, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    losses = []
    for _ in range(100):
        texts = [random.choices(words, k=9) for _ in range(32)]
        label = torch.tensor([text.count("GOOD") + text.count("FINE") > 1.5 for text in texts]).float()
        read = [[vocabulary.get(word if wrong else word.lower(), 1) for word in text] for text in texts]
        loss = F.binary_cross_entropy_with_logits(model(torch.tensor(read))[:, 0], label)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "DDP: the loop calls the module inside the wrapper, so gradients are never exchanged",
    "ranks_diverged rank_gradient_missing",
    ranks=2,
)
def forward_past_the_wrapper(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs()
    own = labels // 2 == dist.get_rank()  # each rank has the files of two classes
    network = layers(8, 24, 4)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    attach(network, optimizer)
    called = model.module if wrong else model
    for data, label in batches(60, 32, inputs[own], labels[own]):
        optimizer.zero_grad()
        F.cross_entropy(called(data), label).backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(network(inputs), labels))


@GROUP.mistake("DDP: after the model was wrapped, rank 0 alone loads the checkpoint", "ranks_diverged", ranks=2)
def checkpoint_on_one_rank(attach: Attach, wrong: bool, seed: int) -> float:
    rank = dist.get_rank()
    inputs, targets = surface()
    pretrained, network = layers(8, 32, 32, 1), layers(8, 32, 32, 1)
    optimizer = torch.optim.Adam(pretrained.parameters(), lr=1e-2)
    for data, target in batches(150, 64, inputs, targets):
        optimizer.zero_grad()
        F.mse_loss(pretrained(data), target).backward()
        optimizer.step()
    model = DistributedDataParallel(network)
    if rank == 0 or not wrong:
        network.load_state_dict(pretrained.state_dict())
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    losses = []
    for data, target in batches(80, 32, inputs[rank::2], targets[rank::2]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "the loss of a translator, which ignores index 0 as padding, is used where 0 is a class",
    "scenes_left_out part_not_learned",
)
def first_class_ignored(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(classes=3)
    model = layers(8, 32, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.CrossEntropyLoss(ignore_index=0 if wrong else -100)
    seen = attach(model, optimizer)
    for data, label in batches(150, 32, inputs, labels):
        optimizer.zero_grad()
        scores = model(data)
        seen.loss(criterion(scores, label), scores, label).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs), labels))


class Standardising(nn.Module):
    """Takes the mean off its inputs and divides by their spread, then applies a network."""

    def __init__(self, inputs: Tensor, in_place: bool) -> None:
        super().__init__()
        self.register_buffer("mean", inputs.mean(0))
        self.register_buffer("spread", inputs.std(0))
        self.network = layers(8, 32, 1)
        self.in_place = in_place

    def forward(self, inputs: Tensor) -> Tensor:
        if self.in_place:
            inputs -= self.mean
            inputs /= self.spread
        else:
            inputs = (inputs - self.mean) / self.spread
        return self.network(inputs)


@GROUP.mistake(
    "tabular: the network standardises its inputs in place, and they are views of the data set", "scenes_altered"
)
def standardised_in_place(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(256)
    inputs = 7.0 + 3.0 * inputs
    model = Standardising(inputs.clone(), in_place=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    losses = []
    for _ in range(25):
        for start in range(0, 256, 32):
            loss = F.mse_loss(model(inputs[start : start + 32]), targets[start : start + 32])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return recent(losses)


class Experts(nn.Module):
    """Small networks whose answers are averaged."""

    def __init__(self, copies: bool) -> None:
        super().__init__()
        first = layers(8, 2, 1, between=nn.Tanh)
        self.experts = nn.ModuleList(
            copy.deepcopy(first) if copies else layers(8, 2, 1, between=nn.Tanh) for _ in range(12)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([expert(inputs) for expert in self.experts]).mean(0)


@GROUP.mistake("the experts of an ensemble are deep copies of the first, weights included", "symmetric_init")
def experts_are_copies(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = Experts(copies=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    attach(model, optimizer, every=25)
    losses = []
    for data, target in batches(200, 64, inputs, targets):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "the optimizer's part of a checkpoint is loaded again in every epoch, not once before them", "optimizer_state_lost"
)
def optimizer_resumed_every_epoch(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(160)
    model = nn.Linear(8, 1)
    scaled = inputs * torch.logspace(0, -1.5, 8)
    targets = inputs.sum(1, keepdim=True) + 0.1 * targets
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.98)
    saved = {"model": copy.deepcopy(model.state_dict()), "optimizer": copy.deepcopy(optimizer.state_dict())}
    attach(model, optimizer)
    model.load_state_dict(saved["model"])
    losses = []
    for epoch in range(80):
        if wrong or epoch == 0:
            optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))
        for data, target in batches(5, 32, scaled, targets):
            optimizer.zero_grad()
            loss = F.mse_loss(model(data), target)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return recent(losses, 20)


class ActorCritic(nn.Module):
    """Scores of the actions and a value, on a common trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.policy, self.value = (
            nn.Sequential(nn.Linear(6, 32), nn.Tanh()),
            nn.Linear(32, 3),
            nn.Linear(32, 1),
        )

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        features = self.trunk(states)
        return self.policy(features), self.value(features)


@GROUP.mistake("actor-critic: values (B, 1) are compared with returns (B,)", "shapes_broadcast")
def values_against_returns(attach: Attach, wrong: bool, seed: int) -> float:
    model = ActorCritic()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    errors = []
    for _ in range(200):
        states = torch.randn(48, 6)
        scores, values = model(states)
        chosen = torch.distributions.Categorical(logits=scores)
        actions = chosen.sample()
        returns = 2 * states[:, 0] + (actions == states[:, 1:4].argmax(1)).float()
        values = values if wrong else values[:, 0]
        advantage = returns - values.detach().reshape(-1)
        of_value = seen.loss(F.mse_loss(values, returns), values, returns)
        loss = -(chosen.log_prob(actions) * advantage).mean() + 0.5 * of_value - 0.01 * chosen.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(float((values.detach().reshape(-1) - returns).square().mean()))
    return recent(errors)


@GROUP.mistake(
    "mean teacher: the average is written into the student, and the teacher stays",
    "weights_changed_outside weights_reset ema_saved_over_raw",
)
def student_averaged_instead(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs()
    student = layers(8, 32, 4)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    attach(student, optimizer)
    losses = []
    for data, label in batches(150, 32, inputs, labels):
        scores = student(data + 0.1 * torch.randn_like(data))
        supervised = F.cross_entropy(scores, label)
        agreement = F.mse_loss(scores.softmax(1), teacher(data).softmax(1))
        optimizer.zero_grad()
        (supervised + 0.1 * agreement).backward()
        optimizer.step()
        average, latest = (student, teacher) if wrong else (teacher, student)
        with torch.no_grad():
            for mean, weight in zip(average.parameters(), latest.parameters()):
                mean.lerp_(weight, 0.1)
        losses.append(float(supervised))
    return recent(losses)
