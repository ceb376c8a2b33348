"""Small random checkpoints of every layer kind, the same bytes for the same arguments on every machine."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.errors import UsageError
from bittrue.model.export import DEFAULT_SHARD_BYTES, save_checkpoint
from bittrue.model.inventory import DraftKind, TensorSpec, inventory
from bittrue.model.quantize import quantize_fp4, quantize_fp8
from bittrue.text.small_tokenizer import small_tokenizer_json, tokenizer_config_json

Precision = Literal["f32", "bf16", "fp8", "fp4"]

_PRESETS: Mapping[str, Mapping[str, int]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 32,
        "qk_rope_head_dim": 8,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_hash_layers": 2,
        "vocab_size": 1024,
    },
    # The bundled trained model (models/mini): every layer kind, bytes as tokens.
    "mini": {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 96,
        "o_groups": 2,
        "o_lora_rank": 64,
        "index_n_heads": 4,
        "index_head_dim": 32,
        "index_topk": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "num_hash_layers": 1,
        "vocab_size": 322,
    },
    "t256": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 64,
        "index_n_heads": 4,
        "index_head_dim": 64,
        "index_topk": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "num_hash_layers": 3,
        "vocab_size": 4096,
    },
    # Heads as wide as Flash's.
    "t512h": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 128,
        "o_groups": 2,
        "o_lora_rank": 128,
        "index_n_heads": 8,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 256,
        "num_hash_layers": 3,
        "vocab_size": 4096,
    },
    # Large enough that the work of a token is arithmetic, not the cost of calling ops.
    "s1024": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 256,
        "o_groups": 4,
        "o_lora_rank": 128,
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": 256,
        "n_routed_experts": 32,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 512,
        "num_hash_layers": 3,
        "vocab_size": 4096,
    },
    # Flash's widths; reduced: 4 of its 43 layers (CSA and HCA only), 16 of 256 experts, 4,096 token ids.
    "flash4": {
        "hidden_size": 4096,
        "num_hidden_layers": 4,
        "num_attention_heads": 64,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "q_lora_rank": 1024,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
        "n_routed_experts": 16,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 2048,
        "num_hash_layers": 1,
        "vocab_size": 4096,
    },
}
PRESETS = tuple(_PRESETS)
_WITHOUT_WINDOW_LAYERS = ("flash4",)

_COMMON: Mapping[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "compress_rope_theta": 160000,
    "eos_token_id": 1,
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "model_type": "deepseek_v4",
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "use_cache": True,
}
_QUANTIZATION: Mapping[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


def make_checkpoint(
    preset: str,
    seed: int,
    precision: Precision,
    directory: str | Path,
    *,
    draft: DraftKind = "none",
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint in the published layout, into a new or empty directory, and returns that.

    ``overrides`` replace fields of config.json by their published names. fp8 = FP8 everywhere (Base), fp4 =
    FP4 experts and FP8 elsewhere (instruct). Checkpoints of one preset and seed in different precisions hold
    roundings of the same values. Raises UsageError for an unknown preset or precision, and
    UnsupportedModel for a bad override.
    """
    raw = preset_config(preset, precision, draft=draft, **overrides)
    config = ModelConfig.from_dict(raw)
    tensors = random_tensors(config, seed, draft=draft)
    return save_checkpoint(
        directory, raw, tensors, max_shard_bytes=max_shard_bytes, files=checkpoint_files(config.vocab_size)
    )


def checkpoint_files(vocab_size: int) -> dict[str, bytes]:
    """What stands beside the weights, by file name: the small tokenizer of that size and the defaults of
    generation."""
    ids = {key: _COMMON[key] for key in ("bos_token_id", "eos_token_id")}
    generation = {**ids, "temperature": 1.0, "top_p": 1.0}
    return {
        "tokenizer.json": small_tokenizer_json(vocab_size).encode(),
        "tokenizer_config.json": tokenizer_config_json().encode(),
        "generation_config.json": (json.dumps(generation, indent=2) + "\n").encode(),
    }


