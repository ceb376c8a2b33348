"""Reads a checkpoint directory in the published layout and checks it against its config, tensor by tensor."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from bittrue.config.model import ModelConfig, read_json_object
from bittrue.errors import CheckpointError
from bittrue.model.inventory import DraftKind, TensorSpec, draft_inventory, draft_kind, inventory
from bittrue.model.tensor_file import TensorEntry, map_tensors, read_header
from bittrue.ops.contracts import Weight

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
Progress = Callable[[int, int, str], None]
"""Called with (bytes done, bytes in all, tensor or file at hand)."""

_CHUNK = 1 << 20  # values scanned at a time
_WHOLE_BYTES = 1 << 16  # tensors up to this size enter weight_version whole
_SAMPLE_BYTES = 1 << 12
_MAX_SAMPLES = 256  # every sample of a cold file makes the system read ahead 100 KiB and more
_FORMATS: Mapping[torch.dtype, Literal["f32", "bf16", "fp8", "fp4"]] = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.int8: "fp4",
}


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint in memory: tensors by official name, mapped from their files, packed as stored."""

    directory: Path
    config: ModelConfig
    raw_config: Mapping[str, Any]  # config.json as read
    tensors: Mapping[str, Tensor]  # the main model
    draft_tensors: Mapping[str, Tensor]  # names mtp.*
    draft_kind: DraftKind
    num_bytes: int  # of its tensor files, all of them mapped
    stamp: str  # identity of the files as found when they were opened: names, sizes, times, inodes

    def tensor(self, name: str) -> Tensor:
        """The tensor of that name, main or draft. Raises CheckpointError where there is none."""
        found = self.tensors.get(name)
        if found is None:
            found = self.draft_tensors.get(name)
        if found is None:
            fact = f"{self.directory} has no tensor {name}"
            raise CheckpointError(fact, file=str(self.directory), tensor=name)
        return found

    def all_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Main and draft tensors in name order."""
        merged = {**self.tensors, **self.draft_tensors}
        for name in sorted(merged):
            yield name, merged[name]


def load_checkpoint(
    directory: str | Path, *, verify: bool = True, verified: str = "", progress: Progress | None = None
) -> Checkpoint:
    """Opens a checkpoint: config.json and model.safetensors or its shards. Copies nothing.

    Names, shapes and dtypes are always checked against the config. ``verify`` also reads every value once
    and refuses NaN, infinity and expert ids out of range; pass False for a checkpoint far larger than memory
    that was checked before, or the ``stamp`` it had then as ``verified``: files that have not changed since
    are not read again. Raises CheckpointError naming file and tensor, or UnsupportedModel.
    """
    root = Path(directory)
    if not root.is_dir():
        raise CheckpointError(f"{root} is not a directory; give one in the published layout", file=str(root))
    raw = read_json_object(root / CONFIG_FILE)
    shards = shard_entries(root)
    stamp = _stamp(root, shards)
    verify = verify and stamp != verified
    names = [entry.name for entries in shards.values() for entry in entries]
    _refuse_foreign_names(root, names)
    config = ModelConfig.from_dict(raw)
    kind = draft_kind(names)
    specs = _expected(root, config, kind)
    _check_inventory(root, specs, shards)
    tensors = _map_all(root, shards, progress=None if verify else progress)
    if verify:
        files = {e.name: str(root / file) for file, entries in shards.items() for e in entries}
        _verify_values(config, tensors, files, progress)
    return Checkpoint(
        directory=root,
        config=config,
        raw_config=raw,
        tensors={n: t for n, t in tensors.items() if not n.startswith("mtp.")},
        draft_tensors={n: t for n, t in tensors.items() if n.startswith("mtp.")},
        draft_kind=kind,
        num_bytes=sum((root / file).stat().st_size for file in shards),
        stamp=stamp,
    )


def _stamp(root: Path, files: Iterable[str]) -> str:
    """Taken before anything is read: a file that changes meanwhile has another stamp the next time."""
    digest = hashlib.blake2b(digest_size=16)
    for file in (CONFIG_FILE, *sorted(files)):
        found = (root / file).stat()
        facts = (file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
        digest.update(repr(facts).encode())
    return digest.hexdigest()


def weight(checkpoint: Checkpoint, name: str) -> Weight:
    """The matrix ``name`` (ending in .weight) with its scale, if it has one, packed as stored."""
    data = checkpoint.tensor(name)
    fmt = _FORMATS[data.dtype]
    if fmt in ("f32", "bf16"):
        return Weight(data, None, fmt)
    return Weight(data, checkpoint.tensor(name.removesuffix("weight") + "scale"), fmt)


def weight_digest(checkpoint: Checkpoint, *, progress: Progress | None = None) -> str:
    """Checksum over name, dtype, shape and every byte of every tensor, in name order; 64 hex digits.

    Reads the whole checkpoint. For certificates, for comparing exports and after a live weight update.
    Independent of how the tensors are spread over files.
    """
    digest = hashlib.blake2b(digest_size=32)
    items = list(checkpoint.all_tensors())
    total = sum(t.nbytes for _, t in items)
    done = 0
    for name, tensor in items:
        digest.update(_label(name, tensor))
        digest.update(_bytes(tensor).numpy().data)
        done += tensor.nbytes
        if progress is not None:
            progress(done, total, name)
    return digest.hexdigest()


def weight_version(checkpoint: Checkpoint) -> str:
    """A cheap identity of the loaded weights: 32 hex digits.

    Over name, dtype and shape of every tensor, all bytes of small ones, and 4 KiB from the middle of about
    256 of the large ones, spread evenly. The version a server reports and the first part of every prefix
    key: it tells apart models and training steps, which change every tensor; it does not detect a few
    flipped bytes (weight_digest does).
    """
    digest = hashlib.blake2b(digest_size=16)
    items = list(checkpoint.all_tensors())
    stride = max(1, sum(t.nbytes > _WHOLE_BYTES for _, t in items) // _MAX_SAMPLES)
    num_large = 0
    for name, tensor in items:
        digest.update(_label(name, tensor))
        if tensor.nbytes <= _WHOLE_BYTES:
            digest.update(_bytes(tensor).numpy().data)
            continue
        if num_large % stride == 0:
            middle = tensor.nbytes // 2
            digest.update(_bytes(tensor)[middle : middle + _SAMPLE_BYTES].numpy().data)
        num_large += 1
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _label(name: str, tensor: Tensor) -> bytes:
    return f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode()


def _listing(names: Iterable[str]) -> str:
    """The first few of some names and how many there are."""
    found = sorted(names)
    shown = ", ".join(found[:4])
    return f"{shown} and {len(found) - 4} more" if len(found) > 4 else shown


def shard_entries(root: Path) -> dict[str, tuple[TensorEntry, ...]]:
    """The tensors of every file of the checkpoint, by file name."""
    index = root / INDEX_FILE
    if not index.exists():
        if not (root / SINGLE_FILE).exists():
            fact = f"{root} has neither {SINGLE_FILE} nor {INDEX_FILE}"
            raise CheckpointError(f"{fact}; give a directory in the published layout", file=str(root))
        return {SINGLE_FILE: read_header(root / SINGLE_FILE)}
    weight_map = _weight_map(index)
    files = sorted(set(weight_map.values()))
    missing = [file for file in files if not (root / file).is_file()]
    if missing:
        fact = f"{root} lacks {len(missing)} of {len(files)} shards: {_listing(missing)}; fetch them"
        raise CheckpointError(fact, file=str(root / missing[0]))
    shards = {file: read_header(root / file) for file in files}
    _check_index(root, weight_map, shards)
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; fetch it again", file=str(index))
    for name, file in weight_map.items():
        # A name with a folder in it could lead out of the checkpoint.
        if not isinstance(file, str) or Path(file).name != file:
            fact = f"{index}: the shard of tensor {name} is {file!r}, not a file name; fetch it again"
            raise CheckpointError(fact, file=str(index), tensor=name)
    return weight_map


def _check_index(
    root: Path, weight_map: Mapping[str, str], shards: Mapping[str, tuple[TensorEntry, ...]]
) -> None:
    """Every tensor lies in the one shard the index gives."""
    held: dict[str, str] = {}
    for file, entries in shards.items():
        for entry in entries:
            if entry.name in held:
                fact = f"tensor {entry.name} is in both {held[entry.name]} and {file} of {root}; remove one"
                raise CheckpointError(fact, file=str(root / file), tensor=entry.name)
            held[entry.name] = file
    wrong = sorted(name for name, file in weight_map.items() if held.get(name) != file)
    if wrong:
        file = str(root / weight_map[wrong[0]])
        fact = f"{len(wrong)} tensors are not in the shard {INDEX_FILE} gives: {_listing(wrong)}"
        raise CheckpointError(f"{file}: {fact}; fetch the checkpoint again", file=file, tensor=wrong[0])
    unlisted = sorted(set(held) - set(weight_map))
    if unlisted:
        file = str(root / held[unlisted[0]])
        fact = f"{len(unlisted)} tensors are not in {INDEX_FILE}: {_listing(unlisted)}"
        raise CheckpointError(f"{file}: {fact}; fetch the checkpoint again", file=file, tensor=unlisted[0])


def _refuse_foreign_names(root: Path, names: list[str]) -> None:
    foreign = [n for n in names if n.startswith("model.") or n == "lm_head.weight"]
    if foreign:
        fact = f"{root} uses the tensor names of transformers ({_listing(foreign)})"
        remedy = f"run `bittrue convert {root} OUT` first"
        raise CheckpointError(f"{fact}; {remedy}", file=str(root), tensor=foreign[0])


def _expected(root: Path, config: ModelConfig, kind: DraftKind) -> dict[str, TensorSpec]:
    if kind == "dspark" and (config.dspark is None or not config.draft_ratios):
        fact = f"{root} holds a DSpark draft (mtp.0.main_proj) but {CONFIG_FILE} has no dspark_block_size"
        remedy = "or no compress_ratios entries for it; take the config.json published with these weights"
        file = str(root / CONFIG_FILE)
        raise CheckpointError(f"{fact} {remedy}", file=file, tensor="mtp.0.main_proj.weight")
    specs = {spec.name: spec for spec in inventory(config)}
    specs |= {spec.name: spec for spec in draft_inventory(config, kind)}
    return specs


def _check_inventory(
    root: Path, specs: Mapping[str, TensorSpec], shards: Mapping[str, tuple[TensorEntry, ...]]
) -> None:
    """The tensors are exactly the expected ones, with their dtypes and shapes."""
    found = {entry.name: (file, entry) for file, entries in shards.items() for entry in entries}
    missing = sorted(set(specs) - set(found))
    if missing:
        fact = f"{root} lacks {len(missing)} of {len(specs)} tensors: {_listing(missing)}"
        remedy = "fetch the missing files or the config.json of these weights"
        raise CheckpointError(f"{fact}; {remedy}", file=str(root), tensor=missing[0])
    extra = sorted(set(found) - set(specs))
    if extra:
        file = str(root / found[extra[0]][0])
        fact = f"{file}: {len(extra)} tensors do not belong to this model: {_listing(extra)}"
        raise CheckpointError(f"{fact}; remove them or use the right config.json", file=file, tensor=extra[0])
    for name, spec in specs.items():
        file_name, entry = found[name]
        if entry.shape != spec.shape:
            fact = f"has shape {list(entry.shape)}, the config implies {list(spec.shape)}"
        elif entry.dtype not in spec.accepted_dtypes:
            fact = f"has dtype {entry.dtype}, the config implies {' or '.join(spec.accepted_dtypes)}"
        else:
            continue
        file = str(root / file_name)
        raise CheckpointError(f"{file}: tensor {name} {fact}", file=file, tensor=name)


def _map_all(
    root: Path, shards: Mapping[str, tuple[TensorEntry, ...]], *, progress: Progress | None
) -> dict[str, Tensor]:
    total = sum((root / file).stat().st_size for file in shards)
    done = 0
    tensors: dict[str, Tensor] = {}
    for file, entries in shards.items():
        tensors |= map_tensors(root / file, entries)
        done += (root / file).stat().st_size
        if progress is not None:
            progress(done, total, file)
    return tensors


def _verify_values(
    config: ModelConfig, tensors: Mapping[str, Tensor], files: Mapping[str, str], progress: Progress | None
) -> None:
    total = sum(t.nbytes for t in tensors.values())
    done = 0
    work = np.empty(_CHUNK, np.uint64)
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        for start in range(0, flat.numel(), _CHUNK):
            piece = flat[start : start + _CHUNK]
            fact = _value_fault(piece, config.num_experts, work)
            if fact is not None:
                text = f"{files[name]}: tensor {name} holds {fact}; fetch or write the file again"
                raise CheckpointError(text, file=files[name], tensor=name)
            done += piece.nbytes
            if progress is not None:
                progress(done, total, name)


def _value_fault(piece: Tensor, num_experts: int, work: np.ndarray) -> str | None:
    if piece.dtype == torch.int64:
        low, high = torch.aminmax(piece)
        if int(low) < 0 or int(high) >= num_experts:
            return f"expert ids {int(low)}..{int(high)}, the model has 0..{num_experts - 1}"
        return None
    rule = _FAULTS.get(piece.dtype)
    if rule is None:
        return None
    # As unsigned integers without the sign, what is not a number lies above all numbers: a tenth of the time
    # of a floating-point test, and in one thread (others may be busy while a server starts again).
    bits = piece.view(rule.signed).numpy().view(rule.unsigned)
    magnitudes = np.bitwise_and(bits, rule.magnitude, out=work.view(rule.unsigned)[: bits.size])
    return rule.fact if int(magnitudes.max(initial=0)) >= rule.least else None


@dataclass(frozen=True, slots=True)
class _FaultRule:
    """The values of one dtype whose bits under the mask ``magnitude`` reach ``least`` are no numbers."""

    signed: torch.dtype
    unsigned: type[np.unsignedinteger[Any]]
    magnitude: int
    least: int
    fact: str = "NaN or infinity"


_FAULTS: Mapping[torch.dtype, _FaultRule] = {
    torch.float8_e8m0fnu: _FaultRule(torch.uint8, np.uint8, 0xFF, 0xFF, "a NaN scale"),
    torch.float8_e4m3fn: _FaultRule(torch.uint8, np.uint8, 0x7F, 0x7F, "NaN"),
    torch.bfloat16: _FaultRule(torch.int16, np.uint16, 0x7FFF, 0x7F80),
    torch.float16: _FaultRule(torch.int16, np.uint16, 0x7FFF, 0x7C00),
    torch.float32: _FaultRule(torch.int32, np.uint32, 0x7FFFFFFF, 0x7F800000),
    torch.float64: _FaultRule(torch.int64, np.uint64, 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000),
}
