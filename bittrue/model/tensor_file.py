"""Reads one safetensors file as memory-mapped tensors: nothing is copied, every byte range is checked."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittrue.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_MAX_HEADER_BYTES = 100 * 10**6  # the format's own limit


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies: bytes begin..end of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of a safetensors file in file order. Raises CheckpointError naming file and tensor."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise _bad(path, f"the header takes {length} bytes, the file has {size}: it is truncated")
            text = file.read(length)
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _bad(path, "its header is not a JSON object")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, value, 8 + length) for name, value in header.items()]
    entries.sort(key=lambda e: (e.begin, e.end))
    _check_cover(path, entries, 8 + length, size)
    return tuple(entries)


def map_tensors(path: Path, entries: tuple[TensorEntry, ...]) -> dict[str, Tensor]:
    """Tensors by name as views of the mapped file; only one whose offset does not fit its dtype is copied.

    The mapping is private: a write to a tensor never reaches the file.
    """
    data = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    out: dict[str, Tensor] = {}
    for entry in entries:
        dtype = DTYPES[entry.dtype]
        piece = data[entry.begin : entry.end]
        if entry.begin % dtype.itemsize:
            piece = piece.clone()
        out[entry.name] = piece.view(dtype).view(entry.shape)
    return out


def _bad(path: Path, fact: str, tensor: str | None = None) -> CheckpointError:
    what = f"{path}: tensor {tensor}: {fact}" if tensor else f"{path}: {fact}"
    return CheckpointError(f"{what}; fetch or write the file again", file=str(path), tensor=tensor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice} occurs twice")
    return out


def _entry(path: Path, name: str, value: object, start: int) -> TensorEntry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _bad(path, "its header entry needs dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in DTYPES:
        raise _bad(path, f"dtype {dtype!r} is unknown", name)
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _bad(path, f"shape {shape!r} or data_offsets {offsets!r} is malformed", name)
    needed = prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != needed:
        fact = f"{dtype} {shape} takes {needed} bytes, data_offsets {offsets} hold {offsets[1] - offsets[0]}"
        raise _bad(path, fact, name)
    return TensorEntry(name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _check_cover(path: Path, entries: list[TensorEntry], start: int, size: int) -> None:
    """The tensors follow each other without gap or overlap and fill the file exactly."""
    at = start
    for entry in entries:
        if entry.end > size:
            raise _bad(path, f"ends at byte {entry.end}, the file has {size}: it is truncated", entry.name)
        if entry.begin != at:
            raise _bad(path, f"begins at byte {entry.begin}, the tensor before it ends at {at}", entry.name)
        at = entry.end
    if at != size:
        raise _bad(path, f"the tensors end at byte {at}, the file has {size}")
