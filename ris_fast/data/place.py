"""What lies at data.path, and what to say where it is no data set."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ris_fast.config.load import MANIFEST
from ris_fast.data.errors import DataError
from ris_fast.physics.random import SPLITS

PLAN = "plan.json"  # lies in work that `ris-fast simulate` has not finished
EXPECTED = "a folder of shards from `ris-fast simulate` or the original pipeline, or one .npz file"


def guess_source(path: str) -> str:
    """simulate without a path, shards where a manifest lies, npz where such files do. Raises: DataError."""
    if not path:
        return "simulate"
    place = Path(path)
    check_place(place)
    with _readable(place):
        if (place / MANIFEST).is_file():
            return "shards"
        if place.is_file() or npz_files(place) or any((place / split).is_dir() for split in SPLITS):
            return "npz"
        raise _no_data(place)


def check_place(place: Path) -> None:
    """Something is there that could be a data set. Raises: DataError that says what is there instead."""
    with _readable(place):
        if not place.exists():
            raise _not_there(place)
        if not place.is_dir() and place.suffix != ".npz":
            raise _wrong_file(place)
        if place.is_dir() and not any(place.iterdir()):
            raise DataError(place, "", "an empty folder", EXPECTED, "Give the right --data DIR, or generate the data.")


def npz_files(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. Hidden files are no shards: other systems leave `._NAME.npz` beside them."""
    return sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(
            place,
            "",
            f"a place that cannot be read ({problem.strerror})",
            EXPECTED,
            "Get the right to read it, or give another --data DIR.",
        ) from None


def _not_there(place: Path) -> DataError:
    unfinished = place.with_name(place.name + ".partial")
    if (unfinished / PLAN).is_file():
        return _unfinished(place, f"no such folder, but unfinished work in {unfinished.name}")
    return DataError(
        place,
        "",
        "no such file or folder",
        EXPECTED,
        "Where it was moved, give its present place: --data DIR, or data.path in a run's config.toml.",
    )


def _unfinished(place: Path, found: str) -> DataError:
    return DataError(
        place,
        "",
        found,
        "a whole data set",
        "Run the same `ris-fast simulate` command again: it goes on where it stopped.",
    )


def _wrong_file(place: Path) -> DataError:
    own = place.suffix == ".safetensors" or place.name == MANIFEST
    found = "one file of a data set" if own else "a file that is no .npz"
    return DataError(
        place,
        "",
        found,
        EXPECTED,
        f"Give the folder: --data {shlex.quote(str(place.parent))}." if own else "Give the right --data DIR.",
    )


def _no_data(place: Path) -> DataError:
    """For a folder with things in it, none of which is a data set."""
    if (place / PLAN).is_file():
        return _unfinished(place, "unfinished work of `ris-fast simulate`")
    if any(place.glob("*.safetensors")):
        return DataError(
            place,
            "",
            f"safetensors shards without a {MANIFEST}",
            "both, as `ris-fast simulate` writes them",
            "Copy the whole folder, or run `ris-fast simulate` again.",
        )
    names = sorted(each.name for each in place.iterdir())
    inside = next(
        (
            each
            for each in sorted(place.iterdir())
            if (each / MANIFEST).is_file() or npz_files(each) or (each / "train").is_dir()
        ),
        None,
    )
    return DataError(
        place,
        "",
        f"neither a {MANIFEST} nor .npz files, but {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
        EXPECTED,
        f"Give the folder within: --data {shlex.quote(str(inside))}." if inside else "Give the right --data DIR.",
    )
