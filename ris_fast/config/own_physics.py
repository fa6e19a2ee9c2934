"""Files and code of the user's own that a task names: read, checked by themselves, known by their content.

Legend: L snapshots, N RIS elements.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ris_fast.config.section import ConfigError
from ris_fast.config.spelling import did_you_mean
from ris_fast.config.user_code import load_reference, source_hash

if TYPE_CHECKING:
    import numpy as np

POSITIONS, CODES = "task.elements_file", "task.codes_file"
DIGITS = 16  # of a SHA-256 that are kept: enough to notice a change
TEXT, ARRAYS = (".csv", ".txt"), (".npy", ".npz")
ENDINGS = {POSITIONS: (*ARRAYS, *TEXT), CODES: (*ARRAYS, ".safetensors")}
NAMES = {POSITIONS: "positions", CODES: "codes"}  # of the array in a file of several
FORMS = {
    POSITIONS: "positions (N, 2): x to the right and y up, in metres",
    CODES: "a code book: complex (L, N), its real pairs (L, N, 2), or phases in rad (L, N)",
}
MOST_PHASE = 13.0  # rad, two turns: beyond, phases may be degrees
MOST_MODULUS = 1 + 1e-4  # of a code: float16 rounds to that


def file_hash(setting: str, path: str) -> str:
    """The first digits of the SHA-256 of a file. Raises: ConfigError where it cannot be read."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:DIGITS]
    except OSError as error:
        raise _unreadable(setting, path, error) from None


def function_hash(setting: str, reference: str) -> str:
    """The same of the file that defines a function, with the function's name."""
    return _hash_of(load_function(setting, reference), setting, reference)


def load_function(setting: str, reference: str) -> Any:
    """The function that a setting names."""
    return load_reference(setting, reference, "a function", sole=callable)


def _hash_of(function: Any, setting: str, reference: str) -> str:
    source = source_hash(function)
    if not source:
        raise ConfigError(f"{setting} = '{reference}': its source cannot be read. Name a function in a Python file.")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return hashlib.sha256(f"{source}:{name}".encode()).hexdigest()[:DIGITS]


def unchanged_file(setting: str, path: str, recorded: str) -> None:
    """Raises: ConfigError where a file is not there, or is not as it was when its content was recorded."""
    _unchanged(setting, path, recorded, file_hash(setting, path), "file")


def unchanged_function(setting: str, reference: str, recorded: str) -> Any:
    """The function. Raises: ConfigError where it is not there, or its source is not as it was."""
    function = load_function(setting, reference)
    _unchanged(setting, reference, recorded, _hash_of(function, setting, reference), "source")
    return function


def _unchanged(setting: str, place: str, recorded: str, found: str, what: str) -> None:
    if found != recorded:
        raise ConfigError(
            f"{setting} = '{place}': the {what} has changed, its content is {found} and this run or data set was made"
            f" with {recorded}. Put the earlier {what} back; for a new run, give --set {setting}={place}."
        )


def elements_in(path: str) -> int:
    """N of a file of positions."""
    return len(read_positions(path))


def read_positions(path: str) -> np.ndarray:
    """x and y of the elements, (N, 2) float64 in metres. Raises: ConfigError, one line with the file's name."""
    import numpy as np

    found = _read(POSITIONS, path)
    if found.dtype.kind not in "fiu" or found.ndim != 2 or found.shape[1] not in (2, 3) or len(found) < 2:
        raise _wrong(POSITIONS, path, f"is {_said(found)}", _transposed(found))
    found = found.astype(np.float64)
    _finite(POSITIONS, path, found)
    if found.shape[1] == 3 and (off := np.flatnonzero(found[:, 2])).size:
        raise _wrong(
            POSITIONS,
            path,
            f"has z = {found[off[0], 2]:g} m at element {off[0]}",
            "The array lies in the plane z = 0: turn it there, or leave the third column out.",
        )
    found = found[:, :2]
    order = np.lexsort(found.T)
    gaps = np.abs(np.diff(found[order], axis=0)).max(1)
    if (same := np.flatnonzero(gaps == 0)).size:
        pair = sorted(order[same[0] : same[0] + 2].tolist())
        raise _wrong(
            POSITIONS, path, f"has elements {pair[0]} and {pair[1]} in one place", "Give each element its own."
        )
    return found


def read_codes(path: str) -> np.ndarray:
    """A code book (L, N), complex128. Raises: ConfigError, one line with the file's name."""
    import numpy as np

    found = _read(CODES, path)
    if found.dtype.kind in "iub" and found.ndim == 2 or found.dtype.kind == "f" and _whole(found):
        raise _wrong(
            CODES,
            path,
            "holds whole numbers, which are no phases in rad (bits, or degrees?)",
            "Write exp(1j * phase).",
        )
    real_pairs = found.dtype.kind == "f" and found.ndim == 3 and found.shape[2] == 2
    if not (real_pairs or found.dtype.kind in "fc" and found.ndim == 2) or not found.size:
        raise _wrong(CODES, path, f"is {_said(found)}")
    _finite(CODES, path, found)
    wide = found.astype(np.complex128 if found.dtype.kind == "c" else np.float64)
    codes = wide if found.dtype.kind == "c" else wide[..., 0] + 1j * wide[..., 1] if real_pairs else np.exp(1j * wide)
    modulus = np.abs(codes)
    if modulus.max() > MOST_MODULUS:
        row, element = (int(each) for each in np.unravel_index(modulus.argmax(), modulus.shape))
        raise _wrong(
            CODES,
            path,
            f"has modulus {modulus.max():.4g} at code {row}, element {element}",
            "A passive element has at most 1: divide the codes by their largest modulus.",
        )
    if (dark := np.flatnonzero(modulus.max(1) == 0)).size:
        raise _wrong(CODES, path, f"is zero at every element of code {dark[0]}", "Leave that code out.")
    return codes


