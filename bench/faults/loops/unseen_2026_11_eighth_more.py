"""Second half of the eighth set of the examination of November 2026."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_eighth")


def likelihood(means: Tensor, actions: Tensor) -> Tensor:
    """Log-probabilities (B,) of actions (B, 2) around what the policy says, but for a constant."""
    return -(actions - means).square().sum(1) / (2 * 0.3**2)


@GROUP.mistake(
    "PPO: advantages are standardised in every minibatch, and now and then the last one has a single step",
    "nonfinite_gradients",
)
def deviation_of_one_advantage(attach: Attach, wrong: bool, seed: int) -> float:
    dynamics = torch.randn(4, 2) / 2
    policy, value = layers(4, 32, 2, between=nn.Tanh), layers(4, 32, 1, between=nn.Tanh)
    agent = nn.ModuleDict({"policy": policy, "value": value})
    optimizer = torch.optim.Adam(agent.parameters(), lr=3e-3)
    attach(agent, optimizer)
    for _ in range(80):
        states = torch.randn(int(torch.randint(120, 140, ())), 4)  # as many as the round's episodes had steps
        with torch.no_grad():
            actions = policy(states) + 0.3 * torch.randn(len(states), 2)
            before = likelihood(policy(states), actions)
            rewards = -(actions - torch.tanh(states @ dynamics)).square().sum(1)
        for chosen in torch.randperm(len(states)).split(32):
            if not wrong and len(chosen) < 2:
                continue
            values = value(states[chosen])[:, 0]
            advantages = rewards[chosen] - values.detach()
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
            ratio = (likelihood(policy(states[chosen]), actions[chosen]) - before[chosen]).exp()
            surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
            loss = 0.5 * F.mse_loss(values, rewards[chosen]) - surrogate.mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(agent.parameters(), 0.5)
            optimizer.step()
    with torch.no_grad():
        states = torch.randn(2000, 4)
        return float(F.mse_loss(policy(states), torch.tanh(states @ dynamics)))


@GROUP.mistake(
    "actor-critic: the actor ends with a softmax, and Categorical gets its probabilities as logits",
    "softmax_twice limited_output",
)
def probabilities_as_logits(attach: Attach, wrong: bool, seed: int) -> float:
    worth = torch.randn(4, 3)
    actor = nn.Sequential(layers(4, 32, 3, between=nn.Tanh), nn.Softmax(dim=1))
    critic = layers(4, 32, 1, between=nn.Tanh)
    agent = nn.ModuleDict({"actor": actor, "critic": critic})
    optimizer = torch.optim.Adam(agent.parameters(), lr=5e-3)
    attach(agent, optimizer)
    regrets = []
    for _ in range(400):
        states = torch.randn(64, 4)
        chances = actor(states)
        chosen = torch.distributions.Categorical(**{"logits" if wrong else "probs": chances})
        actions = chosen.sample()
        possible = torch.tanh(states @ worth)
        rewards = possible.gather(1, actions[:, None])[:, 0]
        values = critic(states)[:, 0]
        gain = chosen.log_prob(actions) * (rewards - values.detach())
        loss = F.mse_loss(values, rewards) - gain.mean() - 0.005 * chosen.entropy().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regrets.append(float((possible.max(1).values - rewards).mean()))
    return recent(regrets, 40)


class Visits(nn.Module):
    """How long a user stays on an item, from their vectors and the hour, (B, 1)."""

    def __init__(self, users: int, items: int, by_data: bool) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, 12), nn.Embedding(items, 12)
        self.head = layers(25, 48, 1)
        self.by_data = by_data

    def forward(self, user: Tensor, item: Tensor, hour: Tensor) -> Tensor:
        if self.by_data:
            vectors = [self.users.weight.data[user], self.items.weight.data[item]]
        else:
            vectors = [self.users(user), self.items(item)]
        return self.head(torch.cat([*vectors, hour], 1))


@GROUP.mistake(
    "recommender: the vectors of users and items are looked up in `weight.data`, where no gradient passes",
    "detached_backbone unused_head",
)
def looked_up_in_data(attach: Attach, wrong: bool, seed: int) -> float:
    taste, kind = torch.randn(150), torch.randn(150)
    user, item, hour = torch.randint(150, (6144,)), torch.randint(150, (6144,)), torch.randn(6144, 1)
    stays = (taste[user] * kind[item] + taste[user])[:, None] + 0.5 * hour + 0.1 * torch.randn(6144, 1)
    model = Visits(150, 150, by_data=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    criterion = nn.MSELoss()
    seen = attach(model, optimizer)
    for some, of, at, stay in batches(500, 128, user[:5120], item[:5120], hour[:5120], stays[:5120]):
        outputs = model(some, of, at)
        loss = seen.loss(criterion(outputs, stay), outputs, stay)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(criterion(model(user[5120:], item[5120:], hour[5120:]), stays[5120:]))


class Stations(nn.Module):
    """Next value of a station's series from its last twelve, and a level and a swing that are learned for each."""

    def __init__(self, stations: int, plain: bool) -> None:
        super().__init__()
        self.trunk = layers(12, 32, 1)
        start = torch.zeros(stations, 2)
        self.station = start.requires_grad_() if plain else nn.Parameter(start)

    def forward(self, past: Tensor, station: Tensor) -> Tensor:
        level, swing = self.station[station].split(1, 1)
        return level + swing.exp() * self.trunk(past)


