"""Converts checkpoints between the names of transformers and the official ones, and between precisions."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bittrue.config.model import ModelConfig, read_json_object
from bittrue.errors import CheckpointError
from bittrue.model.export import DEFAULT_SHARD_BYTES, save_checkpoint
from bittrue.model.hf_names import HfPlace, official_config, saved_places, state_dict_place
from bittrue.model.inventory import DraftKind, TensorSpec, inventory
from bittrue.model.presets import Precision, precision_fields
from bittrue.model.quantize import dequantize, fp4_to_fp8, quantize_fp4, quantize_fp8
from bittrue.model.tensor_file import map_tensors
from bittrue.model.weights import CONFIG_FILE, Progress, load_checkpoint, shard_entries, weight
from bittrue.ops.contracts import Weight

_MAX_FILE_BYTES = 1 << 26  # tokenizers and texts are copied, weights in other formats are not
_DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "I64": torch.int64}


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to convert, by official names: a matrix with its scale, or any other tensor."""

    directory: Path
    raw_config: Mapping[str, Any]
    draft: DraftKind
    tensor: Callable[[str], Tensor]
    matrix: Callable[[str], Weight]


def open_source(directory: str | Path, *, progress: Progress | None = None) -> Source:
    """Opens a checkpoint with official names or with those of transformers (found out from the names)."""
    root = Path(directory)
    raw = read_json_object(root / CONFIG_FILE)
    shards = shard_entries(root)
    names = {entry.name for entries in shards.values() for entry in entries}
    if "model.embed_tokens.weight" not in names:
        checkpoint = load_checkpoint(root, progress=progress)
        return Source(
            root,
            checkpoint.raw_config,
            checkpoint.draft_kind,
            checkpoint.tensor,
            lambda name: weight(checkpoint, name),
        )
    tensors: dict[str, Tensor] = {}
    for file, entries in shards.items():
        tensors |= map_tensors(root / file, entries)
    return _hf_source(root, official_config(raw), tensors)


