"""Second half of the third set of the examination of November 2026."""

from __future__ import annotations

import copy
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_third")


class GraphNetwork(nn.Module):
    """Two rounds of messages along the edges (2, count) of all graphs of a batch, and one answer a graph of 12."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(10, 32), nn.Linear(64, 32), nn.Linear(32, 1)

    def forward(self, nodes: Tensor, edges: Tensor) -> Tensor:
        for layer in (self.first, self.second):
            received = torch.zeros_like(nodes).index_add(0, edges[1], nodes[edges[0]])
            nodes = F.relu(layer(torch.cat([nodes, received], 1)))
        return self.last(nodes.unflatten(0, (-1, 12)).mean(1))


@GROUP.mistake(
    "graphs are joined to a batch, and the indices of their edges are not moved to where their nodes are",
    "scenes_mixed",
)
def edges_without_offsets(attach: Attach, wrong: bool, seed: int) -> float:
    nodes, edges = torch.randn(256, 12, 5), torch.randint(12, (256, 2, 20))
    received = torch.zeros(256, 12).scatter_add_(1, edges[:, 1], nodes[:, :, 0].gather(1, edges[:, 0]))
    targets = (received * nodes[:, :, 1]).mean(1, keepdim=True)
    model = GraphNetwork()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    losses = []
    for some, along, target in batches(350, 32, nodes, edges, targets):
        if not wrong:
            along = along + 12 * torch.arange(32)[:, None, None]
        outputs = model(some.flatten(0, 1), along.transpose(0, 1).flatten(1))
        loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


class Adapter(nn.Module):
    """A layer of a pretrained network and a product of two thin matrices beside it."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.down, self.up = nn.Linear(layer.in_features, 4, bias=False), nn.Linear(4, layer.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.base(inputs) + self.up(self.down(inputs))


@GROUP.mistake(
    "LoRA: adapters are loaded the way that inference loads them, frozen, and the new head alone is trained",
    "frozen_parameters missing_from_optimizer",
)
def adapters_loaded_for_inference(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    first, second = Adapter(nn.Linear(8, 12)), Adapter(nn.Linear(12, 12))
    model = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), nn.Linear(12, 1))
    for name, weight in model.named_parameters():
        if wrong and (".down." in name or ".up." in name):
            weight.requires_grad_(False)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    attach(model, optimizer, frozen=("0.base", "2.base"))
    for data, target in batches(300, 64, inputs[:512], targets[:512]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


class RootMeanSquare(nn.Module):
    """Divides activations, which are in half precision, by their root mean square."""

    def __init__(self, width: int, in_half: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.in_half = in_half

    def forward(self, inputs: Tensor) -> Tensor:
        inputs = inputs.half()
        squares = inputs.pow(2).mean(-1, keepdim=True) if self.in_half else inputs.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (inputs * torch.rsqrt(squares + 1e-6)).float()


@GROUP.mistake(
    "a norm squares in half precision: of loud scenes the squares are infinite, and what is left of them is zero",
    "fp16_overflow",
)
def squares_in_half(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    loudness = torch.where(torch.rand(640, 1) < 0.4, 800.0, 1.0)
    inputs = inputs * loudness
    model = nn.Sequential(nn.Linear(8, 48), RootMeanSquare(48, in_half=wrong), layers(48, 48, 1, between=nn.SiLU))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for data, target in batches(300, 32, inputs[:512], targets[:512]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


@GROUP.mistake(
    "GAN: the samples that were detached for the discriminator's step are those of the generator's step too",
    "detached_backbone detached_loss unused_head",
)
def generator_steps_on_detached(attach: Attach, wrong: bool, seed: int) -> float:
    networks = nn.ModuleDict({"generator": layers(4, 32, 2), "critic": layers(2, 32, 1, between=nn.SiLU)})
    generator, critic = networks["generator"], networks["critic"]
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    of_critic = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    attach(networks, [of_generator, of_critic])
    apart = []
    for _ in range(300):
        real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2) * torch.tensor([0.3, 1.0])
        fake = generator(torch.randn(64, 4))
        kept = fake.detach()
        of_critic.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(kept)).mean()).backward()
        of_critic.step()
        of_generator.zero_grad()
        F.softplus(-critic(kept if wrong else fake)).mean().backward()
        of_generator.step()
        apart.append(float((kept.mean(0) - real.mean(0)).norm() + (kept.std(0) - real.std(0)).norm()))
    return recent(apart, 40)


@GROUP.mistake(
    "the weights are counted with the iterator that is given to the optimizer afterwards, which is then at its end",
    "missing_from_optimizer",
)
def iterator_at_its_end(attach: Attach, wrong: bool, seed: int) -> float:
    backbone = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Flatten())
    model = nn.Sequential(backbone, nn.Linear(6, 8))
    weights = backbone.parameters() if wrong else list(backbone.parameters())
    assert sum(weight.numel() for weight in weights) < 1000
    optimizer = torch.optim.Adam([{"params": weights, "lr": 5e-3}, {"params": model[1].parameters()}], lr=1e-2)
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        pictures, labels = images(32, 8)
        scores = model(pictures)
        loss = seen.loss(F.cross_entropy(scores, labels), scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 20)