@GROUP.mistake(
    "forecasting: what is learned for each station is a tensor with requires_grad, and not a parameter of the network",
    "unregistered_parameters missing_from_optimizer",
)
def stations_are_a_plain_tensor(attach: Attach, wrong: bool, seed: int) -> float:
    level, swing, phase = torch.randn(24, 1), 0.5 + torch.rand(24, 1), 6.283 * torch.rand(24, 1)
    hours = torch.arange(212.0)
    waves = torch.sin(hours / 3 + phase)
    past = (waves + 0.1 * torch.randn_like(waves))[:, :-1].unfold(1, 12, 1).flatten(0, 1)
    after = (level + swing * waves)[:, 12:].reshape(-1, 1) + 0.05 * torch.randn(4800, 1)
    station = torch.arange(24).repeat_interleave(200)
    known = torch.arange(4800) % 200 < 160
    model = Stations(24, plain=wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for data, place, target in batches(500, 64, past[known], station[known], after[known]):
        outputs = model(data, place)
        loss = seen.loss(F.l1_loss(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.l1_loss(model(past[~known], station[~known]), after[~known]))


@GROUP.mistake(
    "semi-supervised: the average of the network follows its parameters, and the buffers of batch norm stay behind",
    "batchnorm_statistics unsettled_buffers",
)
def average_without_buffers(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, labels = images(640, 8)
    pictures = 110.0 + 35.0 * (pictures + 0.4 * torch.randn_like(pictures))
    first, second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1)
    convolutions = [first, nn.BatchNorm2d(8), nn.ReLU(), second, nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*convolutions, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(256, 8))
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    attach(model, optimizer)
    validation = []
    for _ in range(12):
        model.train()
        for data, label in batches(16, 32, pictures[:512], labels[:512]):
            loss = F.cross_entropy(model(data + 10 * torch.randn_like(data)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for slow, fast in zip(average.parameters(), model.parameters(), strict=True):
                    slow.lerp_(fast, 0.05)
                if not wrong:
                    for old, new in zip(average.buffers(), model.buffers(), strict=True):
                        old.copy_(new)
        average.eval()
        with torch.no_grad():
            validation.append(float(F.cross_entropy(average(pictures[512:]), labels[512:])))
    return recent(validation, 3)


def cells(size: int, side: int = 14) -> tuple[Tensor, Tensor]:
    """Pictures (size, 1, side, side) with two small cells each, which are dark or bright, and their masks."""
    axis = torch.arange(side)
    masks, pictures = torch.zeros(size, side, side), 0.4 * torch.randn(size, side, side)
    for _ in range(2):
        rows, columns = (torch.randint(1, side - 1, (size, 1, 1)) for _ in range(2))
        cell = ((axis[:, None] - rows).abs() <= 1) & ((axis - columns).abs() <= 1)
        masks = torch.where(cell, 1.0, masks)
        pictures = pictures + cell * torch.where(torch.rand(size, 1, 1) < 0.5, 1.2, -1.2)
    return pictures[:, None], masks[:, None]


@GROUP.mistake(
    "segmentation: of the losses of all pixels the hardest are to be kept, and topk is told to take the smallest",
    "scenes_left_out part_not_learned",
)
def easiest_pixels_kept(attach: Attach, wrong: bool, seed: int) -> float:
    pictures, masks = cells(448)
    first, second = nn.Conv2d(1, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv2d(12, 1, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for data, mask in batches(300, 16, pictures[:384], masks[:384]):
        outputs = model(data)
        pixels = F.binary_cross_entropy_with_logits(outputs, mask, reduction="none").flatten()
        hardest, _ = pixels.topk(len(pixels) // 4, largest=not wrong)
        loss = seen.loss(hardest.mean(), outputs, mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        found = model(pictures[384:]).sigmoid()
        both = (found * masks[384:]).sum()
        return float(1 - 2 * both / (found.sum() + masks[384:].sum()))


class SavingSwish(torch.autograd.Function):
    """x * sigmoid(x), which keeps only x for its backward pass."""

    @staticmethod
    def forward(ctx, states: Tensor, forgets: bool) -> Tensor:
        ctx.save_for_backward(states)
        ctx.forgets = forgets
        return states * states.sigmoid()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        (states,) = ctx.saved_tensors
        gate = states.sigmoid()
        slope = gate * (1 + states * (1 - gate))
        return slope if ctx.forgets else gradient * slope, None


class Swish(nn.Module):
    forgets = False

    def forward(self, states: Tensor) -> Tensor:
        return SavingSwish.apply(states, self.forgets)


class WrongSwish(Swish):
    forgets = True


@GROUP.mistake(
    "diffusion: the backward of an own activation returns its slope, and forgets the gradient that it is given",
    "wrong_backward gradient_scale_differs",
)
def slope_without_the_gradient(attach: Attach, wrong: bool, seed: int) -> float:
    data, _ = blobs(1024, 8, 4)
    kept = torch.cos(torch.linspace(0.1, 1.4, 50)).square()
    model = layers(9, 96, 96, 8, between=WrongSwish if wrong else Swish)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    seen = attach(model, optimizer)

    def noisy(clean: Tensor, noise: Tensor) -> Tensor:
        times = torch.randint(50, (len(clean), 1))
        mixed = kept[times].sqrt() * clean + (1 - kept[times]).sqrt() * noise
        return torch.cat([mixed, times / 50], 1)

    for (clean,) in batches(500, 64, data[:896]):
        noise = torch.randn_like(clean)
        outputs = model(noisy(clean, noise))
        loss = seen.loss(F.mse_loss(outputs, noise), outputs, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        clean = data[896:].repeat(8, 1)
        noise = torch.randn_like(clean)
        return float(F.mse_loss(model(noisy(clean, noise)), noise))


@GROUP.mistake(
    "contrastive: the loader gives the two views of a recording one after the other, and the loss takes halves",
    "wrong_layout parts_unrelated shuffled_labels",
)
def views_taken_for_halves(attach: Attach, wrong: bool, seed: int) -> float:
    mixing = torch.randn(6, 24) / 2.5
    model = layers(24, 64, 12)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)

    def missed(size: int, halves: bool) -> Tensor:
        sources = torch.randn(size, 6).repeat_interleave(2, 0)
        views = sources @ mixing + 0.4 * torch.randn(2 * size, 24)  # both of the first, both of the second, ...
        vectors = F.normalize(model(views), dim=1)
        one, other = vectors.view(2, size, -1) if halves else vectors.view(size, 2, -1).unbind(1)
        alike = one @ other.T / 0.1
        wanted = torch.arange(size)
        return (F.cross_entropy(alike, wanted) + F.cross_entropy(alike.T, wanted)) / 2

    for _ in range(400):
        loss = missed(48, halves=wrong)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return recent([float(missed(48, halves=False)) for _ in range(5)])


@GROUP.mistake(
    "graph network: the line with the step is indented one level less, and stands behind the loop over the batches",
    "step_once_per_epoch last_micro_batch_only gradients_cleared_before_step",
)
def step_behind_the_epoch(attach: Attach, wrong: bool, seed: int) -> float:
    nodes = torch.randn(640, 8, 5)
    edges = (torch.rand(640, 8, 8) < 0.25).float()
    targets = (F.relu(edges @ nodes @ torch.randn(5, 3)).mean(1) @ torch.randn(3, 1)) / 3
    states, readout = layers(5, 32, 32), layers(32, 32, 1)
    model = nn.ModuleDict({"states": states, "readout": readout})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    for _ in range(25):
        for node, edge, target in batches(16, 32, nodes[:512], edges[:512], targets[:512]):
            optimizer.zero_grad()
            loss = F.mse_loss(readout(F.relu(edge @ states(node)).mean(1)), target)
            loss.backward()
            if not wrong:
                optimizer.step()
        if wrong:
            optimizer.step()
    with torch.no_grad():
        found = readout(F.relu(edges[512:] @ states(nodes[512:])).mean(1))
        return float(F.mse_loss(found, targets[512:]))


@GROUP.mistake(
    "data parallel by hand: gradients are averaged over the ranks behind the optimizer's step, and then cleared",
    "ranks_diverged rank_gradient_missing",
    ranks=2,
)
def averaged_behind_the_step(attach: Attach, wrong: bool, seed: int) -> float:
    torch.manual_seed(500 + seed)
    inputs, targets = surface(352)
    mine = slice(48 * dist.get_rank(), 48 * dist.get_rank() + 48)
    model = layers(8, 48, 1, between=nn.Tanh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    attach(model, optimizer)

    def average() -> None:
        for weight in model.parameters():
            dist.all_reduce(weight.grad)
            weight.grad /= dist.get_world_size()

    for data, target in batches(300, 16, inputs[mine], targets[mine]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        if not wrong:
            average()
        optimizer.step()
        if wrong:
            average()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[96:]), targets[96:]))
