"""Right loops in which networks play against each other or an agent acts: alternation, targets, policies."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import begin, falls, mlp

RIGHT = Group("right_adversarial")


def ring(size: int, width: int) -> Tensor:
    """(size, width) points near a circle in their first two coordinates, around 2 in the others."""
    angle = 6.2832 * torch.rand(size)
    points = 2.0 + 0.1 * torch.randn(size, width)
    points[:, 0], points[:, 1] = angle.cos() + 0.05 * torch.randn(size), angle.sin() + 0.05 * torch.randn(size)
    return points


def distance(first: Tensor, second: Tensor) -> float:
    """Between two clouds, by their means and spreads: what a generator should make smaller."""
    return float((first.mean(0) - second.mean(0)).norm() + (first.std(0) - second.std(0)).norm())


@RIGHT.right("GAN: discriminator and generator step in turn, the fake is detached for the first")
def gan(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, noise = draw.choice((2, 3, 4)), draw.choice((4, 8))
    model = nn.ModuleDict(
        {"g": mlp(noise, draw.choice((24, 32, 48)), width), "d": mlp(width, 32, 1, unit=lambda: nn.LeakyReLU(0.2))}
    )
    rate = draw.choice((1e-3, 2e-3))
    first = torch.optim.Adam(model["d"].parameters(), lr=2 * rate, betas=(0.5, 0.99))
    second = torch.optim.Adam(model["g"].parameters(), lr=rate, betas=(0.5, 0.99))
    attach(model, [first, second])
    distances = []
    for _ in range(draw.choice((250, 300))):
        real, fake = ring(64, width), model["g"](torch.randn(64, noise))
        first.zero_grad()
        (F.softplus(-model["d"](real)).mean() + F.softplus(model["d"](fake.detach())).mean()).backward()
        first.step()
        second.zero_grad()
        F.softplus(-model["d"](fake)).mean().backward()
        second.step()
        distances.append(distance(fake.detach(), real))
    falls(distances)


@RIGHT.right("pix2pix: the discriminator is frozen while the generator trains, also when the loop ends")
def pix2pix(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    channels = draw.choice((6, 8))

    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.LeakyReLU(0.2)]

    generator = nn.Sequential(*block(1, channels), *block(channels, channels), nn.Conv2d(channels, 1, 1), nn.Tanh())
    discriminator = nn.Sequential(*block(2, channels), nn.Conv2d(channels, 1, 3, padding=1))
    model = nn.ModuleDict({"net_g": generator, "net_d": discriminator})
    rate = draw.choice((1e-3, 2e-3))
    optimizer_g = torch.optim.Adam(generator.parameters(), lr=rate, betas=(0.5, 0.999))
    optimizer_d = torch.optim.Adam(discriminator.parameters(), lr=rate, betas=(0.5, 0.999))
    attach(model, [optimizer_g, optimizer_d])
    losses = []
    for _ in range(draw.choice((80, 120))):
        source = torch.randn(8, 1, 8, 8)
        target = torch.tanh(2 * source.roll(1, -1))
        fake = generator(source)
        discriminator.requires_grad_(True)
        optimizer_d.zero_grad()
        judged_fake = discriminator(torch.cat((source, fake.detach()), 1))
        judged_real = discriminator(torch.cat((source, target), 1))
        (0.5 * (F.softplus(judged_fake) + F.softplus(-judged_real)).mean()).backward()
        optimizer_d.step()
        discriminator.requires_grad_(False)
        optimizer_g.zero_grad()
        near = (fake - target).abs().mean()
        (F.softplus(-discriminator(torch.cat((source, fake), 1))).mean() + 30 * near).backward()
        optimizer_g.step()
        losses.append(near.detach())
    falls(losses)


@RIGHT.right("WGAN-GP: five critic steps for one of the generator, with a gradient penalty")
def wgan_gp(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    width, often = draw.choice((3, 4)), draw.choice((3, 5))
    generator, critic = mlp(4, 32, width), mlp(width, draw.choice((32, 48)), 1)
    first = torch.optim.Adam(critic.parameters(), lr=2e-3, betas=(0.0, 0.9))
    second = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    attach(nn.ModuleList([generator, critic]), [second, first])
    distances = []
    for step in range(draw.choice((350, 400))):
        real = ring(48, width)
        with torch.no_grad():
            fake = generator(torch.randn(48, 4))
        share = torch.rand(48, 1)
        between = (share * real + (1 - share) * fake).requires_grad_()
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
        first.zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * ((slope.norm(dim=1) - 1) ** 2).mean()).backward()
        first.step()
        if step % often == often - 1:
            second.zero_grad()
            made = generator(torch.randn(48, 4))
            (-critic(made).mean()).backward()
            second.step()
            distances.append(distance(made.detach(), real))
    falls(distances)


class Walk:
    """One number to be kept near zero by pushes in -1..1: states (n, 2), rewards (n,)."""

    def __init__(self, agents: int) -> None:
        self.state = torch.randn(agents, 2)

    def step(self, push: Tensor) -> tuple[Tensor, Tensor]:
        """After pushes (n, 1): next states and rewards."""
        place, speed = self.state.unbind(1)
        speed = 0.8 * speed + 0.3 * push.squeeze(1)
        place = place + 0.3 * speed
        again = torch.rand(len(place)) < 0.05
        self.state = torch.stack((place, speed), 1).clamp(-3, 3)
        self.state[again] = torch.randn(int(again.sum()), 2)
        return self.state, -(place.clamp(-3, 3) ** 2)


@RIGHT.right("SAC: two critics with targets, a policy, and a temperature of its own with its own optimizer")
def sac(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    hidden = draw.choice((24, 32))
    model = nn.ModuleDict({"actor": mlp(2, hidden, 2), "q1": mlp(3, hidden, 1), "q2": mlp(3, hidden, 1)})
    model.register_parameter("log_alpha", nn.Parameter(torch.tensor(-1.0)))
    targets = copy.deepcopy(nn.ModuleList([model["q1"], model["q2"]])).requires_grad_(False)
    critics = torch.optim.Adam([*model["q1"].parameters(), *model["q2"].parameters()], lr=3e-3)
    actors = torch.optim.Adam(model["actor"].parameters(), lr=draw.choice((1e-3, 3e-3)))
    alphas = torch.optim.Adam([model.log_alpha], lr=3e-3)
    attach(model, [critics, actors, alphas])

    def act(state: Tensor) -> tuple[Tensor, Tensor]:
        mean, scale = model["actor"](state).chunk(2, 1)
        normal = torch.distributions.Normal(mean, F.softplus(scale) + 0.05)
        raw = normal.rsample()
        return raw.tanh(), (normal.log_prob(raw) - torch.log(1 - raw.tanh() ** 2 + 1e-6)).sum(1, keepdim=True)

    walk, costs = Walk(64), []
    for _ in range(draw.choice((120, 150))):
        state = walk.state.clone()
        with torch.no_grad():
            push = act(state)[0]
            following, reward = walk.step(push)
            ahead, log_ahead = act(following)
            seen = torch.cat((following, ahead), 1)
            best = torch.min(targets[0](seen), targets[1](seen)) - model.log_alpha.exp() * log_ahead
            goal = reward[:, None] + 0.9 * best
        pair = torch.cat((state, push), 1)
        critics.zero_grad()
        (F.mse_loss(model["q1"](pair), goal) + F.mse_loss(model["q2"](pair), goal)).backward()
        critics.step()
        tried, log_tried = act(state)
        pair = torch.cat((state, tried), 1)
        value = torch.min(model["q1"](pair), model["q2"](pair))
        actors.zero_grad()
        (model.log_alpha.exp().detach() * log_tried - value).mean().backward()
        actors.step()
        alphas.zero_grad()
        (-(model.log_alpha * (log_tried.detach() - 1.0))).mean().backward()
        alphas.step()
        with torch.no_grad():
            for slow, fast in zip(
                targets.parameters(), [*model["q1"].parameters(), *model["q2"].parameters()], strict=True
            ):
                slow.lerp_(fast, 0.02)
        costs.append(-reward.mean())
    falls(costs)


@RIGHT.right("PPO: many steps without gradient, then epochs of mini-batches over them, with one optimizer")
def ppo(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    actor, critic = mlp(2, 32, 1, unit=nn.Tanh), mlp(2, 32, 1, unit=nn.Tanh)
    model = nn.ModuleDict({"actor": actor, "critic": critic})
    model.register_parameter("log_std", nn.Parameter(torch.full((1,), -0.5)))
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((2e-3, 3e-3)), eps=1e-5)
    attach(model, optimizer)
    walk, costs, length, epochs = Walk(32), [], draw.choice((8, 16)), draw.choice((3, 4))
    for _ in range(25):
        states, pushes, logs, rewards = [], [], [], []
        with torch.no_grad():
            for _ in range(length):
                states.append(walk.state.clone())
                normal = torch.distributions.Normal(actor(states[-1]), model.log_std.exp())
                pushes.append(normal.sample())
                logs.append(normal.log_prob(pushes[-1]).squeeze(1))
                rewards.append(walk.step(pushes[-1])[1])
            value, returns = critic(walk.state).squeeze(1), []
            for reward in reversed(rewards):
                value = reward + 0.9 * value
                returns.insert(0, value)
        costs.append(-torch.stack(rewards).mean())
        state, push, log, goal = (torch.cat(each) for each in (states, pushes, logs, returns))
        for _ in range(epochs):
            for part in torch.randperm(len(state)).split(len(state) // 4):
                normal = torch.distributions.Normal(actor(state[part]), model.log_std.exp())
                ratio = (normal.log_prob(push[part]).squeeze(1) - log[part]).exp()
                guess = critic(state[part]).squeeze(1)
                better = goal[part] - guess.detach()
                better = (better - better.mean()) / (better.std() + 1e-8)
                gain = torch.min(ratio * better, ratio.clamp(0.8, 1.2) * better).mean()
                optimizer.zero_grad()
                (-gain + 0.05 * F.mse_loss(guess, goal[part]) - 0.001 * normal.entropy().mean()).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
    falls(costs)


@RIGHT.right("DQN: replayed steps, and a target network that is overwritten from time to time")
def dqn(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model = nn.ModuleDict({"online": mlp(2, draw.choice((32, 48)), 3), "target": mlp(2, 32, 3)})
    model["target"] = copy.deepcopy(model["online"]).requires_grad_(False)
    optimizer = torch.optim.RMSprop(model["online"].parameters(), lr=draw.choice((1e-3, 2e-3)))
    attach(model, optimizer, frozen=("target",))
    walk, memory, costs, refresh = Walk(32), [], [], draw.choice((10, 20))
    for step in range(260):
        state = walk.state.clone()
        with torch.no_grad():
            action = model["online"](state).argmax(1)
        action = torch.where(torch.rand(32) < max(0.05, 1 - step / 120), torch.randint(3, (32,)), action)
        following, reward = walk.step(action[:, None] - 1.0)
        memory.append((state, action, reward, following.clone()))
        costs.append(-reward.mean())
        state, action, reward, following = (
            torch.cat(each) for each in zip(*draw.sample(memory[-100:], min(4, len(memory))), strict=True)
        )
        with torch.no_grad():
            goal = reward + 0.9 * model["target"](following).max(1).values
        loss = F.smooth_l1_loss(model["online"](state).gather(1, action[:, None]).squeeze(1), goal)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_value_(model["online"].parameters(), 1.0)
        optimizer.step()
        if step % refresh == 0:
            model["target"].load_state_dict(model["online"].state_dict())
    falls(costs)


@RIGHT.right("REINFORCE: a policy gradient with a moving baseline")
def policy_gradient(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    arms, width = draw.choice((4, 6, 8)), 6
    model = mlp(width, draw.choice((16, 32)), arms, depth=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((5e-3, 1e-2)))
    attach(model, optimizer)
    best, baseline, costs = torch.randn(width, arms), 0.0, []
    for _ in range(250):
        state = torch.randn(64, width)
        choice = torch.distributions.Categorical(logits=model(state))
        action = choice.sample()
        reward = (action == (state @ best).argmax(1)).float()
        optimizer.zero_grad()
        (-(choice.log_prob(action) * (reward - baseline)).mean()).backward()
        optimizer.step()
        baseline = 0.9 * baseline + 0.1 * float(reward.mean())
        costs.append(1 - reward.mean())
    falls(costs)


@RIGHT.right("evolution strategies: the gradient is made of forward passes alone, which no backward follows")
def evolution(attach: Attach, wrong: bool, seed: int) -> None:
    draw = begin(seed)
    model, goal = mlp(4, 16, 2, depth=1, unit=nn.Tanh), torch.randn(4, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=draw.choice((0.02, 0.03)))
    attach(model, optimizer)
    parameters, losses, sigma = list(model.parameters()), [], draw.choice((0.05, 0.1))
    for _ in range(100):
        x = torch.randn(64, 4)
        sums = [torch.zeros_like(each) for each in parameters]
        with torch.no_grad():
            for _ in range(8):
                noises = [torch.randn_like(each) for each in parameters]
                values = []
                for sign in (1.0, -2.0):
                    torch._foreach_add_(parameters, noises, alpha=sign * sigma)
                    values.append(F.mse_loss(model(x), x @ goal))
                torch._foreach_add_(parameters, noises, alpha=sigma)
                torch._foreach_add_(sums, noises, alpha=float(values[0] - values[1]) / (2 * sigma * 8))
        for each, total in zip(parameters, sums, strict=True):
            each.grad = total
        optimizer.step()
        losses.append(values[0])
    falls(losses)
