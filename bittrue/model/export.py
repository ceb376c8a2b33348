"""Writes a checkpoint directory in the published layout: config.json, safetensors shards and their index."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from bittrue.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 * 2**30
INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def save_checkpoint(
    directory: str | Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes everything beside ``directory`` and renames it into place at the end: it appears whole or not.

    ``tensors`` may be a generator: at most one shard is held. ``files`` are further files by name, such as
    tokenizer.json. Bytes, dtypes and names are kept exactly. Raises CheckpointError where ``directory`` holds
    anything.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not empty; choose another directory", file=str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        items = tensors.items() if isinstance(tensors, Mapping) else tensors
        _write_shards(staging, items, max_shard_bytes)
        write_json(staging / "config.json", config)
        for name, content in (files or {}).items():
            (staging / name).write_bytes(content)
        staging.chmod(0o755)  # mkdtemp makes it private
        os.replace(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return target


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def tensor_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as a flat uint8 view."""
    flat = tensor.reshape(-1)
    return flat.view(torch.uint8)


def _write_shards(directory: Path, items: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> None:
    shards: list[list[str]] = []
    total_bytes = 0
    seen: set[str] = set()
    for shard in _split(items, max_shard_bytes):
        for name in shard:
            if name in seen:
                raise CheckpointError(f"tensor {name} was given twice", tensor=name)
            seen.add(name)
        write_safetensors(directory / f"shard-{len(shards)}", shard)
        total_bytes += sum(t.nbytes for t in shard.values())
        shards.append(list(shard))
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / SINGLE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{i}").rename(directory / file)
        weight_map |= dict.fromkeys(names, file)
    ordered = dict(sorted(weight_map.items()))
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total_bytes}, "weight_map": ordered})


def _split(items: Iterable[tuple[str, Tensor]], max_shard_bytes: int) -> Iterable[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    used = 0
    for name, tensor in items:
        if shard and (used + tensor.nbytes > max_shard_bytes or name in shard):
            yield shard
            shard, used = {}, 0
        shard[name] = tensor.contiguous()
        used += tensor.nbytes
    yield shard


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, the widest dtypes first so that every tensor is aligned, then by name."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            _write_tensor(file, tensors[name])
        file.flush()
        os.fsync(file.fileno())


def _write_tensor(file: BinaryIO, tensor: Tensor) -> None:
    if tensor.nbytes:
        file.write(tensor_bytes(tensor.cpu()).numpy().data)
