"""What is given as --data and is no data set is told: what was found there, what was expected, what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from ris_fast.config.schema import Config, Data
from ris_fast.data.data_path import guess_source
from ris_fast.data.errors import DataError
from ris_fast.data.open_source import open_source
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL, write_folders


@pytest.fixture()
def root(tmp_path: Path) -> Path:
    """sets/npz and sets/shards are data sets; what is beside them is none."""
    write_folders(tmp_path / "sets" / "npz")
    for name in ("sets/shards", "cut"):
        write_shards(Config(task=SMALL), tmp_path / name, {"train": 4, "val": 1, "test": 1})
    (tmp_path / "cut" / "manifest.json").unlink()
    (tmp_path / "empty").mkdir()
    (tmp_path / "later.partial").mkdir()
    (tmp_path / "later.partial" / "plan.json").touch()
    return tmp_path


def test_guess_source_looks_into_the_path(root: Path) -> None:
    assert guess_source("") == "simulate" and guess_source(str(root / "sets/shards")) == "shards"
    assert guess_source(str(root / "sets/npz")) == "npz" == guess_source(str(root / "sets/npz/val"))
    assert guess_source(str(root / "sets/npz/train/shard_000.npz")) == "npz"


@pytest.mark.parametrize(
    "given, found, todo",
    [
        ("sets/shards/manifest.json", "one file of a data set", "--data {root}/sets/shards."),
        ("sets/shards/train-00000.safetensors", "one file of a data set", "--data {root}/sets/shards."),
        ("later.partial/plan.json", "a file that is no .npz", "--data DIR"),
        ("moved", "no such file or folder", "data.path in a run's config.toml"),
        ("later", "unfinished work in later.partial", "`ris-fast simulate` command again"),
        ("later.partial", "unfinished work", "`ris-fast simulate` command again"),
        ("empty", "an empty folder", "--data DIR"),
        ("cut", "without a manifest.json", "Copy the whole folder"),
        ("sets", "but npz, shards", "--data {root}/sets/npz."),
        ("/dev/null", "a file that is no .npz", "--data DIR"),
    ],
)
def test_open_source_names_what_is_no_data_set(root: Path, given: str, found: str, todo: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(Config(task=SMALL, data=Data(path=str(root / given))), "cpu")
    error = caught.value
    assert (
        error.where == str(root / given)
        and found in error.found
        and error.expected
        and todo.format(root=root) in error.todo
    )


@pytest.mark.parametrize("source", ["npz", "shards"])
@pytest.mark.parametrize("given", ["moved", "empty", "sets/shards/manifest.json"])
def test_open_source_of_a_given_kind_names_what_is_wrong(root: Path, source: str, given: str) -> None:
    with pytest.raises(DataError, match="one .npz file"):
        open_source(Config(task=SMALL, data=Data(source=source, path=str(root / given))), "cpu")


def test_guess_source_names_an_unreadable_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match="cannot be read .Permission denied"):
        guess_source(str(root / "sets"))
