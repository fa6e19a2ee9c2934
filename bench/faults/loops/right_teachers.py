"""Right loops with a teacher, a slow copy, a queue or labels that the model makes itself."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import Task, begin, falls, follow, mlp

RIGHT = Group("right_teachers")


@RIGHT.right("mean teacher: a copy in training mode follows the student and teaches it on unlabelled inputs")
def mean_teacher(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width = Task(8, 4, classes=True), draw.choice((24, 32))
    student = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 4))
    teacher = copy.deepcopy(student).requires_grad_(False)
    model = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.SGD(student.parameters(), lr=draw.choice((0.02, 0.04)), momentum=0.9)
    attach(model, optimizer, frozen=("teacher",))
    losses = []
    for _ in range(200):
        x, y = task.batch(16)
        free = torch.randn(32, 8)
        with torch.no_grad():
            goal = teacher(free + 0.1 * torch.randn_like(free)).softmax(1)
        loss = F.cross_entropy(student(x), y)
        losses.append(loss.detach())
        optimizer.zero_grad()
        (loss + 0.5 * F.mse_loss(student(free).softmax(1), goal)).backward()
        optimizer.step()
        follow(teacher, student, 0.98)
    falls(losses)


@RIGHT.right("BYOL: an online network predicts what a slow copy makes of another view; the copy is not declared")
def bootstrap(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, inside = draw.choice((24, 32)), 8

    def encoder() -> nn.Sequential:
        return nn.Sequential(nn.Linear(10, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, inside))

    online, predictor = encoder(), mlp(inside, 16, inside, depth=1)
    target = copy.deepcopy(online)
    for p in target.parameters():
        p.requires_grad = False
    model = nn.ModuleDict({"online": online, "predictor": predictor, "target": target})
    optimizer = torch.optim.Adam([*online.parameters(), *predictor.parameters()], lr=draw.choice((2e-3, 4e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(150):
        x = torch.randn(32, 10)
        views = [x + 0.3 * torch.randn_like(x) for _ in range(2)]
        loss = torch.zeros(())
        for first, second in (views, views[::-1]):
            with torch.no_grad():
                goal = F.normalize(target(second), dim=1)
            loss = loss + (2 - 2 * (F.normalize(predictor(online(first)), dim=1) * goal).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        follow(target, online, 0.97)
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("contrastive learning with a momentum encoder and a queue of earlier keys")
def contrastive_queue(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    encoder = mlp(12, draw.choice((24, 32)), 8)
    slow = copy.deepcopy(encoder).requires_grad_(False)
    queue = F.normalize(torch.randn(draw.choice((128, 256)), 8), dim=1)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=draw.choice((0.1, 0.2)), momentum=0.9, weight_decay=1e-4)
    attach(encoder, optimizer)
    losses = []
    for _ in range(250):
        x = torch.randn(32, 12)
        query = F.normalize(encoder(x + 0.2 * torch.randn_like(x)), dim=1)
        with torch.no_grad():
            follow(slow, encoder, 0.95)
            key = F.normalize(slow(x + 0.2 * torch.randn_like(x)), dim=1)
        logits = torch.cat(((query * key).sum(1, keepdim=True), query @ queue.T), 1) / 0.2
        loss = F.cross_entropy(logits, torch.zeros(32, dtype=torch.long))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue = torch.cat((key, queue[:-32]))
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("diffusion: the target is the noise, the time is drawn, and an average of the weights makes the samples")
def diffusion(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    levels = draw.choice((20, 50))
    alphas = torch.cumprod(1 - torch.linspace(0.01, 8 / levels, levels).clamp(max=0.5), 0)
    model = mlp(3, draw.choice((32, 48)), 2, unit=nn.SiLU)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=draw.choice((2e-3, 4e-3)))
    seen = attach(model, optimizer)
    losses = []
    for _ in range(300):
        angle = 6.28 * torch.rand(64)
        clean, time = torch.stack((angle.cos(), angle.sin()), 1), torch.randint(levels, (64,))
        noise, keep = torch.randn(64, 2), alphas[time, None]
        outputs = model(torch.cat((keep.sqrt() * clean + (1 - keep).sqrt() * noise, time[:, None] / levels), 1))
        loss = F.mse_loss(outputs, noise)
        optimizer.zero_grad()
        seen.loss(loss, outputs, noise).backward()
        optimizer.step()
        follow(average, model, 0.95)
        losses.append(loss.detach())
    with torch.no_grad():
        average(torch.randn(64, 3))
    falls(losses)


@RIGHT.right("distillation: a trained teacher in evaluation mode, softened softmax on both sides")
def distillation(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, heat = Task(8, 5, classes=True), draw.choice((2.0, 4.0))
    teacher, student = mlp(8, 64, 5), mlp(8, draw.choice((16, 24)), 5, depth=1)
    first = torch.optim.Adam(teacher.parameters(), lr=5e-3)
    for _ in range(100):
        x, y = task.batch(64)
        first.zero_grad()
        F.cross_entropy(teacher(x), y).backward()
        first.step()
    teacher.eval()
    optimizer = torch.optim.Adam(student.parameters(), lr=draw.choice((3e-3, 6e-3)))
    seen = attach(student, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(32)
        with torch.no_grad():
            goal = teacher(x)
        outputs = student(x)
        soft = F.kl_div((outputs / heat).log_softmax(1), (goal / heat).softmax(1), reduction="batchmean")
        loss = 0.7 * heat**2 * soft + 0.3 * F.cross_entropy(outputs, y)
        optimizer.zero_grad()
        seen.loss(loss, outputs, y).backward()
        optimizer.step()
        losses.append(loss.detach())
    falls(losses)


@RIGHT.right("pseudo-labels: forward passes in training mode without gradient label each batch, some are left out")
def pseudo_labels(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    task, width, bound = Task(8, 4, classes=True), draw.choice((24, 32)), draw.choice((0.8, 0.9))
    model = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((3e-3, 6e-3)))
    attach(model, optimizer)
    losses = []
    for _ in range(200):
        x, y = task.batch(16)
        free = torch.randn(64, 8)
        with torch.no_grad():
            sure, label = model(free).softmax(1).max(1)
        outputs = model(torch.cat((x, free + 0.1 * torch.randn_like(free))))
        loss = F.cross_entropy(outputs[:16], y)
        losses.append(loss.detach())
        loss = loss + (F.cross_entropy(outputs[16:], label, reduction="none") * (sure > bound)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    falls(losses)
