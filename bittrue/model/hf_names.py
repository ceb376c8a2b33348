"""How transformers 5.23 names tensors and config fields, against the official names (spec 2.11)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bittrue.errors import UnsupportedModel

_TOP: Mapping[str, str] = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
# Behind "layers.N.", for parts that do not repeat inside a layer.
_LAYER: Mapping[str, str] = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "hc_attn_fn": "attn_hc.fn",
    "hc_attn_base": "attn_hc.base",
    "hc_attn_scale": "attn_hc.scale",
    "hc_ffn_fn": "ffn_hc.fn",
    "hc_ffn_base": "ffn_hc.base",
    "hc_ffn_scale": "ffn_hc.scale",
}
_ATTENTION: Mapping[str, str] = {
    "attn_sink": "sinks",
    "wq_a": "q_a_proj",
    "q_norm": "q_a_norm",
    "wq_b": "q_b_proj",
    "wkv": "kv_proj",
    "kv_norm": "kv_norm",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
}
_COMPRESSOR: Mapping[str, str] = {
    "wkv": "kv_proj",
    "wgate": "gate_proj",
    "ape": "position_bias",
    "norm": "kv_norm",
}
_INDEXER: Mapping[str, str] = {"wq_b": "q_b_proj", "weights_proj": "scorer.weights_proj"}
_SHARED: Mapping[str, str] = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_KIND_RATIOS = {
    "sliding_attention": 0,
    "compressed_sparse_attention": 4,
    "heavily_compressed_attention": 128,
}


@dataclass(frozen=True, slots=True)
class HfPlace:
    """Where an official tensor lies in a transformers checkpoint: a whole tensor, or an expert of a stack."""

    name: str
    expert: int | None = None
    half: int | None = None  # of gate_up_proj: 0 = w1, 1 = w3


def state_dict_place(name: str) -> HfPlace:
    """Place of an official name (not mtp.*) in ``DeepseekV4ForCausalLM.state_dict()``."""
    if name in _TOP:
        return HfPlace(_TOP[name])
    _, layer, rest = name.split(".", 2)
    part, _, leaf = rest.partition(".")
    prefix = f"model.layers.{layer}."
    if part in _LAYER:
        return HfPlace(prefix + _LAYER[part] + (f".{leaf}" if leaf else ""))
    if part == "attn":
        return HfPlace(f"{prefix}self_attn.{_attention(leaf)}")
    return _feed_forward(f"{prefix}mlp.", leaf)


def saved_places(name: str) -> tuple[HfPlace, ...]:
    """Places where ``save_pretrained`` puts a tensor: which of them depends on how the model was loaded.

    It maps the names of state_dict() back, but not all of them, and every norm of a row to ``norm``.
    """
    place = state_dict_place(name)
    mapped_back = {**_TOP, "head.weight": "head.weight"}.get(name, "model." + name)
    return (
        place,
        replace(place, name=place.name.replace(".kv_norm.", ".norm.")),
        HfPlace(mapped_back.replace(".kv_norm.", ".norm.")),
    )


def official_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json as published, from one that transformers wrote (or from a published one: unchanged).

    transformers drops the draft layers. Raises UnsupportedModel naming the field it cannot translate.
    """
    out = dict(raw)
    if "layer_types" not in out:
        return out
    kinds = out.pop("layer_types")
    unknown = [kind for kind in kinds if kind not in _KIND_RATIOS]
    if unknown:
        raise _untranslated("layer_types", unknown[0])
    out["compress_ratios"] = [_KIND_RATIOS[kind] for kind in kinds]
    out["num_nextn_predict_layers"] = 0
    rates = out.pop("compress_rates", None)
    if rates is not None and any(_KIND_RATIOS.get(kind) != rate for kind, rate in rates.items()):
        raise _untranslated("compress_rates", rates)
    routers = out.pop("mlp_layer_types")
    out["num_hash_layers"] = routers.count("hash_moe")
    if routers != ["hash_moe"] * out["num_hash_layers"] + ["moe"] * (len(routers) - out["num_hash_layers"]):
        raise _untranslated("mlp_layer_types", routers)
    factor = out.pop("partial_rotary_factor")
    out["qk_rope_head_dim"] = int(out["head_dim"] * factor)
    rope = out.pop("rope_parameters")
    _official_rope(out, rope["main"], rope["compress"])
    if "dtype" in out:
        out["torch_dtype"] = out.pop("dtype")
    return dict(sorted(out.items()))


def _attention(leaf: str) -> str:
    part, _, rest = leaf.partition(".")
    if part == "compressor":
        return "compressor." + _renamed(rest, _COMPRESSOR)
    if part == "indexer":
        if rest.startswith("compressor."):
            return "compressor.indexer." + _renamed(rest.removeprefix("compressor."), _COMPRESSOR)
        return "compressor.indexer." + _renamed(rest, _INDEXER)
    return _renamed(leaf, _ATTENTION)


def _feed_forward(prefix: str, leaf: str) -> HfPlace:
    if leaf == "gate.bias":
        return HfPlace(prefix + "gate.e_score_correction_bias")
    if leaf.startswith("gate."):
        return HfPlace(prefix + leaf)
    if leaf.startswith("shared_experts."):
        return HfPlace(f"{prefix}shared_experts.{_renamed(leaf.removeprefix('shared_experts.'), _SHARED)}")
    _, expert, part, _ = leaf.split(".")
    if part == "w2":
        return HfPlace(prefix + "experts.down_proj", expert=int(expert))
    return HfPlace(prefix + "experts.gate_up_proj", expert=int(expert), half=0 if part == "w1" else 1)


def _renamed(leaf: str, table: Mapping[str, str]) -> str:
    part, dot, rest = leaf.partition(".")
    return table[part] + dot + rest


def _official_rope(out: dict[str, Any], main: Mapping[str, Any], compress: Mapping[str, Any]) -> None:
    if main.get("rope_type", "default") != "default":
        raise _untranslated("rope_parameters.main.rope_type", main["rope_type"])
    out["rope_theta"] = main["rope_theta"]
    out["compress_rope_theta"] = compress["rope_theta"]
    kind = compress.get("rope_type", "default")
    if kind == "default":
        return
    dropped = ("rope_theta", "partial_rotary_factor", "rope_type", "type")
    rest = {key: value for key, value in compress.items() if key not in dropped}
    out["rope_scaling"] = {**rest, "type": kind}


def _untranslated(field: str, value: object) -> UnsupportedModel:
    text = f"config field {field} = {value!r} has no counterpart in a published DeepSeek-V4 config"
    return UnsupportedModel(text, field=field)
