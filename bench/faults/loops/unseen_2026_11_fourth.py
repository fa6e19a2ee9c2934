"""Fourth set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.small import images
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_fourth")


class Recogniser(nn.Module):
    """A small convolutional network that may end with probabilities."""

    def __init__(self, classes: int, probabilities: bool) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
        self.head = nn.Linear(128, classes)
        self.probabilities = probabilities

    def forward(self, pictures: Tensor) -> Tensor:
        scores = self.head(self.features(pictures))
        return torch.softmax(scores, 1) if self.probabilities else scores


@GROUP.mistake(
    "vision: forward() ends with a softmax, and the criterion is the cross-entropy of scores", "softmax_twice"
)
def forward_ends_with_softmax(attach: Attach, wrong: bool, seed: int) -> float:
    model = Recogniser(8, probabilities=wrong)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    criterion = nn.CrossEntropyLoss()
    seen = attach(model, optimizer)
    losses = []
    for _ in range(250):
        pictures, labels = images(32, 8)
        outputs = model(pictures)
        loss = seen.loss(criterion(outputs, labels), outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 20)


@GROUP.mistake(
    "a network with batch norm is never put into eval(), and validation scenes come one class after the other",
    "train_mode_in_validation",
)
def validated_class_by_class(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(768, classes=4)
    order = labels[512:].argsort()
    checked, known = inputs[512:][order], labels[512:][order]
    model = nn.Sequential(nn.Linear(8, 48), nn.BatchNorm1d(48), nn.ReLU(), layers(48, 48, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    validation = []
    for _ in range(20):
        model.train()
        for data, label in batches(16, 32, inputs[:512], labels[:512]):
            scores = model(data)
            loss = seen.loss(F.cross_entropy(scores, label), scores, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if not wrong:
            model.eval()
        with torch.no_grad():
            parts = zip(checked.split(32), known.split(32))
            validation.append(recent([float(F.cross_entropy(model(data), label)) for data, label in parts]))
    return recent(validation, 5)


@GROUP.mistake(
    "GAN: both steps clear the generator's gradients, and the discriminator's add up from step to step",
    "gradients_never_cleared",
)
def discriminator_never_cleared(attach: Attach, wrong: bool, seed: int) -> float:
    networks = nn.ModuleDict({"generator": layers(4, 32, 2), "critic": layers(2, 32, 1, between=nn.SiLU)})
    generator, critic = networks["generator"], networks["critic"]
    of_generator = torch.optim.Adam(generator.parameters(), lr=2e-3, betas=(0.5, 0.99))
    of_critic = torch.optim.Adam(critic.parameters(), lr=4e-3, betas=(0.5, 0.99))
    attach(networks, [of_generator, of_critic])
    apart = []
    for _ in range(300):
        real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2) * torch.tensor([0.3, 1.0])
        fake = generator(torch.randn(64, 4))
        (of_generator if wrong else of_critic).zero_grad()
        (F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()).backward()
        of_critic.step()
        of_generator.zero_grad()
        F.softplus(-critic(fake)).mean().backward()
        of_generator.step()
        apart.append(float((fake.mean(0) - real.mean(0)).norm() + (fake.std(0) - real.std(0)).norm()))
    return recent(apart, 60)


@GROUP.mistake(
    "mixed precision: the norm is clipped to 1 before the scaler has divided the gradients",
    "clip_before_unscale clip_too_small",
)
def clipped_while_scaled(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(640)
    model = layers(8, 48, 48, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu")
    attach(model, optimizer)
    for data, label in batches(250, 32, inputs[:512], labels[:512]):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(data), label)
        scaler.scale(loss).backward()
        if not wrong:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs[512:]), labels[512:]))


@GROUP.mistake(
    "an exponential decay that is meant once an epoch is stepped behind every batch",
    "schedule_per_batch learning_rate_too_small",
)
def decay_behind_every_batch(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = layers(8, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    seen = attach(model, optimizer)
    for _ in range(20):
        for data, target in batches(16, 32, inputs[:512], targets[:512]):
            outputs = model(data)
            loss = seen.loss(F.mse_loss(outputs, target), outputs, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if wrong:
                schedule.step()
        if not wrong:
            schedule.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


@GROUP.mistake(
    "distillation: kl_div, which expects logarithms of the student's probabilities, gets the probabilities",
    "target_scale_differs softmax_twice",
)
def divergence_of_probabilities(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, _ = surface(640)
    teacher = layers(8, 48, 5, between=nn.Tanh).requires_grad_(False).eval()
    nn.init.normal_(teacher[2].weight, std=0.5)
    student = layers(8, 32, 5)
    optimizer = torch.optim.Adam(student.parameters(), lr=5e-3)
    seen = attach(student, optimizer)
    heat = 2.0
    for (data,) in batches(300, 32, inputs[:512]):
        scores = student(data) / heat
        agreed = F.softmax(teacher(data) / heat, 1)
        answer = F.softmax(scores, 1) if wrong else F.log_softmax(scores, 1)
        loss = seen.loss(heat**2 * F.kl_div(answer, agreed, reduction="batchmean"), answer, agreed)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        agreed = F.softmax(teacher(inputs[512:]), 1)
        return float(F.kl_div(F.log_softmax(student(inputs[512:]), 1), agreed, reduction="batchmean"))


class Pretrained(nn.Module):
    """Two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = nn.Sequential(layers(8, 12), nn.Tanh()), nn.Sequential(layers(12, 16, 16), nn.Tanh())
        self.head = nn.Linear(16, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.late(self.early(inputs)))


