"""Whatever bytes a data set has, opening it ends in scenes or in a DataError: no other exception, no hang, no huge
allocation."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from ris_fast.config.schema import Config, Data
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import sealed
from ris_fast.data.open_source import open_source
from ris_fast.data.write import write_shards
from ris_fast.physics.random import SPLITS
from tests.data.make_npz import SMALL, original_arrays, write_npz

MUTATIONS = 200
MOST_BYTES = 2**30  # beyond what the process has; an honest reading of these files takes a few MiB
Mutate = Callable[[random.Random, bytes], bytes]


def flipped(rng: random.Random, raw: bytes) -> bytes:
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 8))):
        out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def cut(rng: random.Random, raw: bytes) -> bytes:
    return raw[: rng.randrange(len(raw))]


def spliced(rng: random.Random, raw: bytes) -> bytes:
    """A piece left out, doubled, or overwritten with noise."""
    at, length = rng.randrange(len(raw)), rng.choice((1, 4, 30, 500))
    return raw[:at] + rng.choice((b"", 2 * raw[at : at + length], rng.randbytes(length))) + raw[at + length :]


def edited(rng: random.Random, raw: bytes) -> bytes:
    """One byte of what describes the arrays: text and numbers of a header."""
    marks = [
        i
        for word in (b"NUMPY", b"PK\1\2", b"PK\3\4", b"PK\5\6", b'"dtype"', b'"shape"', b'"scenes"', b'"shards"')
        for i in _all(raw, word)
    ]
    at = min(len(raw) - 1, rng.choice(marks or [0]) + rng.randrange(110))
    return raw[:at] + rng.choice((b"9", b"-", b"e", b"[", b"\0", b"\xff", b"", b"99999999")) + raw[at + 1 :]


def _all(raw: bytes, word: bytes) -> Iterator[int]:
    at = raw.find(word)
    while at >= 0:
        yield at
        at = raw.find(word, at + 1)


MUTATES: tuple[Mutate, ...] = (flipped, edited, edited, spliced, cut)


def outcome(path: Path) -> str:
    """'read' where every scene can be had, 'refused' for a DataError; anything else is raised."""
    try:
        source = open_source(Config(task=SMALL, data=Data(path=str(path))), "cpu")
        for split in SPLITS:
            if source.size(split):
                scenes = source.batch(split, torch.arange(source.size(split)))
                assert bool(scenes.snapshots.isfinite().all())
        return "read"
    except DataError as error:
        assert error.found and error.expected and error.todo
        return "refused"


@pytest.fixture
def bounded() -> Iterator[None]:
    """No allocation beyond MOST_BYTES more than the process has now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MOST_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("compressed", [False, True])
def test_mutated_npz_is_read_or_refused(tmp_path: Path, compressed: bool, bounded: None) -> None:
    path = write_npz(tmp_path / "shard.npz", original_arrays(6, task=SMALL), compressed=compressed)
    raw, rng = path.read_bytes(), random.Random(0)
    assert outcome(path) == "read"
    seen = []
    for number in range(MUTATIONS):
        path.write_bytes(MUTATES[number % len(MUTATES)](rng, raw))
        seen.append(outcome(path))
    assert seen.count("refused") > MUTATIONS / 2


EXTREMES = (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-45, 1e30, 3e38, -3e38, 1e5)


@pytest.mark.slow
def test_any_numbers_in_an_npz_are_read_or_refused(tmp_path: Path, bounded: None) -> None:
    """The container is whole, the numbers are not: one value, one scene or a whole key is replaced."""
    whole, rng = original_arrays(6), np.random.default_rng(0)
    with np.errstate(invalid="ignore"):
        for _ in range(MUTATIONS):
            arrays = {key: value.copy() for key, value in whole.items()}
            for key in rng.choice([*arrays], rng.integers(1, 3)):
                value, scene = arrays[key], rng.integers(6)
                where = (slice(None), (scene,), tuple(rng.integers(value.shape)))[rng.integers(3)]
                value[where] = (
                    value.dtype.type(rng.choice(EXTREMES))
                    if rng.random() < 0.8
                    else rng.normal(size=value[where].shape) * 100
                )
            outcome(write_npz(tmp_path / "shard.npz", arrays))


@pytest.mark.parametrize("what", ["shard", "manifest"])
def test_mutated_shards_are_read_or_refused(tmp_path: Path, what: str, bounded: None) -> None:
    write_shards(Config(task=SMALL), tmp_path / "set", {"train": 6, "val": 2, "test": 2})
    path = tmp_path / "set" / ("manifest.json" if what == "manifest" else "train-00000.safetensors")
    raw, rng = path.read_bytes(), random.Random(1)
    assert outcome(tmp_path / "set") == "read"
    seen = []
    for number in range(MUTATIONS):
        path.write_bytes(MUTATES[number % len(MUTATES)](rng, raw))
        seen.append(outcome(tmp_path / "set"))
    assert seen.count("refused") > MUTATIONS / 2


BROKEN = (None, -1, 2**70, 1.5, "12", [], {}, True, "../x", "\0")


def places(value: object, at: tuple = ()) -> Iterator[tuple]:
    """Every place in nested lists and tables."""
    yield at
    for key, each in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(each, (*at, key))


def test_mutated_manifests_are_read_or_refused(tmp_path: Path, bounded: None) -> None:
    write_shards(Config(task=SMALL), tmp_path / "set", {"train": 6, "val": 2, "test": 2})
    manifest, rng = tmp_path / "set" / "manifest.json", random.Random(2)
    text = manifest.read_text()
    for place in [each for each in places(json.loads(text)) if each]:
        value = json.loads(text)
        inner = value
        for key in place[:-1]:
            inner = inner[key]
        if rng.random() < 0.3:
            del inner[place[-1]]
        else:
            inner[place[-1]] = rng.choice(BROKEN)
        manifest.write_text(json.dumps(sealed(value)))  # with a checksum that agrees: the other checks are meant
        outcome(tmp_path / "set")
