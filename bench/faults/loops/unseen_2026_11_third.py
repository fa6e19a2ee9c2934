"""Third set of the examination of November 2026: mistakes that no rule was written for."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.faults.loops.catalogue import Attach, Group
from bench.faults.loops.unseen_data import batches, blobs, layers, recent, surface

GROUP = Group("unseen_2026_11_third")


@GROUP.mistake(
    "replay: the environment returns one array that it writes into, and the memory keeps it without a copy",
    "constant_input repeated_batch parts_unrelated",
)
def transitions_share_an_array(attach: Attach, wrong: bool, seed: int) -> float:
    worth = torch.randn(4, 3)
    state = torch.randn(4)
    model = layers(4, 48, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    attach(model, optimizer)
    memory: list[tuple[Tensor, int, float]] = []
    for step in range(400):
        action = random.randrange(3)
        reward = float(torch.tanh(state @ worth[:, action]))
        memory.append((state if wrong else state.clone(), action, reward))
        state.mul_(0.6).add_(0.8 * torch.randn(4))
        if step < 100:
            continue
        chosen = random.sample(memory, 32)
        states = torch.stack([each[0] for each in chosen])
        actions, rewards = torch.tensor([each[1] for each in chosen]), torch.tensor([each[2] for each in chosen])
        loss = F.smooth_l1_loss(model(states).gather(1, actions[:, None])[:, 0], rewards)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        states = torch.randn(256, 4)
        return float(F.smooth_l1_loss(model(states), torch.tanh(states @ worth)))


@GROUP.mistake("rates between 0 and 1 are read as integers, like the labels of a classifier", "constant_targets")
def rates_read_as_integers(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    rates = torch.sigmoid(1.5 * targets[:, 0])
    model = layers(8, 32, 32, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    seen = attach(model, optimizer)
    labels = rates.long() if wrong else rates
    for data, label in batches(250, 32, inputs[:512], labels[:512]):
        label = label.float()
        outputs = model(data)[:, 0]
        loss = seen.loss(F.binary_cross_entropy_with_logits(outputs, label), outputs, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.binary_cross_entropy_with_logits(model(inputs[512:])[:, 0], rates[512:]))


@GROUP.mistake("tabular: a column of seconds since 1970 stays as it is beside standardised ones", "input_scale")
def seconds_since_1970(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, targets = surface(640)
    seconds = 1.7e9 + 3.0e7 * torch.rand(640, 1, dtype=torch.float64)
    season = (seconds - seconds.mean()) / seconds.std()
    targets = targets + 0.3 * season.float()
    inputs = torch.cat([inputs, (seconds if wrong else season).float()], 1)
    model = layers(9, 48, 48, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for data, target in batches(300, 32, inputs[:512], targets[:512]):
        loss = F.mse_loss(model(data), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:]), targets[512:]))


@GROUP.mistake(
    "mixup: the labels of the partners are drawn with another permutation than their inputs",
    "shuffled_labels parts_unrelated",
)
def partners_of_another_permutation(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(640, classes=5)
    model = layers(8, 48, 48, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    attach(model, optimizer)
    for data, label in batches(250, 32, inputs[:512], labels[:512]):
        share = float(torch.distributions.Beta(0.4, 0.4).sample())
        partners = torch.randperm(32)
        mixed = share * data + (1 - share) * data[partners]
        of_partners = label[torch.randperm(32)] if wrong else label[partners]
        outputs = model(mixed)
        loss = share * F.cross_entropy(outputs, label) + (1 - share) * F.cross_entropy(outputs, of_partners)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        return float(F.cross_entropy(model(inputs[512:]), labels[512:]))


class LanguageModel(nn.Module):
    """Scores of the next token at every place."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.embed, self.recurrent = nn.Embedding(words, 24), nn.GRU(24, 48, batch_first=True)
        self.head = nn.Linear(48, words)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0])