@GROUP.mistake(
    "fine-tuning: all is frozen, and `block.requires_grad = True` sets an attribute of the module, not its weights",
    "frozen_parameters missing_from_optimizer",
)
def thawed_by_an_attribute(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    model = Pretrained()
    for weight in model.parameters():
        weight.requires_grad = False
    for part in (model.late, model.head):
        if wrong and part is model.late:
            part.requires_grad = True
        else:
            part.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    attach(model, optimizer, frozen=("early.",))
    for data, target in batches(400, 32, inputs[:512], targets[:512]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


@GROUP.mistake(
    "class-incremental: for new classes the head is replaced by a larger one, and the optimizer keeps the old",
    "missing_from_optimizer stale_optimizer_parameters",
)
def head_replaced_in_training(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(1280, classes=8)
    old = labels < 4
    model = nn.ModuleDict({"body": nn.Sequential(layers(8, 8), nn.Tanh()), "head": nn.Linear(8, 4)})
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for task in range(2):
        if task == 1:
            larger = nn.Linear(8, 8)
            with torch.no_grad():
                larger.weight[:4], larger.bias[:4] = model["head"].weight, model["head"].bias
            model["head"] = larger
            if not wrong:
                seen.close()
                optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
                attach(model, optimizer)
        chosen = torch.arange(1024) if task else torch.arange(1024)[old[:1024]]
        for data, label in batches(150 + 150 * task, 32, inputs[chosen], labels[chosen]):
            loss = F.cross_entropy(model["head"](model["body"](data)), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model["head"](model["body"](inputs[1024:])), labels[1024:]))


@GROUP.mistake("REINFORCE: the log-probability times the advantage is minimised, without the minus", "loss_sign")
def policy_gradient_without_minus(attach: Attach, wrong: bool, seed: int) -> float:
    worth = torch.randn(4, 3)
    policy = layers(4, 32, 3, between=nn.Tanh)
    optimizer = torch.optim.Adam(policy.parameters(), lr=5e-3)
    seen = attach(policy, optimizer)
    regrets = []
    for _ in range(250):
        states = torch.randn(64, 4)
        scores = policy(states)
        chances = torch.distributions.Categorical(logits=scores)
        actions = chances.sample()
        rewards = torch.tanh(states @ worth)
        gained = rewards.gather(1, actions[:, None])[:, 0]
        objective = (chances.log_prob(actions) * (gained - gained.mean())).mean()
        loss = seen.loss(objective if wrong else -objective)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regrets.append(float((rewards.max(1).values - gained).mean()))
    return recent(regrets, 30)


@GROUP.mistake(
    "DQN: the counter after which the target network is brought up to date is set to zero in every episode",
    "ema_frozen",
)
def target_never_brought_up_to_date(attach: Attach, wrong: bool, seed: int) -> float:
    worth, turn = torch.randn(4, 3), torch.linalg.qr(torch.randn(4, 4))[0]
    online = layers(4, 64, 3)
    target = copy.deepcopy(online).requires_grad_(False)
    optimizer = torch.optim.Adam(online.parameters(), lr=3e-3)
    attach(online, optimizer)

    def missed(states: Tensor, actions: Tensor, judge: nn.Module) -> Tensor:
        rewards = torch.tanh(states @ worth).gather(1, actions)[:, 0]
        following = states @ turn + 0.1 * torch.randn_like(states)
        with torch.no_grad():
            expected = rewards + 0.8 * judge(following).max(1).values
        return F.smooth_l1_loss(online(states).gather(1, actions)[:, 0], expected)

    passed = 0
    for step in range(600):
        if wrong and step % 15 == 0:
            passed = 0
        loss = missed(torch.randn(64, 4), torch.randint(3, (64, 1)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        passed += 1
        if passed == 20:
            target.load_state_dict(online.state_dict())
            passed = 0
    with torch.no_grad():
        return float(missed(torch.randn(512, 4), torch.randint(3, (512, 1)), online))
