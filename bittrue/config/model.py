"""ModelConfig: the facts about a DeepSeek-V4 model, read from a published config.json (no knobs)."""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bittrue.config.formats import ActDtype, Level
from bittrue.errors import CheckpointError, UnsupportedModel

MatrixFormat = Literal["f32", "bf16", "fp8", "fp4"]
KIND_OF_RATIO: Mapping[int, Literal["window", "csa", "hca"]] = {0: "window", 4: "csa", 128: "hca"}

# Fields that do not change what is computed: read by nobody, accepted with any value.
_NOISE = frozenset(
    "_name_or_path architectures auto_map initializer_range output_attentions output_hidden_states "
    "output_router_logits pad_token_id return_dict router_aux_loss_coef router_jitter_noise "
    "transformers_version use_cache".split()
)
# Fields with one implemented meaning; absent = that meaning.
_FIXED: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "attention_dropout": (0, 0.0),
    "first_k_dense_replace": (0,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "model_type": ("deepseek_v4",),
    "moe_layer_freq": (1,),
    "n_group": (None, 1),
    "n_shared_experts": (1,),
    "norm_topk_prob": (True,),
    "num_key_value_heads": (1,),
    "scoring_func": ("sqrtsoftplus",),
    "tie_word_embeddings": (False,),
    "topk_group": (None, 1),
    "topk_method": ("noaux_tc",),
}
_FIXED_YARN: Mapping[str, tuple[Any, ...]] = {
    "type": ("yarn",),
    "rope_type": ("yarn",),
    "attention_factor": (None, 1, 1.0),
    "truncate": (True,),
}
_FIXED_QUANTIZATION: Mapping[str, tuple[Any, ...]] = {
    "quant_method": ("fp8",),
    "fmt": ("e4m3",),
    "activation_scheme": ("dynamic",),
    "scale_fmt": ("ue8m0",),
    "weight_block_size": ([128, 128],),
}
_MAX_STREAMS = 8  # what the kernels have room for (MAX_STREAMS of hyper.cpp)
_MAX_POSITIONS = 2**24  # rotary angles begin as float32 positions: beyond, neighbours would be equal
_V41_FIELDS = (
    "candidate_",
    "engram_",
    "image_token_id",
    "index_source_layer_ids",
    "kv_source_layer_ids",
    "text_config",
    "vision_config",
    "dspark_n_routed_experts",
    "dspark_num_experts_per_tok",
)
_EXPERT_FORMATS: Mapping[str, MatrixFormat] = {"fp4": "fp4", "fp8": "fp8"}
_PLAIN_NAMES = ("bf16", "bfloat16", "f32", "fp32", "float32")
_TORCH_DTYPES: Mapping[str, ActDtype] = {"bfloat16": "bf16", "float32": "f32"}