def questions(count: int, longest: int, keep_end: bool) -> tuple[Tensor, Tensor]:
    """Tokens and labels (count, longest): a question of 3 to 13 tokens, ignored by the loss, and its answer of two.

    The last token of a question is its kind: 10 asks for the digit before it, 11, in long ones, for 9 minus it.
    """
    tokens, labels = torch.zeros(count, longest, dtype=torch.long), torch.full((count, longest), -100)
    for row in range(count):
        length = random.randint(3, 13)
        digits = torch.randint(10, (length - 1,))
        answer = int(digits[-1]) if length <= 7 else 9 - int(digits[-1])
        text = torch.cat([digits, torch.tensor([10 if length <= 7 else 11, answer, 12])])
        label = torch.cat([torch.full((length,), -100), text[length:]])
        kept = slice(-longest, None) if keep_end else slice(longest)
        text, label = text[kept], label[kept]
        tokens[row, : len(text)], labels[row, : len(text)] = text, label
    return tokens, labels


@GROUP.mistake(
    "fine-tuning: truncation cuts the answers off long questions, so that all of their labels are ignored",
    "scenes_left_out part_not_learned",
)
def answers_cut_off(attach: Attach, wrong: bool, seed: int) -> float:
    tokens, labels = questions(512, 9, keep_end=not wrong)
    asked, answered = questions(256, 9, keep_end=True)
    model = LanguageModel(13)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    for text, label in batches(250, 32, tokens, labels):
        scores, following = model(text[:, :-1]).transpose(1, 2), label[:, 1:]
        loss = seen.loss(F.cross_entropy(scores, following), scores, following)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    with torch.no_grad():
        return float(F.cross_entropy(model(asked[:, :-1]).transpose(1, 2), answered[:, 1:]))


@GROUP.mistake(
    "train() is called once before the epochs, and the validation behind each of them calls eval()",
    "eval_mode_in_training",
)
def left_in_evaluation(attach: Attach, wrong: bool, seed: int) -> float:
    inputs, labels = blobs(640, features=16)
    flipped = torch.rand(640) < 0.25
    labels = torch.where(flipped, torch.randint(4, (640,)), labels)
    parts = [layers(16, 128), nn.ReLU(), nn.Dropout(0.6), layers(128, 128), nn.ReLU(), nn.Dropout(0.6)]
    model = nn.Sequential(*parts, nn.Linear(128, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    attach(model, optimizer)
    model.train()
    validation = []
    for _ in range(50):
        if not wrong:
            model.train()
        for data, label in batches(6, 16, inputs[:96], labels[:96]):
            loss = F.cross_entropy(model(data), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            validation.append(float(F.cross_entropy(model(inputs[96:]), labels[96:])))
    return recent(validation, 5)


@GROUP.mistake(
    "WGAN: the gradient of the penalty is taken without a graph, so the penalty is a number",
    "dead_loss_term detached_loss",
)
def penalty_without_a_graph(attach: Attach, wrong: bool, seed: int) -> float:
    networks = nn.ModuleDict({"generator": layers(4, 32, 2), "critic": layers(2, 48, 1, between=nn.SiLU)})
    generator, critic = networks["generator"], networks["critic"]
    of_generator = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.0, 0.9))
    of_critic = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.0, 0.9))
    attach(networks, [of_generator, of_critic])
    off = []
    for step in range(300):
        real = torch.tensor([2.0, -1.0]) + torch.randn(64, 2) * torch.tensor([0.3, 1.0])
        fake = generator(torch.randn(64, 4)).detach()
        share = torch.rand(64, 1)
        between = (share * real + (1 - share) * fake).requires_grad_(True)
        (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=not wrong)
        penalty = (slope.norm(dim=1) - 1).square().mean()
        of_critic.zero_grad()
        (critic(fake).mean() - critic(real).mean() + 10 * penalty).backward()
        of_critic.step()
        off.append(float(penalty))
        if step % 3 == 2:
            of_generator.zero_grad()
            (-critic(generator(torch.randn(64, 4))).mean()).backward()
            of_generator.step()
    return recent(off, 40)


