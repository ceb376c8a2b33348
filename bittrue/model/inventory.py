"""The generator of every tensor a checkpoint holds: official name, dtype and shape, from the config."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Literal

from bittrue.config.formats import FP4_GROUP, ceil_div
from bittrue.config.model import MatrixFormat, ModelConfig

DraftKind = Literal["none", "mtp", "dspark"]
TensorDtype = Literal["F32", "BF16", "F8_E4M3", "F8_E8M0", "I8", "I64"]  # as safetensors spells them
ITEM_BYTES: dict[str, int] = {"F32": 4, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I8": 1, "I64": 8}
WEIGHT_BLOCK = 128  # rows and columns that share one FP8 scale


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a checkpoint. I8 is packed FP4: two elements a byte along the last axis."""

    name: str
    dtype: TensorDtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def num_parameters(self) -> int:
        """Trained values: no scales and no routing tables; packed FP4 counts two a byte."""
        if self.dtype in ("F8_E8M0", "I64"):
            return 0
        return prod(self.shape) * (2 if self.dtype == "I8" else 1)

    @property
    def accepted_dtypes(self) -> tuple[str, ...]:
        """Dtypes a reader takes: a norm may be stored in either float format, everything else as listed."""
        return ("BF16", "F32") if self.name.endswith("norm.weight") else (self.dtype,)


def inventory(config: ModelConfig, *, draft: DraftKind = "none") -> Iterator[TensorSpec]:
    """Every tensor of the main model, then of the draft module, in layer order."""
    plain = _plain(config)
    yield TensorSpec("embed.weight", plain, (config.vocab_size, config.hidden_size))
    for layer in range(config.num_layers):
        yield from _layer(config, layer)
    yield TensorSpec("norm.weight", plain, (config.hidden_size,))
    yield TensorSpec("head.weight", plain, (config.vocab_size, config.hidden_size))
    yield from _hc_head(config, "")
    yield from draft_inventory(config, draft)


def draft_inventory(config: ModelConfig, draft: DraftKind) -> Iterator[TensorSpec]:
    """Every tensor of a draft module alone (``mtp.*``). DSpark has one stage per trailing ratio entry."""
    if draft == "mtp":
        yield from _mtp(config)
    elif draft == "dspark":
        yield from _dspark(config)


def draft_kind(names: Iterable[str]) -> DraftKind:
    """Which draft module a checkpoint carries, told by tensor names: the config is wrong about it (1.3)."""
    kind: DraftKind = "none"
    for name in names:
        if name.startswith("mtp.0.main_proj"):
            return "dspark"
        if name.startswith("mtp.0.e_proj"):
            kind = "mtp"
    return kind


def _plain(config: ModelConfig) -> TensorDtype:
    return "F32" if config.plain_format == "f32" else "BF16"