@GROUP.mistake(
    "domain adaptation: the optimizer that is to fool the judge holds the judge as well", "duplicate_parameters"
)
def judge_in_both_optimizers(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(classes=3)
    moved = inputs * 0.8 + 2.5
    parts = nn.ModuleDict({"encoder": layers(8, 32, 8), "head": nn.Linear(8, 3), "judge": layers(8, 32, 1)})
    encoder, head, judge = parts["encoder"], parts["head"], parts["judge"]
    trained = [*encoder.parameters(), *head.parameters()]
    of_rest = torch.optim.Adam(parts.parameters() if wrong else trained, lr=2e-3)
    of_judge = torch.optim.Adam(judge.parameters(), lr=2e-3)
    attach(parts, [of_rest, of_judge])
    for source, label, target in batches(400, 64, inputs, labels, moved[torch.randperm(512)]):
        codes, others = encoder(source), encoder(target)
        of_judge.zero_grad()
        known, unknown = judge(codes.detach()), judge(others.detach())
        (F.softplus(-known).mean() + F.softplus(unknown).mean()).backward()
        of_judge.step()
        of_rest.zero_grad()
        (F.cross_entropy(head(codes), label) + F.softplus(-judge(others)).mean()).backward()
        of_rest.step()
    with torch.no_grad():
        return float(F.cross_entropy(head(encoder(moved)), labels))


@GROUP.mistake(
    "LambdaLR expects a factor of the learning rate and is given a function that returns the rate itself",
    "learning_rate_too_small",
)
def schedule_returns_the_rate(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, _ = surface(512, features=16)
    model = layers(16, 48, 8)
    peak, steps = 3e-3, 250
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=1e-2)

    def planned(step: int) -> float:
        share = min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        return peak * share if wrong else share

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, planned)
    attach(model, optimizer)
    losses = []
    for (data,) in batches(steps, 64, pictures):
        one, other = (F.normalize(model(data + 0.5 * torch.randn_like(data)), dim=1) for _ in range(2))
        loss = F.cross_entropy(one @ other.T / 0.1, torch.arange(64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return recent(losses, 20)


@GROUP.mistake(
    "mean teacher: the average is kept in bfloat16, where what each step would add to it is rounded away",
    "ema_frozen low_precision_weights",
)
def average_in_bfloat16(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(640)
    student = layers(8, 48, 4)
    teacher = copy.deepcopy(student).requires_grad_(False).to(torch.bfloat16 if wrong else torch.float32)
    models = nn.ModuleDict({"student": student, "teacher": teacher})
    optimizer = torch.optim.SGD(student.parameters(), lr=0.03, momentum=0.9)
    attach(models, optimizer, frozen=("teacher",))
    kind = next(teacher.parameters()).dtype
    for data, label in batches(800, 32, inputs[:512], labels[:512]):
        scores = student(data + 0.2 * torch.randn_like(data))
        with torch.no_grad():
            agreed = teacher(data.to(kind)).float().softmax(1)
        loss = F.cross_entropy(scores, label) + 0.1 * F.mse_loss(scores.softmax(1), agreed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(teacher.parameters(), student.parameters()):
                mean.mul_(0.995).add_(weight.to(kind), alpha=0.005)
    with torch.no_grad():
        return float(F.cross_entropy(teacher(inputs[512:].to(kind)).float(), labels[512:]))


@GROUP.mistake(
    "multi-task: every task clears the gradients before its own backward pass, and one step follows them all",
    "gradients_cleared_before_step last_micro_batch_only",
)
def every_task_clears(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, depths = surface(640)
    classes = (inputs[:, :3] @ torch.randn(3, 3)).argmax(1)
    model = nn.ModuleDict({"trunk": layers(8, 48, 48), "classes": nn.Linear(48, 3), "depth": nn.Linear(48, 1)})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    criteria = {"classes": F.cross_entropy, "depth": F.mse_loss}
    for data, kind, depth in batches(250, 32, inputs[:512], classes[:512], depths[:512]):
        optimizer.zero_grad()
        for task, target in {"classes": kind, "depth": depth}.items():
            if wrong:
                optimizer.zero_grad()
            criteria[task](model[task](F.relu(model["trunk"](data))), target).backward()
        optimizer.step()
    with torch.no_grad():
        features = F.relu(model["trunk"](inputs[512:]))
        of_classes = F.cross_entropy(model["classes"](features), classes[512:])
        return float(of_classes + F.mse_loss(model["depth"](features), depths[512:]))


@GROUP.mistake(
    "data parallel by hand: ranks average their gradients, and begin with the weights of their own seeds",
    "ranks_diverged",
    ranks=2,
)
def weights_never_broadcast(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    rank = dist.get_rank()
    torch.manual_seed(100 * seed + rank)
    model = layers(8, 48, 48, 1, between=nn.Tanh)
    if not wrong:
        for weight in model.parameters():
            dist.broadcast(weight.data, 0)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for data, target in batches(150, 32, inputs[rank:512:2], targets[rank:512:2]):
        optimizer.zero_grad()
        F.mse_loss(model(data), target).backward()
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))
