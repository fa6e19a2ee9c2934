"""`simulate --check`: each wrong file is one line; no bit of a manifest changes unnoticed."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest

from ris_fast.commands.cli import main
from ris_fast.config.load import load_config
from ris_fast.config.schema import Config, ConfigError, Data
from ris_fast.data.check_set import check_set
from ris_fast.data.errors import DataError
from ris_fast.data.manifest import NO_CHECKSUM, sealed
from ris_fast.data.shards import ShardSource
from ris_fast.data.write import write_shards
from tests.data.make_npz import SMALL
from tests.data.test_shards import edit_manifest, flip, replace_shard

SIZES = {"train": 50, "val": 12, "test": 8}
CONFIG = Config(task=SMALL, data=Data(seed=5))


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(CONFIG, tmp_path_factory.mktemp("sets") / "set", SIZES, shard_scenes=16).parent


@pytest.fixture()
def written(once: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(once, tmp_path / "set"))


def test_check_passes_what_was_written(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--check", str(written)]) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "every byte is as it was written; 70 scenes in 6 shards" in said


def test_check_names_each_wrong_file_in_a_line(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(written / "train-00001.safetensors")
    (written / "val-00000.safetensors").unlink()
    shutil.copy(written / "test-00000.safetensors", written / "other.safetensors")
    assert main(["simulate", "--check", str(written), "--jobs", "2"]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and "NOT WHOLE" in lines[-1], lines
    for line, (name, word) in zip(
        lines, (("train-00001", "SHA-256"), ("val-00000", "no such file"), ("other", "does not list"))
    ):
        assert name in line and word in line


def test_check_finds_scenes_that_the_seed_does_not_make(written: Path) -> None:
    replace_shard(written, "val-00000", lambda t: t.update(snr_db=t["snr_db"].roll(1)))
    assert ["val-00000" in line and "snr_db" in line and "seed 5" in line for line in check_set(written, 1).wrong] == [
        True
    ]


def test_check_finds_statistics_and_scenes_in_two_splits(written: Path) -> None:
    shutil.copy(written / "test-00000.safetensors", written / "val-00000.safetensors")
    edit_manifest(written, lambda m: m["splits"].update(val=m["splits"]["test"]))
    assert any("8 of 8 test scenes are copies of val" in line for line in check_set(written, 1).wrong)
    edit_manifest(written, lambda m: m["splits"]["test"]["shards"][0]["statistics"].update(snr_db_mean=99.0))
    assert any("snr_db_mean" in line for line in check_set(written, 1).wrong)


def test_check_says_what_is_there_of_unfinished_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def stop(done: int, total: int) -> None:
        if done >= 48:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(CONFIG, tmp_path / "set", SIZES, shard_scenes=16, progress=stop)
    flip(tmp_path / "set.partial" / "train-00002.safetensors")
    for name in ("set", "set.partial"):
        assert main(["simulate", "--check", str(tmp_path / name)]) == 3
        said = capsys.readouterr().out
        assert "train-00002.safetensors: not known to be whole" in said
        assert "2 of 6 shards are whole (32 of 70 scenes), 3 missing, 1 to be made again" in said


def test_check_refuses_other_folders_and_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--check", str(tmp_path)]) == 3 and "no manifest.json" in capsys.readouterr().err
    assert main(["simulate", "--check", str(tmp_path), "--scenes", "4"]) == 2
    assert main(["simulate", "--scenes", "4"]) == 2 and "--out DIR" in capsys.readouterr().err


def test_a_flipped_bit_of_a_manifest_is_harmless_or_refused(written: Path) -> None:
    """Harmless: the entries are the same, as where a digit beyond float64's changes."""
    file, rng = written / "manifest.json", random.Random(0)
    raw = file.read_bytes()
    whole = json.loads(raw)
    config = Config(task=SMALL, data=Data(path=str(written)))
    begin = raw.index(b'"sha256": "' + whole["sha256"].encode()) - 3
    places = [*rng.sample(range(8 * len(raw)), 300), *range(8 * begin, 8 * len(raw))]
    refused = 0
    for place in places:
        changed = bytearray(raw)
        changed[place // 8] ^= 1 << place % 8
        file.write_bytes(changed)
        try:
            source = ShardSource(config, "cpu")
            assert source.manifest == whole, place
        except DataError as error:
            refused += 1
            assert "manifest.json" in str(error) or "no manifest" in str(error), error
        try:
            assert load_config(flags={"data.path": str(written)})  # reads its task before anything is checked
        except ConfigError:
            pytest.fail(f"bit {place} is taken for a setting")
    assert refused > 0.98 * len(places)


def test_a_manifest_without_checksum_is_read_with_a_note(written: Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    manifest.pop("sha256")
    (written / "manifest.json").write_text(json.dumps(manifest))
    assert ShardSource(Config(task=SMALL, data=Data(path=str(written))), "cpu").notes == [NO_CHECKSUM]
    assert check_set(written, 1).whole
    assert "sha256" not in manifest and sealed(manifest)["sha256"]
