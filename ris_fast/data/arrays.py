"""Arrays inside .npz and .safetensors files, by their offset in the file: read in order once, or memory-mapped.

An uncompressed .npz is a zip whose members lie in the file byte for byte, so a member can be mapped at its offset.
numpy's own `mmap_mode` is silently ignored for .npz, and `z[key][i]` decodes the whole array for one row.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ris_fast.data.errors import DataError

COPY_AGAIN = "A copy or a writer that stopped early leaves such a file: copy or generate it again."
PIECE = 2**20
MOST_DEFLATED = 1040  # bytes from one compressed byte; deflate reaches 1032
_SAFETENSORS_DTYPES = {
    "F32": "<f4",
    "F64": "<f8",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "U8": "|u1",
    "C64": "<c8",
}


@contextmanager
def damage(path: Path, key: str, found: str, expected: str) -> Iterator[None]:
    """Turns whatever a parser raises on damaged bytes into a DataError: `found` and what the parser said.

    zipfile, numpy and json promise no list of what they raise on such bytes; a lack of memory is not the file's fault.
    """
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as problem:
        said = (str(problem) or type(problem).__name__).splitlines()[0][:160]
        raise DataError(path, key, f"{found} ({said})", expected, COPY_AGAIN) from None


@dataclass(frozen=True)
class StoredArray:
    """One array of a file. `offset` is where its bytes start, None if they are compressed."""

    file: Path
    key: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int | None
    member: str = ""
    header: int = 0
    fortran: bool = False

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)

    @property
    def decoded_bytes(self) -> int:
        """Bytes that reading it in rows takes beyond the rows: compressed columns must be decoded whole."""
        return self.bytes if self.fortran and self.offset is None else 0

    def map(self) -> np.ndarray:
        """The whole array without reading it. Only where `offset` is not None."""
        order = "F" if self.fortran else "C"
        if self.bytes == 0:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape, order)

    def chunks(self, rows: int, limit: int) -> Iterator[np.ndarray]:
        """The first `limit` rows in order, `rows` at a time.

        Each byte is read once, of an array in Fortran order twice. A zip's checksum is checked at the array's end.

        Raises: DataError where the bytes end early, do not decompress, or do not match the checksum.
        """
        sizes = [min(rows, limit - start) for start in range(0, limit, rows)]
        with damage(self.file, self.key, "damaged bytes", "an intact array"):
            if not self.fortran:
                yield from self._streamed(sizes, limit) if self.member else self._plain(sizes)
                return
            whole = self._whole() if self.member else self.map()
            yield from (np.array(whole[i * rows : i * rows + size]) for i, size in enumerate(sizes))

    def _streamed(self, sizes: list[int], limit: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as stream:
            stream.read(self.header)
            for size in sizes:
                yield self._chunk(stream.read(size * self.row_bytes), size)
            if limit == self.shape[0] and stream.read(1):
                raise zipfile.BadZipFile("more bytes than the header announces")

    def _plain(self, sizes: list[int]) -> Iterator[np.ndarray]:
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.offset or 0)
            for size in sizes:
                chunk = np.empty((size, *self.shape[1:]), self.dtype)
                if chunk.nbytes and file.readinto(memoryview(chunk.reshape(-1).view(np.uint8))) != chunk.nbytes:
                    raise EOFError(f"the file ends within the {size} rows")
                yield chunk

    def _chunk(self, raw: bytes, rows: int) -> np.ndarray:
        if len(raw) != rows * self.row_bytes:
            raise EOFError(f"{len(raw)} bytes where {rows} rows need {rows * self.row_bytes}")
        return np.frombuffer(bytearray(raw), self.dtype).reshape(rows, *self.shape[1:])

    def _whole(self) -> np.ndarray:
        """An array in Fortran order, whose rows lie apart: mapped once its checksum is seen to be right, or decoded."""
        with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as stream:
            stream.read(self.header)
            if self.offset is None:
                return np.frombuffer(stream.read(), self.dtype).reshape(self.shape, order="F")
            while stream.read(PIECE):
                pass
        return self.map()


def npz_arrays(path: Path, wanted: Collection[str] | None = None) -> dict[str, StoredArray]:
    """The `wanted` arrays of an .npz by key (None: all), from the headers alone.

    Other keys belong to other tools: not even their headers are read. Raises: DataError.
    """
    with _opened(path) as archive:
        return {
            key: _npz_array(path, archive, info)
            for key, info in _members(archive).items()
            if wanted is None or key in wanted
        }


def npz_keys(path: Path) -> list[str]:
    """The names of all arrays of an .npz. Raises: DataError."""
    with _opened(path) as archive:
        return sorted(_members(archive))


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    return {i.filename.removesuffix(".npy"): i for i in archive.infolist() if i.filename.endswith(".npy")}


@contextmanager
def _opened(path: Path) -> Iterator[zipfile.ZipFile]:
    refuse_other_than_file(path)
    with damage(
        path, "", f"{path.stat().st_size} bytes that are no readable .npz", "a zip archive as numpy.savez writes it"
    ):
        with zipfile.ZipFile(path) as archive:
            yield archive


def refuse_other_than_file(path: Path) -> None:
    """A shard is a file with something in it. Raises: DataError, also for a link to nothing."""
    expected = "a shard of scenes"
    try:
        if path.is_symlink() and not path.exists():
            raise DataError(
                path,
                "",
                f"a link to {path.readlink()}, which is not there",
                expected,
                "Restore what it links to, or remove the link.",
            )
        if not path.is_file():
            raise DataError(
                path,
                "",
                "a folder" if path.is_dir() else "something that is no file",
                expected,
                "Remove it, or give it another name.",
            )
        with open(path, "rb") as file:
            if not file.read(1):
                raise DataError(path, "", "an empty file (0 bytes)", expected, COPY_AGAIN)
    except OSError as problem:
        raise DataError(
            path,
            "",
            f"a file that cannot be read ({problem.strerror})",
            expected,
            "Get the right to read it, or copy it again.",
        ) from None


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    """Read the zip's local header and numpy's header of one member."""
    key = info.filename.removesuffix(".npy")
    stored = info.compress_type == zipfile.ZIP_STORED
    if not stored and info.compress_type != zipfile.ZIP_DEFLATED:
        raise DataError(
            path,
            key,
            f"bytes compressed by method {info.compress_type}",
            "stored or deflated ones, as numpy writes them",
            "Write the shard again with numpy.savez.",
        )
    with damage(path, key, "no readable numpy header", "an array as numpy.savez writes it"):
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            header = stream.tell()
        if min(shape, default=0) < 0:
            raise ValueError(f"shape {shape}")
    announced = header + dtype.itemsize * math.prod(shape)
    if announced != info.file_size and not dtype.hasobject:
        raise DataError(
            path, key, f"{info.file_size} bytes", f"{announced} bytes for shape {shape} of {dtype}", COPY_AGAIN
        )
    if info.file_size > MOST_DEFLATED * info.compress_size and not stored:
        raise DataError(
            path,
            key,
            f"{info.file_size} bytes from {info.compress_size} compressed ones",
            f"at most {MOST_DEFLATED} from each",
            COPY_AGAIN,
        )
    offset = _data_offset(path, key, info, header) if stored else None
    return StoredArray(path, key, dtype, tuple(shape), offset, info.filename, header, fortran and len(shape) > 1)


def _data_offset(path: Path, key: str, info: zipfile.ZipInfo, header: int) -> int:
    """Where the array's bytes start: after the zip's local header (30 bytes, a name, an extra field) and numpy's."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(lengths.sum()) + header
    if offset - header + info.file_size > path.stat().st_size:
        raise DataError(path, key, "a member that runs past the end of the file", "all of its bytes", COPY_AGAIN)
    return offset


