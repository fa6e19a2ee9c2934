"""Arrays inside .npz and .safetensors files, by their place in the file: read in order once, or memory-mapped.

An uncompressed .npz is a zip whose members lie in the file byte for byte, so a member can be mapped at its offset.
numpy's own `mmap_mode` is silently ignored for .npz, and `z[key][i]` decodes the whole array for one row.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator

import numpy as np

from ris_fast.data.errors import DataError

COPY_AGAIN = "A copy or a writer that stopped early leaves such a file: copy or generate it again."
_SAFETENSORS_DTYPES = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "U8": "|u1"}


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

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))

    @property
    def bytes(self) -> int:
        return self.row_bytes * (self.shape[0] if self.shape else 1)

    def map(self) -> np.ndarray:
        """The whole array without reading it. Only where `offset` is not None."""
        if self.bytes == 0:
            return np.empty(self.shape, self.dtype)
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)

    def chunks(self, rows: int, limit: int) -> Iterator[np.ndarray]:
        """The first `limit` rows in order, `rows` at a time, each byte read once.

        A zip's checksum is checked at the array's end.

        Raises: DataError where the bytes end early, do not decompress, or do not match the checksum.
        """
        sizes = [min(rows, limit - start) for start in range(0, limit, rows)]
        if not self.member:
            mapped = self.map()
            yield from (np.array(mapped[i * rows:i * rows + size]) for i, size in enumerate(sizes))
            return
        try:
            with zipfile.ZipFile(self.file) as archive, archive.open(self.member) as stream:
                stream.read(self.header)
                for size in sizes:
                    yield self._chunk(stream.read(size * self.row_bytes), size)
                if limit == self.shape[0] and stream.read(1):
                    raise zipfile.BadZipFile("more bytes than the header announces")
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError) as problem:
            raise DataError(self.file, self.key, f"damaged bytes ({problem})", "an intact array", COPY_AGAIN) from None

    def _chunk(self, raw: bytes, rows: int) -> np.ndarray:
        if len(raw) != rows * self.row_bytes:
            raise EOFError(f"{len(raw)} bytes where {rows} rows need {rows * self.row_bytes}")
        return np.frombuffer(bytearray(raw), self.dtype).reshape(rows, *self.shape[1:])


def npz_arrays(path: Path) -> dict[str, StoredArray]:
    """Every array of an .npz by key, from the headers alone. Raises: DataError."""
    _refuse_empty(path)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if i.filename.endswith(".npy")]
            found = [_npz_array(path, archive, info) for info in infos]
    except (zipfile.BadZipFile, OSError) as problem:
        raise DataError(path, "", f"{path.stat().st_size} bytes that are no readable .npz ({problem})",
                        "a zip archive as numpy.savez writes it", COPY_AGAIN) from None
    return {a.key: a for a in found}


def _refuse_empty(path: Path) -> None:
    if path.stat().st_size == 0:
        raise DataError(path, "", "an empty file (0 bytes)", "a shard of scenes", COPY_AGAIN)


def _npz_array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> StoredArray:
    """Read the zip's local header and numpy's header of one member."""
    key = info.filename.removesuffix(".npy")
    try:
        with archive.open(info) as stream:
            version = np.lib.format.read_magic(stream)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read(stream)
            header = stream.tell()
    except (ValueError, EOFError, zlib.error, zipfile.BadZipFile) as problem:
        raise DataError(path, key, f"no readable numpy header ({problem})", "an array as numpy.savez writes it",
                        COPY_AGAIN) from None
    if fortran and len(shape) > 1:
        raise DataError(path, key, "an array in Fortran order", "C order",
                        "Write it again from numpy.ascontiguousarray(array).")
    announced = header + dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if announced != info.file_size and not dtype.hasobject:
        raise DataError(path, key, f"{info.file_size} bytes", f"{announced} bytes for shape {shape} of {dtype}",
                        COPY_AGAIN)
    offset = _data_offset(path, key, info, header) if info.compress_type == zipfile.ZIP_STORED else None
    return StoredArray(path, key, dtype, tuple(shape), offset, info.filename, header)


def _data_offset(path: Path, key: str, info: zipfile.ZipInfo, header: int) -> int:
    """Where the array's bytes start: after the zip's local header (30 bytes, a name, an extra field) and numpy's."""
    with open(path, "rb") as file:
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    offset = info.header_offset + 30 + int(lengths.sum()) + header
    if offset - header + info.file_size > path.stat().st_size:
        raise DataError(path, key, "a member that runs past the end of the file", "all of its bytes", COPY_AGAIN)
    return offset


def safetensors_arrays(path: Path) -> dict[str, StoredArray]:
    """Every tensor of a .safetensors file by name, from its header alone. Raises: DataError.

    Source: the format's own description: 8 bytes little-endian length, that much JSON, then the tensors' bytes.
    """
    _refuse_empty(path)
    size = path.stat().st_size
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        header.pop("__metadata__", None)
        found = [StoredArray(path, key, np.dtype(_SAFETENSORS_DTYPES[item["dtype"]]), tuple(item["shape"]),
                             8 + length + item["data_offsets"][0]) for key, item in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as problem:
        raise DataError(path, "", f"no readable safetensors header ({type(problem).__name__}: {problem})"[:200],
                        "a shard written by `ris-fast simulate`", COPY_AGAIN) from None
    for array in found:
        if array.offset is None or array.offset + array.bytes > size:
            raise DataError(path, array.key, f"a file of {size} bytes",
                            f"at least {(array.offset or 0) + array.bytes} bytes", COPY_AGAIN)
    return {a.key: a for a in found}