def preset_config(
    preset: str, precision: Precision, *, draft: DraftKind = "none", **overrides: Any
) -> dict[str, Any]:
    """The config.json of a preset, with overrides. Layers are two of window kind (flash4 has none), then CSA
    and HCA in turn."""
    if preset not in _PRESETS:
        raise UsageError(f"no preset is called {preset!r}; choose one of {', '.join(PRESETS)}")
    if precision not in get_args(Precision):
        known = ", ".join(get_args(Precision))
        raise UsageError(f"no precision is called {precision!r}; choose one of {known}")
    raw: dict[str, Any] = {**_COMMON, **_PRESETS[preset], **precision_fields(precision)}
    raw["torch_dtype"] = "float32" if precision == "f32" else "bfloat16"
    raw |= overrides
    layers = raw["num_hidden_layers"]
    if "compress_ratios" not in overrides:
        alternating = [4 if i % 2 == 0 else 128 for i in range(layers)]
        first = [] if preset in _WITHOUT_WINDOW_LAYERS else [0, 0]
        raw["compress_ratios"] = (first + alternating)[:layers]
    if draft != "none":
        raw["num_nextn_predict_layers"] = 1
        raw["compress_ratios"] = raw["compress_ratios"][:layers] + [0] * (3 if draft == "dspark" else 1)
    if draft == "dspark":
        raw["dspark_block_size"] = 5
        raw["dspark_markov_rank"] = 16
        raw["dspark_noise_token_id"] = raw["vocab_size"] - 1
        raw["dspark_target_layer_ids"] = list(range(max(0, layers - 3), layers))
    return dict(sorted(raw.items()))


def precision_fields(precision: Precision) -> dict[str, Any]:
    """The config.json fields that state how matrices are stored."""
    if precision in ("f32", "bf16"):
        return {"expert_dtype": "bf16"}  # as published tools write it, also beside torch_dtype float32
    fields: dict[str, Any] = {"quantization_config": dict(_QUANTIZATION)}
    if precision == "fp4":
        fields["expert_dtype"] = "fp4"
    return fields


def random_tensors(
    config: ModelConfig, seed: int, *, draft: DraftKind = "none"
) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a checkpoint with this config: each is a function of the seed and its own name."""
    for spec in inventory(config, draft=draft):
        if spec.dtype == "F8_E8M0":
            continue  # comes with its matrix
        if spec.dtype == "I64":
            yield spec.name, random_table(spec, seed, config.num_experts)
            continue
        if spec.dtype in ("F8_E4M3", "I8"):
            quantize, width = (quantize_fp8, 1) if spec.dtype == "F8_E4M3" else (quantize_fp4, 2)
            rows, cols = spec.shape[0], spec.shape[1] * width
            weight = quantize(noise(seed, spec.name, rows, cols, std=cols**-0.5))
            assert weight.scale is not None
            yield spec.name, weight.data
            yield spec.name.removesuffix("weight") + "scale", weight.scale
            continue
        dtype = torch.float32 if spec.dtype == "F32" else torch.bfloat16
        yield spec.name, _random_plain(spec, seed).to(dtype)


def _random_plain(spec: TensorSpec, seed: int) -> Tensor:
    name, shape = spec.name, spec.shape
    if name.endswith("_scale"):
        return torch.ones(shape)
    if name.endswith("norm.weight"):
        return 1 + noise(seed, name, *shape, std=0.1)
    if name == "embed.weight" or name.endswith("markov_w1.weight"):
        return noise(seed, name, *shape, std=1.0)
    if name.endswith("gate.bias"):
        return noise(seed, name, *shape, std=0.05)
    if name.endswith((".weight", "_fn")):
        return noise(seed, name, *shape, std=shape[-1] ** -0.5)
    return noise(seed, name, *shape, std=0.1)


def random_table(spec: TensorSpec, seed: int, num_experts: int) -> Tensor:
    """tid2eid: for every token id, distinct experts in random order."""
    rows, chosen = spec.shape
    keys = _words(seed, spec.name, rows * num_experts).reshape(rows, num_experts)
    return torch.from_numpy(np.argsort(keys, axis=1, kind="stable")[:, :chosen].astype(np.int64))


def noise(seed: int, name: str, *shape: int, std: float) -> Tensor:
    """Bell-shaped f32 noise, a function of seed and name: sums of four uniform 16-bit integers.

    Integers, because log, cos and exp, on which normal samplers rest, round differently between machines.
    """
    count = int(np.prod(shape))
    words = _words(seed, name, count)
    low = np.uint64(0x0000FFFF0000FFFF)
    pairs = ((words & low) + ((words >> np.uint64(16)) & low)).view(np.uint32).reshape(count, 2)
    sums = pairs[:, 0].astype(np.int32) + pairs[:, 1].astype(np.int32) - 2 * 65535
    unit = ((65536**2 - 1) / 3) ** 0.5  # the standard deviation of such a sum
    return torch.from_numpy(sums.astype(np.float32) * np.float32(std / unit)).view(*shape)


def _words(seed: int, name: str, count: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    source = np.random.PCG64(np.random.SeedSequence([seed, crc32(name.encode())]))
    return source.random_raw(count)