@dataclass(frozen=True, slots=True)
class Yarn:
    """Scaling of the rotary frequencies of layers with a compressor (spec 2.2)."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_max_positions: int


@dataclass(frozen=True, slots=True)
class DSpark:
    """What config.json says about a DSpark draft module (spec 1.3)."""

    block_size: int
    noise_token_id: int
    target_layer_ids: tuple[int, ...]
    markov_rank: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Facts of one checkpoint. Sizes are in elements; ids are token ids."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    head_dim: int
    rope_dim: int  # the last rope_dim features of a head rotate
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    compress_ratios: tuple[int, ...]  # one per main layer: 0, 4 or 128
    draft_ratios: tuple[int, ...]  # the entries behind them: one 0 per draft layer
    window: int  # tokens, the current one included
    index_num_heads: int
    index_head_dim: int
    index_topk: int  # compressed entries, not tokens
    num_experts: int
    experts_per_token: int
    num_shared_experts: int
    moe_intermediate_size: int
    routed_scale: float
    num_hash_layers: int
    swiglu_limit: float
    hc_mult: int
    hc_iters: int
    hc_eps: float
    norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    max_positions: int
    bos_id: int
    eos_id: int
    plain_format: ActDtype  # embedding, head, norms, routers, compressors: the checkpoint's torch_dtype
    dense_format: MatrixFormat  # attention, shared experts, draft projections
    expert_format: MatrixFormat  # routed experts
    num_mtp: int  # num_nextn_predict_layers as written; which draft a checkpoint has is told by its tensors
    dspark: DSpark | None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Parses a published config.json. Raises UnsupportedModel naming the field and its value."""
        f = _Fields(raw)
        _refuse_other_models(raw)
        f.skip(_NOISE)
        f.fixed(_FIXED)
        num_layers = f.integer("num_hidden_layers")
        main, draft = _split_ratios(f.pop("compress_ratios"), num_layers)
        plain = _plain_format(f)
        dense, experts = _matrix_formats(f, plain)
        config = cls(
            vocab_size=f.integer("vocab_size"),
            hidden_size=f.integer("hidden_size"),
            num_layers=num_layers,
            num_heads=f.integer("num_attention_heads"),
            head_dim=f.integer("head_dim"),
            rope_dim=f.integer("qk_rope_head_dim"),
            q_lora_rank=f.integer("q_lora_rank"),
            o_groups=f.integer("o_groups"),
            o_lora_rank=f.integer("o_lora_rank"),
            compress_ratios=main,
            draft_ratios=draft,
            window=f.integer("sliding_window"),
            index_num_heads=f.integer("index_n_heads"),
            index_head_dim=f.integer("index_head_dim"),
            index_topk=f.integer("index_topk"),
            num_experts=f.integer("n_routed_experts"),
            experts_per_token=f.integer("num_experts_per_tok"),
            num_shared_experts=1,
            moe_intermediate_size=f.integer("moe_intermediate_size"),
            routed_scale=f.number("routed_scaling_factor"),
            num_hash_layers=f.integer("num_hash_layers", least=0),
            swiglu_limit=f.number("swiglu_limit"),
            hc_mult=f.integer("hc_mult"),
            hc_iters=f.integer("hc_sinkhorn_iters"),
            hc_eps=f.number("hc_eps"),
            norm_eps=f.number("rms_norm_eps"),
            rope_theta=f.number("rope_theta"),
            compress_rope_theta=f.number("compress_rope_theta"),
            yarn=_yarn(f.pop("rope_scaling", None)),
            max_positions=f.integer("max_position_embeddings"),
            bos_id=f.integer("bos_token_id", least=0),
            eos_id=f.integer("eos_token_id", least=0),
            plain_format=plain,
            dense_format=dense,
            expert_format=experts,
            num_mtp=f.integer("num_nextn_predict_layers", least=0)
            if f.has("num_nextn_predict_layers")
            else 0,
            dspark=_dspark(f, num_layers),
        )
        f.end()
        _check_together(config)
        return config

    @classmethod
    def from_file(cls, path: str | Path) -> "ModelConfig":
        """Parses the config.json at ``path``. Raises as from_dict; CheckpointError where unreadable."""
        return cls.from_dict(read_json_object(Path(path)))

    def layer_kind(self, layer: int) -> Literal["window", "csa", "hca"]:
        return KIND_OF_RATIO[self.compress_ratios[layer]]

    @property
    def layer_kinds(self) -> tuple[Literal["window", "csa", "hca"], ...]:
        return tuple(KIND_OF_RATIO[r] for r in self.compress_ratios)

    @property
    def default_level(self) -> Level:
        """The numeric level the checkpoint suggests: published when any matrix is FP8 or FP4."""
        quantised = {self.dense_format, self.expert_format} & {"fp8", "fp4"}
        return "published" if quantised else "maths"

    @property
    def default_act(self) -> ActDtype:
        """The activation dtype the checkpoint suggests: that of its unquantised tensors."""
        return self.plain_format

    def main_inv_freq(self) -> tuple[float, ...]:
        """Rotary frequencies [rope_dim / 2] of window layers; every value is exactly a float32."""
        return tuple(_r32(1.0 / p) for p in self._position_freqs(self.rope_theta))

    def compress_inv_freq(self) -> tuple[float, ...]:
        """Rotary frequencies [rope_dim / 2] of layers with a compressor (YaRN); exactly float32.

        Every operation rounds to float32, in the order of the published code, so that the tables are equal
        bit for bit: at a million positions the last bit of a frequency is several hundredths of a radian.
        """
        freqs = self._position_freqs(self.compress_rope_theta)
        plain = [_r32(1.0 / p) for p in freqs]
        if self.yarn is None:
            return tuple(plain)
        low, high = self._yarn_range(self.yarn)
        out = []
        for k, (p, extrapolated) in enumerate(zip(freqs, plain, strict=True)):
            interpolated = _r32(1.0 / _r32(self.yarn.factor * p))
            ramp = min(max(_r32(_r32(k - low) / _r32(high - low)), 0.0), 1.0)
            keep = _r32(1.0 - ramp)
            out.append(_r32(_r32(interpolated * _r32(1.0 - keep)) + _r32(extrapolated * keep)))
        return tuple(out)

    def layer_inv_freq(self, layer: int) -> tuple[float, ...]:
        """The one rotary table of a layer: of its queries, rows, compressed rows and index keys."""
        return self.main_inv_freq() if self.compress_ratios[layer] == 0 else self.compress_inv_freq()

    def _position_freqs(self, theta: float) -> list[float]:
        return [_r32(theta ** _r32(k / self.rope_dim)) for k in range(0, self.rope_dim, 2)]

    def _yarn_range(self, yarn: Yarn) -> tuple[float, float]:
        def index(rotations: float) -> float:
            ratio = yarn.original_max_positions / (rotations * 2 * math.pi)
            return (self.rope_dim * math.log(ratio)) / (2 * math.log(self.compress_rope_theta))

        low = max(math.floor(index(yarn.beta_fast)), 0)
        high = min(math.ceil(index(yarn.beta_slow)), self.rope_dim - 1)
        return low, high + 0.001 if low == high else high


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError naming the file where there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fact = f"{path} does not exist; give a directory in the published layout"
        raise CheckpointError(fact, file=str(path)) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}", file=str(path)) from error
    except (ValueError, RecursionError) as error:
        fact = f"{path} is not valid JSON ({error}); fetch it again"
        raise CheckpointError(fact, file=str(path)) from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} holds a {type(raw).__name__}, not a JSON object", file=str(path))
    return raw


