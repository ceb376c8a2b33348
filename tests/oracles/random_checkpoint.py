"""Random small checkpoints in the published layout, made without the package: config fields and tensors."""

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PRECISIONS = ("f32", "bf16", "fp8", "fp4")

SMALL: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "hidden_act": "silu",
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 48,
    "o_groups": 2,
    "o_lora_rank": 32,
    "compress_ratios": [0, 4, 128, 4, 128, 4, 0],  # the last entry belongs to the draft layer
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk": 16,
    "sliding_window": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "num_hash_layers": 2,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "swiglu_limit": 10.0,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "max_position_embeddings": 1048576,
    "vocab_size": 512,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "use_cache": True,
}

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}


@dataclass(slots=True)
class Writer:
    """Collects tensors. Scales have a generator of their own, so all precisions draw the same values."""

    generator: torch.Generator
    scale_generator: torch.Generator
    precision: str
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def keep(self, name: str, value: Tensor) -> None:
        """Parts that stay bf16 in quantised checkpoints."""
        self.tensors[name] = value if self.precision == "f32" else value.to(torch.bfloat16)

    def norm(self, name: str, size: int) -> None:
        self.keep(name, 1 + 0.1 * self.draw(size))

    def plain(self, name: str, rows: int, cols: int) -> None:
        self.keep(f"{name}.weight", self.draw(rows, cols) * cols**-0.5)

    def linear(self, name: str, rows: int, cols: int, *, routed: bool = False) -> None:
        """A matrix that quantised checkpoints hold in FP8, or FP4 where it belongs to a routed expert."""
        value = self.draw(rows, cols) * cols**-0.5
        if self.precision in ("f32", "bf16"):
            self.keep(f"{name}.weight", value)
        elif self.precision == "fp4" and routed:
            self.tensors[f"{name}.weight"], self.tensors[f"{name}.scale"] = pack_fp4(
                value, self.scale_generator
            )
        else:
            self.tensors[f"{name}.weight"], self.tensors[f"{name}.scale"] = pack_fp8(
                value, self.scale_generator
            )

    def float32(self, name: str, *shape: int, std: float = 0.1) -> None:
        self.tensors[name] = self.draw(*shape) * std


def pack_fp8(value: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """E4M3 with random power-of-two block scales near the natural one, so that a wrong block shows."""
    rows, cols = value.shape
    blocks = (math.ceil(rows / 128), math.ceil(cols / 128))
    exponent = torch.randint(-10, -7, blocks, generator=generator)
    scale = torch.ldexp(torch.ones(blocks), exponent)
    wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :cols]
    return (value / wide).clamp(-448, 448).to(torch.float8_e4m3fn), (exponent + 127).to(torch.uint8).view(
        torch.float8_e8m0fnu
    )