def to_official(
    source: Source,
    directory: str | Path,
    *,
    precision: Precision | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes ``source`` with official names. ``precision`` None keeps the precision and every byte.

    FP4 -> FP8 is exact or an error naming the tensor; FP8 and FP4 -> bf16 and f32 are exact; everything else
    rounds by the rules of spec 2.9.
    """
    raw = dict(source.raw_config)
    if precision is not None:
        raw = with_precision(raw, precision)
    specs = list(inventory(ModelConfig.from_dict(raw), draft=source.draft))
    tensors = _converted(source, specs, progress, keep_norms=precision is None)
    files = _other_files(source.directory)
    return save_checkpoint(directory, raw, tensors, max_shard_bytes=max_shard_bytes, files=files)


def to_hf(
    source: Source,
    directory: str | Path,
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes ``source`` as transformers' state_dict: its names, experts stacked, matrices unpacked, no draft.

    Packed matrices become bf16, which holds their values exactly. config.json stays in the published form,
    which transformers reads.
    """
    config = ModelConfig.from_dict(source.raw_config)
    raw = with_precision(source.raw_config, config.plain_format)
    raw["compress_ratios"] = list(config.compress_ratios)
    raw["num_nextn_predict_layers"] = 0
    specs = list(inventory(ModelConfig.from_dict(raw)))
    tensors = _stacked(_converted(source, specs, progress, keep_norms=True), config.num_experts)
    files = _other_files(source.directory)
    return save_checkpoint(directory, raw, tensors, max_shard_bytes=max_shard_bytes, files=files)


def with_precision(raw: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """A config.json whose matrices are stored in another precision."""
    dropped = ("quantization_config", "expert_dtype", "dtype", "torch_dtype")
    out = {key: value for key, value in raw.items() if key not in dropped}
    out |= precision_fields(precision)
    out["torch_dtype"] = "float32" if precision == "f32" else "bfloat16"
    return out


def _other_files(directory: Path) -> dict[str, bytes]:
    """Everything beside config and weights: tokenizer, generation config, licence, templates."""
    out: dict[str, bytes] = {}
    for path in sorted(directory.iterdir()):
        is_weight = ".safetensors" in path.name or path.name == CONFIG_FILE
        if path.is_file() and not is_weight and path.stat().st_size <= _MAX_FILE_BYTES:
            out[path.name] = path.read_bytes()
    return out


def _converted(
    source: Source, specs: list[TensorSpec], progress: Progress | None, *, keep_norms: bool
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of ``specs``. keep_norms: a float32 norm in a bf16 checkpoint stays float32."""
    total = sum(spec.num_bytes for spec in specs)
    done = 0
    scale: Tensor | None = None
    for spec in specs:
        if spec.dtype == "F8_E8M0":
            assert scale is not None, "a scale follows its matrix"
            tensor = scale
        elif spec.dtype in ("F8_E4M3", "I8"):
            packed = _packed(source.matrix(spec.name), "fp8" if spec.dtype == "F8_E4M3" else "fp4", spec.name)
            tensor, scale = packed.data, packed.scale
        else:
            tensor = _plain(source, spec, keep_norms=keep_norms)
        done += spec.num_bytes
        if progress is not None:
            progress(done, total, spec.name)
        yield spec.name, tensor


def _packed(matrix: Weight, fmt: str, name: str) -> Weight:
    if matrix.format == fmt:
        return matrix
    if fmt == "fp8" and matrix.format == "fp4":
        return fp4_to_fp8(matrix, name)
    return (quantize_fp8 if fmt == "fp8" else quantize_fp4)(dequantize(matrix))


def _plain(source: Source, spec: TensorSpec, *, keep_norms: bool) -> Tensor:
    dtype = _DTYPES[spec.dtype]
    if keep_norms and len(spec.accepted_dtypes) > 1:
        return source.tensor(spec.name)
    if spec.name.endswith(".weight"):
        matrix = source.matrix(spec.name)
        return (matrix.data if matrix.scale is None else dequantize(matrix)).to(dtype)
    return source.tensor(spec.name).to(dtype)


def _hf_source(root: Path, raw: dict[str, Any], tensors: Mapping[str, Tensor]) -> Source:
    config = ModelConfig.from_dict(raw)
    specs = {spec.name: spec for spec in inventory(config)}
    places = {name: _present_place(name, tensors) for name in specs}
    needed = {place.name for place in places.values()}
    for kind, names in (("lacks", needed - set(tensors)), ("has unknown", set(tensors) - needed)):
        if names:
            first = sorted(names)[0]
            fact = f"{root} {kind} tensors under the names of transformers: {first}, {len(names)} in all"
            raise CheckpointError(f"{fact}; save the model again", file=str(root), tensor=first)

    def tensor(name: str) -> Tensor:
        place, spec = places[name], specs[name]
        found = tensors[place.name]
        if place.expert is not None and place.expert < found.shape[0]:
            found = found[place.expert]
            if place.half is not None:
                found = found[place.half * spec.shape[0] : (place.half + 1) * spec.shape[0]]
        if tuple(found.shape) != spec.shape:
            fact = f"{root}: tensor {place.name} holds {list(found.shape)} for {name}"
            text = f"{fact}, the config implies {list(spec.shape)}"
            raise CheckpointError(text, file=str(root), tensor=place.name)
        return _exact(found, spec, place.name)

    def matrix(name: str) -> Weight:
        found = tensor(name)
        return Weight(found, None, "f32" if found.dtype == torch.float32 else "bf16")

    return Source(root, raw, "none", tensor, matrix)


def _present_place(name: str, tensors: Mapping[str, Tensor]) -> HfPlace:
    places = saved_places(name)
    return next((place for place in places if place.name in tensors), places[0])


def _exact(found: Tensor, spec: TensorSpec, hf_name: str) -> Tensor:
    """The tensor in a dtype the official layout has for it, where that loses nothing."""
    dtype = _DTYPES[spec.dtype]
    accepted = {_DTYPES[name] for name in spec.accepted_dtypes}
    if found.dtype in accepted:
        return found
    cast = found.to(dtype)
    if not torch.equal(cast.to(found.dtype), found):
        fact = f"tensor {hf_name} is {found.dtype} and loses bits as {spec.dtype}"
        raise CheckpointError(f"{fact}; set torch_dtype in config.json to the dtype it has", tensor=hf_name)
    return cast


def _stacked(items: Iterator[tuple[str, Tensor]], num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """Official tensors under transformers' names; the experts of a layer are collected, then joined."""
    parts: dict[str, dict[tuple[int, int], Tensor]] = {}
    for name, tensor in items:
        place = state_dict_place(name)
        if place.expert is None:
            yield place.name, tensor
            continue
        held = parts.setdefault(place.name, {})
        held[place.expert, place.half or 0] = tensor
        halves = 1 if place.half is None else 2
        if len(held) == num_experts * halves:
            rows = [torch.cat([held[e, h] for h in range(halves)]) for e in range(num_experts)]
            yield place.name, torch.stack(rows)
            del parts[place.name]
