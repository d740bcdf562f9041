"""Names, shapes and types of a checkpoint's tensors, from the headers of its files: milliseconds, no weights.

A file is read through `Stored`, so that it may be on this disk (`LocalFile`) or on a hub (`placement.hub`).

A safetensors file is 8 bytes of little-endian header length, a JSON header, and the tensors' bytes. A GGUF file
(version 2 or 3, little-endian) is "GGUF", its version, the counts of tensors and of metadata entries, the metadata
(name, type, value), and for each tensor its name, dimensions (fastest first), type and place; then come the bytes.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Protocol

from placement.errors import PlacementError

SAFETENSORS, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000
_FIRST_BYTES = 100_000
"""Read at once: most headers are shorter, and on a hub a second request costs more than these bytes."""
_SAMPLE_BYTES = 64 * 1024

LONG_ARRAY = 256
"""GGUF arrays of more elements (a tokenizer's) are counted, not kept."""

_GGUF_VALUES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_MOST_DIMENSIONS = 4
# ggml's types, by their number in a file: name, elements of a block, bytes of a block.
_GGML_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip


class Stored(Protocol):
    """A file of a checkpoint. `str()` of it says which, in errors."""

    @property
    def name(self) -> str:
        """Without its folder."""
        ...

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer where the file ends before.

        Raises:
            OSError: it can't be read.
            PlacementError: the same, with the mend.
        """
        ...


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file on this disk."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        """Without its folder."""
        return self.path.name

    def read(self, offset: int, length: int) -> bytes:
        """See `Stored`."""
        with self.path.open("rb") as file:
            file.seek(offset)
            return file.read(length)


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One stored tensor."""

    dtype: str
    """As the file names it: "BF16", "I32", "Q4_K"."""
    shape: tuple[int, ...]
    """[out, in] for a linear's weight, whatever the file's own order."""
    bytes: int
    file: Stored
    offset: int
    """Of its first byte in `file`."""

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


Headers = Mapping[str, TensorHeader]


@dataclass(frozen=True, slots=True)
class Gguf:
    """The header of a GGUF file."""

    metadata: Mapping[str, Any]
    """An array of more than `LONG_ARRAY` elements is there as its length alone, under the key with "#" before it."""
    tensors: Headers


def read_safetensors(folder: Path) -> Headers:
    """The tensors of the checkpoint in `folder`, by name; empty when none, or not all of its files, are there.

    Raises:
        PlacementError: a file that is there is damaged.
    """
    files = [folder / SAFETENSORS]
    if not files[0].is_file():
        files = _indexed(folder / INDEX)
    if not files or not all(file.is_file() for file in files):
        return {}
    return {name: header for file in files for name, header in read_safetensors_file(LocalFile(file)).items()}


def _indexed(path: Path) -> list[Path]:
    if not path.is_file():
        return []
    return [path.parent / name for name in read_index(LocalFile(path), path.stat().st_size)]


def read_index(file: Stored, size: int) -> list[str]:
    """Names of the safetensors files of a checkpoint in several, in order.

    Args:
        size: bytes to read: the file's, or the most that it may have.

    Raises:
        PlacementError: not a whole index.
    """
    try:
        return sorted(set(json.loads(file.read(0, size))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PlacementError(f"{file} can't be read: {error!r}; fetch the model again") from None


def read_safetensors_file(file: Stored) -> dict[str, TensorHeader]:
    """The tensors of one safetensors file, by name.

    Raises:
        PlacementError: not a whole header.
    """
    try:
        start = file.read(0, _FIRST_BYTES)
        length = int.from_bytes(start[:8], "little")
        if not 2 <= length <= _MAX_HEADER_BYTES:
            raise ValueError(f"the header would be {length} bytes")
        end = 8 + length
        entries = json.loads(start[8:end] if end <= len(start) else file.read(0, end)[8:])
        entries.pop("__metadata__", None)
        return {name: _entry(file, end, entry) for name, entry in entries.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlacementError(f"{file} is not a whole safetensors file: {error}; fetch the model again") from None


def _entry(file: Stored, begin: int, entry: Mapping[str, Any]) -> TensorHeader:
    first, past = entry["data_offsets"]
    return TensorHeader(str(entry["dtype"]), tuple(entry["shape"]), past - first, file, begin + first)


def same_values(one: TensorHeader, other: TensorHeader) -> bool:
    """Whether two stored tensors hold the same values, as far as type, shape and three samples of their bytes tell.

    Different weights differ from their first numbers on; equal samples of 64 KiB at the start, middle and end are taken
    for equality, which spares reading gigabytes.
    """
    if (one.dtype, one.shape, one.bytes) != (other.dtype, other.shape, other.bytes):
        return False
    starts = {0, max(0, one.bytes // 2 - _SAMPLE_BYTES // 2), max(0, one.bytes - _SAMPLE_BYTES)}
    return all(_sample(one, start) == _sample(other, start) for start in sorted(starts))


def _sample(tensor: TensorHeader, start: int) -> bytes:
    return tensor.file.read(tensor.offset + start, min(_SAMPLE_BYTES, tensor.bytes - start))


def read_gguf(path: Path) -> Gguf:
    """The header of a GGUF file.

    Raises:
        PlacementError: no such file, or not a whole GGUF header.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).read()
    except (OSError, ValueError, struct.error, UnicodeDecodeError) as error:
        raise PlacementError(f"{path} is not a whole GGUF file: {error}; fetch it again") from None


class _Cursor:
    """A cursor over a GGUF file's header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def read(self) -> Gguf:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not start with the letters GGUF")
        self.at = 4
        if (version := self.number("I")) not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are known")
        tensors, entries = self.number("Q"), self.number("Q")
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self.text()
            value = self.value(self.number("I"))
            metadata.update({f"#{key}": value.count} if isinstance(value, _Counted) else {key: value})
        found = [self.tensor() for _ in range(tensors)]
        alignment = int(metadata.get("general.alignment", 32))
        begin = -(-self.at // alignment) * alignment
        return Gguf(
            metadata,
            {
                n: TensorHeader(kind, shape, size, LocalFile(self.path), begin + at)
                for n, kind, shape, size, at in found
            },
        )

    def number(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self.data, self.at)[0]
        self.at += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        length = self.number("Q")
        begin, self.at = self.at, self.at + length
        if self.at > len(self.data):
            raise ValueError("it is cut short")
        return self.data[begin : self.at].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _GGUF_STRING:
            return self.text()
        if kind == _GGUF_ARRAY:
            return self.array()
        if kind not in _GGUF_VALUES:
            raise ValueError(f"metadata of type {kind} is not known")
        return self.number(_GGUF_VALUES[kind])

    def array(self) -> Any:
        kind, count = self.number("I"), self.number("Q")
        if count <= LONG_ARRAY:
            return [self.value(kind) for _ in range(count)]
        if kind == _GGUF_STRING:
            for _ in range(count):
                self.skip(self.number("Q"))
        elif kind in _GGUF_VALUES:
            self.skip(count * struct.calcsize(f"<{_GGUF_VALUES[kind]}"))
        else:
            raise ValueError(f"an array of {count} elements of type {kind} is not known")
        return _Counted(count)

    def skip(self, length: int) -> None:
        self.at += length
        if self.at > len(self.data):
            raise ValueError("it is cut short")

    def tensor(self) -> tuple[str, str, tuple[int, ...], int, int]:
        name, dimensions = self.text(), self.number("I")
        if dimensions > _GGUF_MOST_DIMENSIONS:
            raise ValueError(f"tensor {name} would have {dimensions} dimensions")
        shape = tuple(reversed([self.number("Q") for _ in range(dimensions)]))
        kind, offset = self.number("I"), self.number("Q")
        if kind not in _GGML_TYPES:
            raise ValueError(f"tensor {name} has type {kind}, which is not known")
        type_name, per_block, block_bytes = _GGML_TYPES[kind]
        return name, type_name, shape, prod(shape) // per_block * block_bytes, offset


@dataclass(frozen=True, slots=True)
class _Counted:
    """A long array, not kept."""

    count: int