def _r32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _refused(field: str, value: object, why: str) -> UnsupportedModel:
    return UnsupportedModel(f"config field {field} = {value!r}: {why}", field=field)


class _Fields:
    """The fields of one JSON object not read yet; what is left at the end is unknown."""

    def __init__(self, raw: Mapping[str, Any], prefix: str = "") -> None:
        self._left = dict(raw)
        self._prefix = prefix

    def has(self, name: str) -> bool:
        return name in self._left

    def skip(self, names: frozenset[str]) -> None:
        for name in names:
            self._left.pop(name, None)

    def pop(self, name: str, *default: object) -> Any:
        if name not in self._left and not default:
            raise UnsupportedModel(f"config field {self._prefix}{name} is missing", field=self._prefix + name)
        return self._left.pop(name, *default)

    def fixed(self, table: Mapping[str, tuple[Any, ...]]) -> None:
        for name, allowed in table.items():
            if name not in self._left:
                continue
            value = self._left.pop(name)
            # 1 == True in Python: the type has to match as well.
            if not any(value == a and isinstance(value, bool) == isinstance(a, bool) for a in allowed):
                raise _refused(self._prefix + name, value, f"only {allowed[-1]!r} is implemented")

    def integer(self, name: str, *, least: int = 1) -> int:
        value = self.pop(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise _refused(self._prefix + name, value, f"must be an integer of at least {least}")
        return value

    def number(self, name: str) -> float:
        value = self.pop(name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise _refused(self._prefix + name, value, "must be a finite number above 0")
        return float(value)

    def end(self) -> None:
        for name, value in self._left.items():
            raise _refused(self._prefix + name, value, "is not a field of a DeepSeek-V4 model")


def _refuse_other_models(raw: Mapping[str, Any]) -> None:
    for name in raw:
        if name.startswith(_V41_FIELDS):
            raise _refused(name, raw[name], "belongs to DeepSeek-V4.1, which this program does not run")
    model_type = raw.get("model_type")
    if model_type != "deepseek_v4":
        raise _refused("model_type", model_type, "only 'deepseek_v4' is implemented")
    for name in ("layer_types", "rope_parameters"):
        if name in raw:
            raise _refused(name, raw[name], "is in the naming of transformers; run `bittrue convert` first")


def _split_ratios(value: object, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """compress_ratios = one entry per main layer, then one per draft layer."""
    name = "compress_ratios"
    if not isinstance(value, list):
        raise _refused(name, value, "must be a list of 0, 4 and 128")
    for ratio in value:
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in KIND_OF_RATIO:
            raise _refused(name, ratio, "every entry must be 0, 4 or 128")
    if len(value) < num_layers:
        raise _refused(name, value, f"has {len(value)} entries for {num_layers} layers")
    main, draft = tuple(value[:num_layers]), tuple(value[num_layers:])
    if any(draft):
        raise _refused(name, list(draft), "entries behind the main layers are draft layers and must be 0")
    return main, draft


def _plain_format(f: _Fields) -> ActDtype:
    values = {name: f.pop(name) for name in ("torch_dtype", "dtype") if f.has(name)}
    if not values:
        raise UnsupportedModel("config field torch_dtype is missing", field="torch_dtype")
    for name, value in values.items():
        if not isinstance(value, str) or value not in _TORCH_DTYPES:
            raise _refused(name, value, f"must be one of {sorted(_TORCH_DTYPES)}")
    if len(set(values.values())) > 1:
        raise _refused("dtype", values["dtype"], f"differs from torch_dtype = {values['torch_dtype']!r}")
    return _TORCH_DTYPES[next(iter(values.values()))]


def _matrix_formats(f: _Fields, plain: ActDtype) -> tuple[MatrixFormat, MatrixFormat]:
    """(dense, routed experts). A missing expert_dtype means the dense format (Base models: FP8)."""
    quantization = f.pop("quantization_config", None)
    dense: MatrixFormat = plain
    expert: object = f.pop("expert_dtype", None)
    if quantization is not None:
        if not isinstance(quantization, Mapping):
            raise _refused("quantization_config", quantization, "must be an object")
        q = _Fields(quantization, "quantization_config.")
        for name in ("quant_method", "weight_block_size", "scale_fmt"):
            if not q.has(name):
                q.pop(name)
        q.fixed(_FIXED_QUANTIZATION)
        inner = q.pop("expert_dtype", expert)
        if expert is not None and inner != expert:
            why = f"differs from expert_dtype = {expert!r}"
            raise _refused("quantization_config.expert_dtype", inner, why)
        expert = inner
        q.end()
        dense = "fp8"
    if expert is None:
        return dense, dense
    if isinstance(expert, str) and expert in _EXPERT_FORMATS:
        return dense, _EXPERT_FORMATS[expert]
    if isinstance(expert, str) and expert in _PLAIN_NAMES:
        return dense, plain  # "bf16" also stands in float32 checkpoints: it means "not quantised"
    raise _refused("expert_dtype", expert, f"must be one of {[*_EXPERT_FORMATS, *_PLAIN_NAMES]}")


def _yarn(value: object) -> Yarn | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _refused("rope_scaling", value, "must be an object or null")
    f = _Fields(value, "rope_scaling.")
    if not (f.has("type") or f.has("rope_type")):
        f.pop("rope_type")
    f.fixed(_FIXED_YARN)
    yarn = Yarn(
        factor=f.number("factor"),
        beta_fast=f.number("beta_fast") if f.has("beta_fast") else 32.0,
        beta_slow=f.number("beta_slow") if f.has("beta_slow") else 1.0,
        original_max_positions=f.integer("original_max_position_embeddings"),
    )
    f.end()
    return yarn


def _dspark(f: _Fields, num_layers: int) -> DSpark | None:
    if not f.has("dspark_block_size"):
        return None
    targets = f.pop("dspark_target_layer_ids")
    is_list = isinstance(targets, list) and bool(targets) and all(type(t) is int for t in targets)
    if not is_list or not all(0 <= t < num_layers for t in targets):
        raise _refused("dspark_target_layer_ids", targets, f"must list layers below {num_layers}")
    return DSpark(
        block_size=f.integer("dspark_block_size"),
        noise_token_id=f.integer("dspark_noise_token_id", least=0),
        target_layer_ids=tuple(targets),
        markov_rank=f.integer("dspark_markov_rank"),
    )


def _check_together(c: ModelConfig) -> None:
    """What no single field can show: sizes that have to fit each other."""
    index_dim, top = c.index_head_dim, c.experts_per_token
    in_vocab = f"must be below vocab_size = {c.vocab_size}"
    packs = "must be a multiple of 32 to pack FP4"
    checks = (
        ("head_dim", c.head_dim, c.head_dim % 2 == 0, "must be even"),
        ("qk_rope_head_dim", c.rope_dim, c.rope_dim % 2 == 0, "must be even"),
        ("qk_rope_head_dim", c.rope_dim, c.rope_dim < c.head_dim, f"must be below head_dim = {c.head_dim}"),
        ("index_head_dim", index_dim, index_dim >= c.rope_dim, "must hold the rotary features"),
        ("index_head_dim", index_dim, index_dim & (index_dim - 1) == 0, "must be a power of 2"),
        ("o_groups", c.o_groups, c.num_heads % c.o_groups == 0, f"must divide the {c.num_heads} heads"),
        ("num_experts_per_tok", top, top <= c.num_experts, f"must be at most {c.num_experts}"),
        ("hc_mult", c.hc_mult, c.hc_mult <= _MAX_STREAMS, f"must be at most {_MAX_STREAMS}"),
        (
            "max_position_embeddings",
            c.max_positions,
            c.max_positions <= _MAX_POSITIONS,
            f"must be at most {_MAX_POSITIONS}",
        ),
        ("num_hash_layers", c.num_hash_layers, c.num_hash_layers <= c.num_layers, "exceeds the layers"),
        ("bos_token_id", c.bos_id, c.bos_id < c.vocab_size, in_vocab),
        ("eos_token_id", c.eos_id, c.eos_id < c.vocab_size, in_vocab),
        ("hidden_size", c.hidden_size, _packs(c, c.hidden_size), packs),
        ("moe_intermediate_size", c.moe_intermediate_size, _packs(c, c.moe_intermediate_size), packs),
    )
    for name, value, holds, why in checks:
        if not holds:
            raise _refused(name, value, why)


def _packs(c: ModelConfig, size: int) -> bool:
    return c.expert_format != "fp4" or size % 32 == 0