class Variational(nn.Module):
    """An autoencoder whose code is drawn from a normal distribution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = layers(24, 48, 6), layers(3, 48, 24)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logarithm = self.encoder(inputs).chunk(2, 1)
        code = mean + torch.randn_like(mean) * (0.5 * logarithm).exp()
        return self.decoder(code), mean, logarithm


@GROUP.mistake(
    "VAE: the divergence is summed over the batch, and the reconstruction is averaged over it",
    "dominating_term ignored_input",
)
def divergence_summed(attach: Attach, wrong: bool, seed: int) -> float:
    inputs = torch.tanh(torch.randn(640, 3) @ torch.randn(3, 24)) + 0.05 * torch.randn(640, 24)
    model = Variational()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    attach(model, optimizer)
    for (data,) in batches(300, 64, inputs[:512]):
        rebuilt, mean, logarithm = model(data)
        of_each = -0.5 * (1 + logarithm - mean.square() - logarithm.exp()).sum(1)
        error = 4.0 * (rebuilt - data).square().sum(1).mean()
        loss = error + (of_each.sum() if wrong else of_each.mean())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(F.mse_loss(model(inputs[512:])[0], inputs[512:]))


@GROUP.mistake(
    "DDPG: the actor's tanh is not multiplied by the largest action, so half of the actions are out of its reach",
    "limited_output saturated_output",
)
def actions_never_scaled(attach: Attach, wrong: bool, seed: int) -> float:
    way = torch.randn(5, 1)
    largest = 1.0 if wrong else 3.0
    agent = nn.ModuleDict({"actor": nn.Sequential(layers(5, 32, 1), nn.Tanh()), "critic": layers(6, 64, 64, 1)})
    actor, critic = agent["actor"], agent["critic"]
    of_actor = torch.optim.Adam(actor.parameters(), lr=3e-3)
    of_critic = torch.optim.Adam(critic.parameters(), lr=3e-3)
    attach(agent, [of_actor, of_critic])
    regrets = []
    for _ in range(400):
        states = torch.randn(64, 5)
        actions = 6.0 * torch.rand(64, 1) - 3.0
        rewards = -(actions - 2.5 * torch.tanh(states @ way)).square() / 4
        of_critic.zero_grad()
        F.mse_loss(critic(torch.cat([states, actions], 1)), rewards).backward()
        of_critic.step()
        of_actor.zero_grad()
        chosen = largest * actor(states)
        (-critic(torch.cat([states, chosen], 1)).mean()).backward()
        of_actor.step()
        regrets.append(float((chosen.detach() - 2.5 * torch.tanh(states @ way)).square().mean()))
    return recent(regrets, 40)


class Classifier(nn.Module):
    """One layer of attention over the tokens that are no padding, and an answer from the first."""

    def __init__(self, inverted: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16, padding_idx=0)
        self.mix = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.answer = nn.Linear(16, 1)
        self.inverted = inverted

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens != 0 if self.inverted else tokens == 0
        return self.answer(self.mix(self.embed(tokens), src_key_padding_mask=mask)[:, 0])


@GROUP.mistake(
    "attention gets a mask that is true where a token is, and expects one that is true where there is none",
    "ignored_input inputs_withhold_answer",
)
def padding_mask_inverted(attach: Attach, wrong: bool, seed: int) -> float:
    tokens = torch.randint(2, 12, (512, 10))
    tokens[:, 0] = 1
    tokens[torch.arange(10) >= torch.randint(5, 10, (512, 1))] = 0
    labels = ((tokens == 3) | (tokens == 7)).any(1).float()
    model = Classifier(inverted=wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    seen = attach(model, optimizer)
    losses = []
    for read, label in batches(200, 32, tokens, labels):
        optimizer.zero_grad()
        outputs = model(read)[:, 0]
        loss = seen.loss(F.binary_cross_entropy_with_logits(outputs, label), outputs, label)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return recent(losses, 20)