def doubt_of_codes(path: str) -> str:
    """What a person should know of a code book that can be read; empty where there is nothing."""
    found = _read(CODES, path)
    if found.dtype.kind != "f" or found.ndim != 2 or (most := float(abs(found).max())) <= MOST_PHASE:
        return ""
    return f"{CODES} = '{path}' holds phases up to {most:.4g}, taken as radians. If they are degrees, convert them"


def _whole(found: np.ndarray) -> bool:
    """Whether real numbers (L, N) are whole and not all zero, as phases in rad never are."""
    return found.ndim == 2 and found.size > 0 and bool((found == found.round()).all() and found.any())


def _read(setting: str, path: str) -> Any:
    """The array of a file, whatever it is. Raises: ConfigError."""
    import numpy as np

    file, ending = Path(path), Path(path).suffix.lower()
    if ending not in ENDINGS[setting]:
        raise _wrong(setting, path, f"ends in '{ending}'", f"Give a file that ends in {_or(ENDINGS[setting])}.")
    try:
        if ending == ".npy":
            return np.load(file, allow_pickle=False)
        if ending == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                return arrays[_name(setting, path, arrays.files)]
        if ending in TEXT:
            return _table(file)
        from safetensors.numpy import load_file

        arrays = load_file(file)
        return arrays[_name(setting, path, list(arrays))]
    except ConfigError:
        raise
    except OSError as error:
        raise _unreadable(setting, path, error) from None
    except Exception as error:  # each format has its own for a file that is none
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        said = "it is none, or holds Python objects" if "pickle" in said else said
        raise _wrong(setting, path, f"cannot be read as {ending} ({said})") from None


def _table(file: Path) -> Any:
    """Numbers in rows, with commas, semicolons or spaces between them, below at most one row of names."""
    import numpy as np

    lines = [line.partition("#")[0].strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    rows = [(number, _cells(line)) for number, line in enumerate(lines, 1) if line]
    if rows and not any(map(_is_number, rows[0][1])):
        rows = rows[1:]
    if not rows:
        raise ValueError("it holds no numbers")
    wide = {len(row) for _, row in rows}
    if len(wide) > 1:
        number, row = next((number, row) for number, row in rows if len(row) != len(rows[0][1]))
        raise ValueError(f"line {number} has {len(row)} numbers, the first one {len(rows[0][1])}")
    for number, row in rows:
        if other := [each for each in row if not _is_number(each)]:
            raise ValueError(f"line {number}: '{other[0]}' is no number")
    return np.array([[float(each) for each in row] for _, row in rows])


def _cells(line: str) -> list[str]:
    between = next((each for each in (";", ",") if each in line), None)
    return [each.strip() for each in line.split(between)]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _name(setting: str, path: str, names: list[str]) -> str:
    wanted = NAMES[setting]
    if wanted in names or len(names) == 1:
        return wanted if wanted in names else names[0]
    raise _wrong(setting, path, f"holds {', '.join(names) or 'no array'}", f"Call the one that is meant '{wanted}'.")


def _finite(setting: str, path: str, found: Any) -> None:
    import numpy as np

    if (wrong := np.argwhere(~np.isfinite(found))).size:
        at = ", ".join(map(str, wrong[0]))
        raise _wrong(setting, path, f"has {found[tuple(wrong[0])]} at [{at}]", "Every entry is a finite number.")


def _said(found: Any) -> str:
    return f"{found.dtype} of shape {found.shape}"


def _transposed(found: Any) -> str:
    return "Transpose it." if found.ndim == 2 and found.shape[0] in (2, 3) else ""


def _or(words: tuple[str, ...]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _wrong(setting: str, path: str, found: str, todo: str = "") -> ConfigError:
    return ConfigError(f"{setting} = '{path}' {found}; expected {FORMS[setting]}. {todo}".rstrip())


def _unreadable(setting: str, path: str, error: OSError) -> ConfigError:
    file = Path(path)
    if isinstance(error, FileNotFoundError):
        near = did_you_mean(file.name, _beside(file))
        return ConfigError(
            f"{setting} = '{path}': there is no such file.{near} Give its place with --set {setting}=FILE, or in the"
            " config.toml of a run that has no --set: the place may change, the content may not."
        )
    return ConfigError(f"{setting} = '{path}' cannot be read: {error.strerror}. Give {FORMS[setting]}.")


def _beside(file: Path) -> list[str]:
    try:
        return [
            each for each in os.listdir(file.parent) if Path(each).suffix.lower() in (*ARRAYS, *TEXT, ".safetensors")
        ]
    except OSError:
        return []
