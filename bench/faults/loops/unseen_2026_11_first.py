"""First set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_first")


@GROUP.mistake("DQN: the target network is copied over the online one", "weights_reset weights_changed_outside")
def target_network_copied_backwards(attach: Attach, wrong: bool, seed: int) -> float:
    states, following = torch.randn(512, 4), torch.randn(512, 4)
    actions, rewards = torch.randint(3, (512,)), torch.sin(states[:, 0]) + states[:, 1]
    online = layers(4, 32, 3)
    target = copy.deepcopy(online)
    optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)
    attach(online, optimizer)
    losses = []
    for step, (state, action, reward, after) in enumerate(batches(200, 32, states, actions, rewards, following), 1):
        with torch.no_grad():
            goal = reward + 0.5 * target(after).max(1).values
        value = online(state).gather(1, action[:, None])[:, 0]
        loss = F.smooth_l1_loss(value, goal)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 30 == 0:
            source, copied = (target, online) if wrong else (online, target)
            copied.load_state_dict(source.state_dict())
    return recent(losses)


class Adapted(nn.Module):
    """A pretrained network with a product of two thin matrices beside each of its layers."""

    def __init__(self, base: nn.Module, rank: int, zeros: bool) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        shapes = [layer.weight.shape for layer in base if isinstance(layer, nn.Linear)]
        self.down = nn.ParameterList(torch.randn(inner, rank) / inner**0.5 for _, inner in shapes)
        self.up = nn.ParameterList(torch.zeros(rank, outer) for outer, _ in shapes)
        if zeros:
            for matrix in self.down:
                nn.init.zeros_(matrix)

    def forward(self, inputs: Tensor) -> Tensor:
        adapters = zip(self.down, self.up)
        for layer in self.base:
            if isinstance(layer, nn.Linear):
                down, up = next(adapters)
                inputs = layer(inputs) + inputs @ down @ up
            else:
                inputs = layer(inputs)
        return inputs


@GROUP.mistake("LoRA: both factors of every adapter start at zero", "zero_product_init vanishing_gradient")
def adapter_factors_both_zero(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = Adapted(layers(8, 48, 48, 1, between=nn.Tanh), rank=4, zeros=wrong)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-2)
    attach(model, optimizer, frozen=["base"])
    losses = []
    for data, target in batches(150, 64, inputs, targets):
        loss = (model(data) - target).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss))
    return recent(losses)


@GROUP.mistake(
    "GAN: the critic is frozen for the generator's step and never thawed", "frozen_parameters settings_changed"
)
def critic_stays_frozen(attach: Attach, wrong: bool, seed: int) -> float:
    networks = nn.ModuleDict({"generator": layers(4, 32, 2), "critic": layers(2, 32, 1, between=nn.SiLU)})
    generator, critic = networks["generator"], networks["critic"]
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    of_critic = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    attach(networks, [of_generator, of_critic])
    apart = []
    for _ in range(300):
        real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2) * torch.tensor([0.3, 1.0])
        if not wrong:
            critic.requires_grad_(True)
        fake = generator(torch.randn(64, 4))
        of_critic.zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake)).mean()).backward()
        of_critic.step()
        critic.requires_grad_(False)
        of_generator.zero_grad()
        fake = generator(torch.randn(64, 4))
        F.softplus(-critic(fake)).mean().backward()
        of_generator.step()
        apart.append(float((fake.mean(0) - real.mean(0)).norm() + (fake.std(0) - real.std(0)).norm()))
    return recent(apart, 40)


@GROUP.mistake(
    "speech: the encoder leaves fewer frames than the transcript has labels, and infinite losses are set to zero",
    "vanishing_gradient clamped_loss zeroed_gradients",
)
def transcripts_longer_than_frames(attach: Attach, wrong: bool, seed: int) -> float:
    labels = torch.stack([torch.randperm(9)[:6] + 1 for _ in range(256)])
    frames = F.one_hot(labels, 10).float().repeat_interleave(5, 1)
    frames = F.pad(frames, (0, 0, 1, 1)) + 0.2 * torch.randn(256, 32, 10)
    strides = (2, 4) if wrong else (2, 1)
    first, second = nn.Conv1d(10, 48, 5, strides[0], padding=2), nn.Conv1d(48, 48, 5, strides[1], padding=2)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Conv1d(48, 10, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    lengths = torch.full((32,), 6)
    criterion = nn.CTCLoss(zero_infinity=True)
    for heard, said in batches(120, 32, frames, labels):
        optimizer.zero_grad()
        logs = model(heard.transpose(1, 2)).permute(2, 0, 1).log_softmax(-1)
        loss = criterion(logs, said, torch.full((32,), len(logs)), lengths)
        loss.backward()
        optimizer.step()
    return float(F.ctc_loss(logs.detach(), said, torch.full((32,), len(logs)), lengths))


@GROUP.mistake("LBFGS: the closure does not clear the gradients of its earlier evaluations", "gradients_never_cleared")
def closure_adds_gradients(attach: Attach, wrong: bool, seed: int) -> float:
    time_ = torch.linspace(0, 3, 64)[:, None]
    model = layers(1, 20, 20, 1, between=nn.Tanh)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=6, history_size=10)
    attach(model, optimizer)

    def residual() -> Tensor:  # of the oscillator x'' = -4 x with x(0) = 1 and x'(0) = 0
        at = time_.clone().requires_grad_(True)
        position = model(at)
        (speed,) = torch.autograd.grad(position.sum(), at, create_graph=True)
        (force,) = torch.autograd.grad(speed.sum(), at, create_graph=True)
        return (force + 4 * position).square().mean() + (position[0] - 1).square().sum() + speed[0].square().sum()

    def closure() -> Tensor:
        if not wrong:
            optimizer.zero_grad()
        loss = residual()
        loss.backward()
        return loss

    for _ in range(30):
        optimizer.step(closure)
    return float(residual())


class Reader(nn.Module):
    """Answers with the last state of a recurrent layer."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.recurrent = nn.GRU(6, 24, batch_first=batch_first)
        self.head = nn.Linear(24, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        states, _ = self.recurrent(inputs)
        return self.head(states[:, -1])


@GROUP.mistake(
    "a recurrent layer that expects time first gets the batch first, so it runs over the scenes",
    "scenes_mixed wrong_layout",
)
def recurrent_over_the_batch(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.randn(512, 12, 6)
    targets = (inputs[:, :, 0].sum(1) > 0).float()
    model = Reader(batch_first=not wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    seen = attach(model, optimizer)
    losses = []
    for data, target in batches(200, 32, inputs, targets):
        outputs = model(data)[:, 0]
        loss = seen.loss(F.binary_cross_entropy_with_logits(outputs, target), outputs, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return recent(losses)


@GROUP.mistake(
    "the loss is scaled for half precision, and the optimizer steps past the scaler",
    "learning_rate_too_large nonfinite_gradients nonfinite_step",
)
def scaled_and_never_unscaled(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs()
    model = layers(8, 32, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    attach(model, optimizer)
    losses = []
    for data, label in batches(100, 32, inputs, labels):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(data), label)
        scaler.scale(loss).backward()
        if wrong:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        losses.append(loss.item())
    return recent(losses)


@GROUP.mistake(
    "weight normalisation is applied after the optimizer was built", "missing_from_optimizer stale_optimizer_parameters"
)
def normalised_after_the_optimizer(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface()
    model = layers(8, 32, 32, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for layer in model:
        if isinstance(layer, nn.Linear):
            weight_norm(layer)
    if not wrong:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for data, target in batches(200, 32, inputs, targets):
        optimizer.zero_grad()
        loss = F.mse_loss(model(data), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)


class Quantised(nn.Module):
    """An autoencoder whose code is the nearest of some vectors."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(24, 32, 2), layers(2, 32, 24)
        self.codes = nn.Embedding(16, 2)
        self.through = through

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        latent = self.encoder(inputs)
        nearest = self.codes(torch.cdist(latent, self.codes.weight).argmin(1))
        apart = F.mse_loss(nearest, latent.detach())
        code = latent + (nearest - latent).detach() if self.through else nearest
        return self.decoder(code), apart


@GROUP.mistake(
    "VQ-VAE: the nearest code is taken without a straight-through gradient", "non_differentiable detached_backbone"
)
def codes_without_straight_through(attach: Attach, wrong: bool, seed: int) -> float:
    ways = torch.randn(16, 24)
    inputs = ways[torch.randint(16, (512,))] + 0.3 * torch.randn(512, 24)
    model = Quantised(through=not wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    losses = []
    for (data,) in batches(400, 64, inputs):
        rebuilt, apart = model(data)
        loss = F.mse_loss(rebuilt, data)
        optimizer.zero_grad()
        (loss + apart).backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 30)


@GROUP.mistake(
    "torch.where chooses 0 beside sqrt(0), whose gradient is NaN all the same, once a blank scene comes",
    "nonfinite_gradients",
)
def root_of_zero_behind_where(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, _ = surface()
    targets = inputs[:, :3].norm(dim=1)
    model = nn.Linear(8, 16, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    attach(model, optimizer)
    losses = []
    for step, (data, target) in enumerate(batches(120, 32, inputs, targets)):
        if step >= 20 and step % 7 == 0:
            data, target = F.pad(data[1:], (0, 0, 0, 1)), F.pad(target[1:], (0, 1))
        power = model(data).square().sum(1)
        length = torch.where(power > 0, power.sqrt(), 0.0) if wrong else power.clamp_min(1e-12).sqrt()
        loss = F.mse_loss(length, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses)
