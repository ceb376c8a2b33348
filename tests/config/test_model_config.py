"""ModelConfig: what it reads from published configs, the rotary tables, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers.models.deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding

from bittrue.config.model import DSpark, ModelConfig, Yarn
from bittrue.errors import CheckpointError, UnsupportedModel

CONFIGS = Path(__file__).parent.parent / "golden" / "configs"
NAMES = ("flash", "pro", "flash_base", "pro_base", "flash_dspark", "pro_dspark")


def published(name: str, **changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads((CONFIGS / f"{name}.json").read_text())
    return {key: value for key, value in {**raw, **changes}.items() if value is not ...}


def test_flash_facts_are_read() -> None:
    c = ModelConfig.from_file(CONFIGS / "flash.json")
    assert (c.num_layers, c.hidden_size, c.num_heads, c.head_dim, c.rope_dim) == (43, 4096, 64, 512, 64)
    assert (c.num_experts, c.experts_per_token, c.num_hash_layers, c.routed_scale) == (256, 6, 3, 1.5)
    assert (c.window, c.index_topk, c.vocab_size, c.max_positions) == (128, 512, 129280, 1048576)
    assert c.yarn == Yarn(16.0, 32.0, 1.0, 65536)
    assert (c.bos_id, c.eos_id, c.num_mtp, c.dspark) == (0, 1, 1, None)


@pytest.mark.parametrize(("name", "counts"), [("flash", (2, 21, 20)), ("pro", (0, 30, 31))])
def test_layer_kinds_do_not_count_the_draft_entry(name: str, counts: tuple[int, int, int]) -> None:
    c = ModelConfig.from_file(CONFIGS / f"{name}.json")
    assert tuple(c.layer_kinds.count(kind) for kind in ("window", "csa", "hca")) == counts
    assert len(c.compress_ratios) == c.num_layers
    assert c.draft_ratios == (0,)


def test_a_dspark_config_has_three_draft_entries_while_it_says_one() -> None:
    c = ModelConfig.from_file(CONFIGS / "flash_dspark.json")
    assert c.draft_ratios == (0, 0, 0)
    assert c.num_mtp == 1
    assert c.dspark == DSpark(5, 128799, (40, 41, 42), 256)


def test_base_configs_have_fp8_experts_and_instruct_ones_fp4() -> None:
    formats = {n: ModelConfig.from_file(CONFIGS / f"{n}.json") for n in NAMES}
    assert {c.dense_format for c in formats.values()} == {"fp8"}
    assert {n: c.expert_format for n, c in formats.items() if "base" in n} == {
        "flash_base": "fp8",
        "pro_base": "fp8",
    }
    assert formats["flash"].expert_format == formats["pro_dspark"].expert_format == "fp4"
    assert {(c.default_level, c.default_act) for c in formats.values()} == {("published", "bf16")}


@pytest.mark.parametrize(("dtype", "act"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_an_unquantised_config_suggests_the_maths_level(dtype: str, act: str) -> None:
    # Published tools write expert_dtype bf16 beside torch_dtype float32.
    raw = published("flash", quantization_config=..., expert_dtype="bf16", torch_dtype=dtype)
    c = ModelConfig.from_dict(raw)
    assert (c.default_level, c.default_act) == ("maths", act)
    assert c.plain_format == c.dense_format == c.expert_format == act


def test_the_newer_spellings_of_dtype_and_expert_dtype_mean_the_same() -> None:
    raw = published("flash", torch_dtype=..., dtype="bfloat16", expert_dtype=...)
    raw["quantization_config"]["expert_dtype"] = "fp4"
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(published("flash"))


TABLES: dict[str, dict[str, Any]] = {
    "published": {},
    "no yarn": {"rope_scaling": None},
    "tiny": {"head_dim": 32, "qk_rope_head_dim": 8, "index_head_dim": 32},
    "narrow": {"head_dim": 64, "qk_rope_head_dim": 16, "index_head_dim": 64},
    "short context": {
        "max_position_embeddings": 16384,
        "rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 4096},
    },
}


@pytest.mark.parametrize("name", ["flash", "pro"])
@pytest.mark.parametrize("case", TABLES)
def test_rotary_tables_equal_those_of_transformers_bit_for_bit(name: str, case: str) -> None:
    raw = published(name, **TABLES[case])
    c = ModelConfig.from_dict(raw)
    theirs = DeepseekV4RotaryEmbedding(DeepseekV4Config.from_dict(json.loads(json.dumps(raw))))
    assert list(c.main_inv_freq()) == theirs.main_inv_freq.tolist()
    assert list(c.compress_inv_freq()) == theirs.compress_inv_freq.tolist()
    assert theirs.compress_attention_scaling == 1.0


def test_each_layer_has_the_rotary_table_of_its_kind() -> None:
    c = ModelConfig.from_file(CONFIGS / "flash.json")
    assert c.main_inv_freq() != c.compress_inv_freq()
    for layer, kind in enumerate(c.layer_kinds):
        expected = c.main_inv_freq() if kind == "window" else c.compress_inv_freq()
        assert c.layer_inv_freq(layer) == expected


YARN = published("flash")["rope_scaling"]
QUANTIZATION = published("flash")["quantization_config"]
REFUSED: list[tuple[str, Any, str]] = [
    ("model_type", "deepseek_v41", "model_type"),
    ("model_type", "deepseek_v3", "model_type"),
    ("model_type", ..., "model_type"),
    ("scoring_func", "softmax", "scoring_func"),
    ("topk_method", "greedy", "topk_method"),
    ("norm_topk_prob", False, "norm_topk_prob"),
    ("hidden_act", "gelu", "hidden_act"),
    ("num_key_value_heads", 8, "num_key_value_heads"),
    ("attention_bias", True, "attention_bias"),
    ("attention_dropout", 0.1, "attention_dropout"),
    ("tie_word_embeddings", True, "tie_word_embeddings"),
    ("n_shared_experts", 2, "n_shared_experts"),
    ("compress_ratios", [0, 2] * 22, "compress_ratios"),
    ("compress_ratios", [0, 4] * 20, "compress_ratios"),
    ("compress_ratios", [0] * 43 + [4], "compress_ratios"),
    ("rope_scaling", {**YARN, "type": "linear"}, "rope_scaling.type"),
    ("rope_scaling", {**YARN, "mscale": 0.7}, "rope_scaling.mscale"),
    ("rope_scaling", {**YARN, "attention_factor": 1.2}, "rope_scaling.attention_factor"),
    ("rope_scaling", "yarn", "rope_scaling"),
    (
        "quantization_config",
        {**QUANTIZATION, "weight_block_size": [32, 32]},
        "quantization_config.weight_block_size",
    ),
    ("quantization_config", {**QUANTIZATION, "scale_fmt": "float"}, "quantization_config.scale_fmt"),
    ("quantization_config", {**QUANTIZATION, "quant_method": "awq"}, "quantization_config.quant_method"),
    ("quantization_config", {**QUANTIZATION, "kv": 1}, "quantization_config.kv"),
    ("expert_dtype", "int4", "expert_dtype"),
    ("torch_dtype", "float16", "torch_dtype"),
    ("torch_dtype", ..., "torch_dtype"),
    ("hidden_size", "4096", "hidden_size"),
    ("hidden_size", True, "hidden_size"),
    ("hidden_size", 0, "hidden_size"),
    ("hidden_size", ..., "hidden_size"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"),
    ("swiglu_limit", 0.0, "swiglu_limit"),
    ("qk_rope_head_dim", 63, "qk_rope_head_dim"),
    ("index_head_dim", 96, "index_head_dim"),
    ("o_groups", 7, "o_groups"),
    ("num_experts_per_tok", 257, "num_experts_per_tok"),
    ("hc_mult", 9, "hc_mult"),
    ("head_dim", 511, "head_dim"),
    ("max_position_embeddings", 2**24 + 1, "max_position_embeddings"),
    ("num_hash_layers", 44, "num_hash_layers"),
    ("eos_token_id", [1, 2], "eos_token_id"),
    ("moe_intermediate_size", 2040, "moe_intermediate_size"),
    ("kv_source_layer_ids", [2, 8], "kv_source_layer_ids"),
    ("engram_layer_ids", [1], "engram_layer_ids"),
    ("dspark_n_routed_experts", 128, "dspark_n_routed_experts"),
    ("layer_types", ["sliding_attention"], "layer_types"),
    ("window_size", 128, "window_size"),
]


@pytest.mark.parametrize(
    ("key", "value", "field"), REFUSED, ids=[f"{i}-{r[0]}" for i, r in enumerate(REFUSED)]
)
def test_a_value_that_is_not_implemented_is_refused_by_name(key: str, value: Any, field: str) -> None:
    with pytest.raises(UnsupportedModel) as caught:
        ModelConfig.from_dict(published("flash", **{key: value}))
    assert caught.value.field == field
    assert field in str(caught.value)
    if isinstance(value, str):
        assert value in str(caught.value)


def test_v41_is_refused_as_v41() -> None:
    with pytest.raises(UnsupportedModel, match="V4.1"):
        ModelConfig.from_dict({"model_type": "deepseek_v41", "text_config": {"hidden_size": 5120}})


def test_a_file_that_is_not_a_config_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content in (None, "{", "[1]", b"\xff\xfe"):
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            path.write_text(content)
        with pytest.raises(CheckpointError) as caught:
            ModelConfig.from_file(path)
        assert caught.value.file == str(path)