def safetensors_arrays(path: Path, wanted: Collection[str] | None = None) -> dict[str, StoredArray]:
    """The `wanted` tensors of a .safetensors file by name (None: all), from its header alone. Raises: DataError.

    Source: the format's own description: 8 bytes little-endian length, that much JSON, then the tensors' bytes.
    """
    size = path.stat().st_size if path.is_file() else 0
    with damage(path, "", "no readable safetensors header", "the header of a safetensors file"):
        header, length = _safetensors_header(path)
        chosen = {key: item for key, item in header.items() if wanted is None or key in wanted}
        found = [_tensor(path, key, item, 8 + length) for key, item in chosen.items()]
    for array in found:
        if array.offset + array.bytes > size:
            raise DataError(
                path, array.key, f"a file of {size} bytes", f"at least {array.offset + array.bytes} bytes", COPY_AGAIN
            )
    return {a.key: a for a in found}


def safetensors_keys(path: Path) -> list[str]:
    """The names of all tensors of a .safetensors file whose header is readable."""
    return sorted(_safetensors_header(path)[0])


def _safetensors_header(path: Path) -> tuple[dict, int]:
    """What the file says of its tensors, and how many bytes it takes to say so."""
    refuse_other_than_file(path)
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(length, path.stat().st_size)))
    header.pop("__metadata__", None)
    return header, length


def _tensor(path: Path, key: str, item: dict, start: int) -> StoredArray:
    """One entry of a header. Raises: any exception for one that is none."""
    shape, offset = tuple(item["shape"]), item["data_offsets"][0]
    if any(type(number) is not int or number < 0 for number in (*shape, offset)):
        raise ValueError(f"shape {shape} at {offset}")
    if item["dtype"] not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise DataError(path, key, f"type {item['dtype']}", f"one of {known}", "Convert it, and write the file again.")
    return StoredArray(path, key, np.dtype(_SAFETENSORS_DTYPES[item["dtype"]]), shape, start + offset)