def pack_fp4(value: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random E2M1 codes near the values with random power-of-two group scales; low nibble first."""
    rows, cols = value.shape
    groups = math.ceil(cols / 32)
    exponent = torch.randint(-6, -3, (rows, groups), generator=generator)
    scale = torch.ldexp(torch.ones(rows, groups), exponent).repeat_interleave(32, 1)[:, :cols]
    magnitudes = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    scaled = value / scale
    code = (scaled.abs()[..., None] - magnitudes).abs().argmin(-1) + 8 * (scaled < 0)
    packed = (code[:, 0::2] | (code[:, 1::2] << 4)).to(torch.uint8).view(torch.int8)
    return packed, (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)


def random_checkpoint(
    seed: int, *, precision: str = "f32", **overrides: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(raw config.json, tensors under official names). ``overrides`` replace config fields."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r} is none of {PRECISIONS}")
    unknown = set(overrides) - set(SMALL)
    if unknown:
        raise ValueError(f"unknown config fields {sorted(unknown)}")
    torch_dtype = "float32" if precision == "f32" else "bfloat16"
    config = {**copy.deepcopy(SMALL), **overrides, "torch_dtype": torch_dtype}
    if precision in ("fp8", "fp4"):
        config["quantization_config"] = dict(FP8_CONFIG)
    if precision == "fp4":
        config["expert_dtype"] = "fp4"
    config = {key: value for key, value in config.items() if value is not None}
    writer = Writer(torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1), precision)
    hidden, streams = config["hidden_size"], config["hc_mult"]
    writer.keep("embed.weight", writer.draw(config["vocab_size"], hidden))
    writer.plain("head", config["vocab_size"], hidden)
    writer.norm("norm.weight", hidden)
    write_hyper(writer, "hc_head", streams, streams * hidden, 1)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"layers.{layer}."
        for part in ("attn", "ffn"):
            write_hyper(writer, f"{prefix}hc_{part}", (2 + streams) * streams, streams * hidden, 3)
            writer.norm(f"{prefix}{part}_norm.weight", hidden)
        write_attention(writer, config, f"{prefix}attn.", config["compress_ratios"][layer])
        write_experts(writer, config, f"{prefix}ffn.", layer)
    return config, writer.tensors


def write_hyper(writer: Writer, name: str, rows: int, cols: int, scales: int) -> None:
    writer.float32(f"{name}_fn", rows, cols, std=cols**-0.5)
    writer.float32(f"{name}_base", rows, std=0.3)
    writer.tensors[f"{name}_scale"] = 1 + 0.1 * writer.draw(scales)


def write_attention(writer: Writer, config: dict[str, Any], prefix: str, ratio: int) -> None:
    hidden, head_dim, heads = config["hidden_size"], config["head_dim"], config["num_attention_heads"]
    latent, groups, rank = config["q_lora_rank"], config["o_groups"], config["o_lora_rank"]
    writer.float32(f"{prefix}attn_sink", heads, std=3.0)
    writer.linear(f"{prefix}wq_a", latent, hidden)
    writer.norm(f"{prefix}q_norm.weight", latent)
    writer.linear(f"{prefix}wq_b", heads * head_dim, latent)
    writer.linear(f"{prefix}wkv", head_dim, hidden)
    writer.norm(f"{prefix}kv_norm.weight", head_dim)
    writer.linear(f"{prefix}wo_a", groups * rank, heads * head_dim // groups)
    writer.linear(f"{prefix}wo_b", hidden, groups * rank)
    if ratio:
        write_compressor(writer, f"{prefix}compressor.", ratio, hidden, head_dim)
    if ratio == 4:
        index_heads, index_dim = config["index_n_heads"], config["index_head_dim"]
        writer.linear(f"{prefix}indexer.wq_b", index_heads * index_dim, latent)
        writer.plain(f"{prefix}indexer.weights_proj", index_heads, hidden)
        write_compressor(writer, f"{prefix}indexer.compressor.", ratio, hidden, index_dim)


def write_compressor(writer: Writer, prefix: str, ratio: int, hidden: int, dim: int) -> None:
    width = 2 * dim if ratio == 4 else dim
    writer.float32(f"{prefix}ape", ratio, width, std=0.5)
    writer.plain(f"{prefix}wkv", width, hidden)
    writer.plain(f"{prefix}wgate", width, hidden)
    writer.norm(f"{prefix}norm.weight", dim)


def write_experts(writer: Writer, config: dict[str, Any], prefix: str, layer: int) -> None:
    hidden, inner, count = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    writer.plain(f"{prefix}gate", count, hidden)
    if layer < config["num_hash_layers"]:
        order = torch.rand(config["vocab_size"], count, generator=writer.generator).argsort(dim=-1)
        writer.tensors[f"{prefix}gate.tid2eid"] = order[:, : config["num_experts_per_tok"]].contiguous()
    else:
        writer.float32(f"{prefix}gate.bias", count, std=0.2)
    for name, routed in [("shared_experts", False)] + [(f"experts.{i}", True) for i in range(count)]:
        writer.linear(f"{prefix}{name}.w1", inner, hidden, routed=routed)
        writer.linear(f"{prefix}{name}.w3", inner, hidden, routed=routed)
        writer.linear(f"{prefix}{name}.w2", hidden, inner, routed=routed)