def _matrix(name: str, rows: int, cols: int, fmt: MatrixFormat) -> Iterator[TensorSpec]:
    if fmt == "fp8":
        yield TensorSpec(f"{name}.weight", "F8_E4M3", (rows, cols))
        blocks = (ceil_div(rows, WEIGHT_BLOCK), ceil_div(cols, WEIGHT_BLOCK))
        yield TensorSpec(f"{name}.scale", "F8_E8M0", blocks)
    elif fmt == "fp4":
        yield TensorSpec(f"{name}.weight", "I8", (rows, cols // 2))
        yield TensorSpec(f"{name}.scale", "F8_E8M0", (rows, ceil_div(cols, FP4_GROUP)))
    else:
        yield TensorSpec(f"{name}.weight", "F32" if fmt == "f32" else "BF16", (rows, cols))


def _hc_head(config: ModelConfig, prefix: str) -> Iterator[TensorSpec]:
    m = config.hc_mult
    yield TensorSpec(f"{prefix}hc_head_fn", "F32", (m, m * config.hidden_size))
    yield TensorSpec(f"{prefix}hc_head_base", "F32", (m,))
    yield TensorSpec(f"{prefix}hc_head_scale", "F32", (1,))


def _layer(config: ModelConfig, layer: int) -> Iterator[TensorSpec]:
    name = f"layers.{layer}"
    yield from _shell(config, name)
    yield from _attention(config, f"{name}.attn")
    kind = config.layer_kind(layer)
    if kind != "window":
        halves = 2 if kind == "csa" else 1
        ratio = config.compress_ratios[layer]
        yield from _compressor(config, f"{name}.attn.compressor", ratio, halves, config.head_dim)
    if kind == "csa":
        yield from _indexer(config, f"{name}.attn.indexer")
    yield from _feed_forward(config, f"{name}.ffn", is_hash=layer < config.num_hash_layers)


def _shell(config: ModelConfig, name: str) -> Iterator[TensorSpec]:
    """Hyper-connections and norms around the two sub-layers of a block."""
    m, d = config.hc_mult, config.hidden_size
    mix = (2 + m) * m
    for part in ("attn", "ffn"):
        yield TensorSpec(f"{name}.hc_{part}_fn", "F32", (mix, m * d))
        yield TensorSpec(f"{name}.hc_{part}_base", "F32", (mix,))
        yield TensorSpec(f"{name}.hc_{part}_scale", "F32", (3,))
        yield TensorSpec(f"{name}.{part}_norm.weight", _plain(config), (d,))


def _attention(config: ModelConfig, name: str) -> Iterator[TensorSpec]:
    d, c, fmt = config.hidden_size, config.head_dim, config.dense_format
    heads_dim, mid = config.num_heads * c, config.o_groups * config.o_lora_rank
    yield TensorSpec(f"{name}.attn_sink", "F32", (config.num_heads,))
    yield from _matrix(f"{name}.wq_a", config.q_lora_rank, d, fmt)
    yield TensorSpec(f"{name}.q_norm.weight", _plain(config), (config.q_lora_rank,))
    yield from _matrix(f"{name}.wq_b", heads_dim, config.q_lora_rank, fmt)
    yield from _matrix(f"{name}.wkv", c, d, fmt)
    yield TensorSpec(f"{name}.kv_norm.weight", _plain(config), (c,))
    yield from _matrix(f"{name}.wo_a", mid, heads_dim // config.o_groups, fmt)
    yield from _matrix(f"{name}.wo_b", d, mid, fmt)


def _compressor(config: ModelConfig, name: str, ratio: int, halves: int, dim: int) -> Iterator[TensorSpec]:
    plain, width = _plain(config), halves * dim
    yield TensorSpec(f"{name}.ape", "F32", (ratio, width))
    yield TensorSpec(f"{name}.wkv.weight", plain, (width, config.hidden_size))
    yield TensorSpec(f"{name}.wgate.weight", plain, (width, config.hidden_size))
    yield TensorSpec(f"{name}.norm.weight", plain, (dim,))


def _indexer(config: ModelConfig, name: str) -> Iterator[TensorSpec]:
    rows = config.index_num_heads * config.index_head_dim
    yield from _matrix(f"{name}.wq_b", rows, config.q_lora_rank, config.dense_format)
    shape = (config.index_num_heads, config.hidden_size)
    yield TensorSpec(f"{name}.weights_proj.weight", _plain(config), shape)
    yield from _compressor(config, f"{name}.compressor", 4, 2, config.index_head_dim)


def _feed_forward(config: ModelConfig, name: str, *, is_hash: bool) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.gate.weight", _plain(config), (config.num_experts, config.hidden_size))
    if is_hash:
        yield TensorSpec(f"{name}.gate.tid2eid", "I64", (config.vocab_size, config.experts_per_token))
    else:
        yield TensorSpec(f"{name}.gate.bias", "F32", (config.num_experts,))
    for expert in range(config.num_experts):
        yield from _expert(config, f"{name}.experts.{expert}", config.expert_format)
    yield from _expert(config, f"{name}.shared_experts", config.dense_format)


def _expert(config: ModelConfig, name: str, fmt: MatrixFormat) -> Iterator[TensorSpec]:
    d, inter = config.hidden_size, config.moe_intermediate_size
    yield from _matrix(f"{name}.w1", inter, d, fmt)
    yield from _matrix(f"{name}.w2", d, inter, fmt)
    yield from _matrix(f"{name}.w3", inter, d, fmt)


def _draft_block(config: ModelConfig, name: str) -> Iterator[TensorSpec]:
    """A draft layer: window attention and score-routed experts."""
    yield from _shell(config, name)
    yield from _attention(config, f"{name}.attn")
    yield from _feed_forward(config, f"{name}.ffn", is_hash=False)


def _mtp(config: ModelConfig) -> Iterator[TensorSpec]:
    d, plain = config.hidden_size, _plain(config)
    for stage in range(max(1, len(config.draft_ratios))):
        name = f"mtp.{stage}"
        yield from _draft_block(config, name)
        yield from _matrix(f"{name}.e_proj", d, d, config.dense_format)
        yield from _matrix(f"{name}.h_proj", d, d, config.dense_format)
        for norm in ("enorm", "hnorm", "norm"):
            yield TensorSpec(f"{name}.{norm}.weight", plain, (d,))
        yield from _hc_head(config, f"{name}.")


def _dspark(config: ModelConfig) -> Iterator[TensorSpec]:
    assert config.dspark is not None, "the caller checks that config.json has the dspark fields"
    d, plain = config.hidden_size, _plain(config)
    last = len(config.draft_ratios) - 1
    rank = config.dspark.markov_rank
    for stage in range(last + 1):
        yield from _draft_block(config, f"mtp.{stage}")
    yield from _matrix("mtp.0.main_proj", d, len(config.dspark.target_layer_ids) * d, config.dense_format)
    yield TensorSpec("mtp.0.main_norm.weight", plain, (d,))
    yield TensorSpec(f"mtp.{last}.norm.weight", plain, (d,))
    yield from _hc_head(config, f"mtp.{last}.")
    yield TensorSpec(f"mtp.{last}.markov_head.markov_w1.weight", plain, (config.vocab_size, rank))
    yield TensorSpec(f"mtp.{last}.markov_head.markov_w2.weight", plain, (config.vocab_size, rank))
    yield TensorSpec(f"mtp.{last}.confidence_head.proj.weight", plain, (1, d + rank))
