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
ONE_POOL = "all"  # the name of the only part where there are no folders train/, val/, test/
FOREIGN = (".h5", ".hdf5", ".he5", ".mat")  # what `ris-fast convert` reads with a mapping
EXPECTED = "a folder of shards from `ris-fast simulate` or the original pipeline, or one .npz file"


def guess_source(path: str) -> str:
    """simulate without a path, shards where a manifest lies, npz where such files do. Raises: DataError."""
    if not path:
        return "simulate"
    folder = Path(path)
    check_data_path(folder)
    with _readable(folder):
        if (folder / MANIFEST).is_file():
            return "shards"
        if folder.is_file() or npz_files(folder) or any((folder / split).is_dir() for split in SPLITS):
            return "npz"
        raise _no_data(folder)


def check_data_path(path: Path) -> None:
    """Something is there that could be a data set. Raises: DataError that says what is there instead."""
    with _readable(path):
        if not path.exists():
            raise _not_there(path)
        if not path.is_dir() and path.suffix != ".npz":
            raise _wrong_file(path)
        if path.is_dir() and not any(path.iterdir()):
            raise DataError(path, "", "an empty folder", EXPECTED, "Give the right --data DIR, or generate the data.")


def find_npz(path: Path) -> dict[str, list[Path]]:
    """Shard files by split, or all under one name where there is no train/ folder. Raises: DataError."""
    if path.is_file():
        return {ONE_POOL: [path]}
    folders = {split: npz_files(path / split) for split in SPLITS if (path / split).is_dir()}
    if not folders:
        files = npz_files(path)
        if not files:
            raise DataError(
                path,
                "",
                "no .npz file and no train/ folder",
                "shards, flat or in train/, val/, test/",
                "Give the right --data DIR, or generate the data.",
            )
        return {ONE_POOL: files}
    for split in ("train", "val"):
        if not folders.get(split):
            what = "an empty folder" if split in folders else "no such folder"
            raise DataError(
                path / split,
                "",
                what,
                f"at least one {split} shard (.npz)",
                "Add it, or put all shards into one flat folder to have them split by number.",
            )
    return {split: files for split, files in folders.items() if files}


def npz_files(folder: Path) -> list[Path]:
    """The shards in a folder, sorted. Hidden files are no shards: other systems leave `._NAME.npz` beside them."""
    return sorted(path for path in folder.glob("*.npz") if not path.name.startswith("."))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as problem:
        raise DataError(
            path,
            "",
            f"a path that cannot be read ({problem.strerror})",
            EXPECTED,
            "Get the right to read it, or give another --data DIR.",
        ) from None


def _not_there(path: Path) -> DataError:
    unfinished = path.with_name(path.name + ".partial")
    if (unfinished / PLAN).is_file():
        return _unfinished(path, f"no such folder, but unfinished work in {unfinished.name}")
    return DataError(
        path,
        "",
        "no such file or folder",
        EXPECTED,
        "Where it was moved, give its present path: --data DIR, or data.path in a run's config.toml.",
    )


def _unfinished(path: Path, found: str) -> DataError:
    return DataError(
        path,
        "",
        found,
        "a whole data set",
        "Run the same `ris-fast simulate` command again, or convert: it continues where it stopped.",
    )


def _wrong_file(path: Path) -> DataError:
    if path.suffix.lower() in FOREIGN:
        return _to_convert(path, "a file that has to be converted first")
    own = path.suffix == ".safetensors" or path.name == MANIFEST
    found = "one file of a data set" if own else "a file that is no .npz"
    return DataError(
        path,
        "",
        found,
        EXPECTED,
        f"Give the folder: --data {shlex.quote(str(path.parent))}." if own else "Give the right --data DIR.",
    )


def _to_convert(path: Path, found: str) -> DataError:
    data = shlex.quote(str(path))
    return DataError(
        path,
        "",
        found,
        EXPECTED,
        f"Convert it: `ris-fast convert --new-map FILE.toml --data {data}` begins a mapping file that says which array"
        f" is what, `ris-fast convert --map FILE.toml --data {data} --out DIR` makes the folder to train on.",
    )


def _no_data(path: Path) -> DataError:
    """For a folder with things in it, none of which is a data set."""
    if (path / PLAN).is_file():
        return _unfinished(path, "unfinished work of `ris-fast simulate` or convert")
    if any(path.glob("*.safetensors")):
        return DataError(
            path,
            "",
            f"safetensors shards without a {MANIFEST}",
            "both, as `ris-fast simulate` writes them",
            "Copy the whole folder, or run `ris-fast simulate` again.",
        )
    names = sorted(each.name for each in path.iterdir())
    if foreign := [name for name in names if name.lower().endswith(FOREIGN)]:
        return _to_convert(path, f"files that have to be converted first ({foreign[0]})")
    inside = next(
        (
            each
            for each in sorted(path.iterdir())
            if (each / MANIFEST).is_file() or npz_files(each) or (each / "train").is_dir()
        ),
        None,
    )
    return DataError(
        path,
        "",
        f"neither a {MANIFEST} nor .npz files, but {', '.join(names[:4])}"
        + (f" and {len(names) - 4} more" if len(names) > 4 else ""),
        EXPECTED,
        f"Give the folder within: --data {shlex.quote(str(inside))}." if inside else "Give the right --data DIR.",
    )
