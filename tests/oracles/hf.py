"""Hugging Face transformers' DeepSeek-V4 in float32, built from a checkpoint in the published layout."""

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from oracles.formats import load_matrix
from torch import Tensor
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the import of a third party is not what the tests watch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache
    from transformers.utils import logging as hf_logging

MODES = ("full", "chunked", "decode")

# Official name inside a layer -> name in transformers.
LAYER_NAMES = {
    "attn_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attn.attn_sink": "self_attn.sinks",
    "attn.wq_a.weight": "self_attn.q_a_proj.weight",
    "attn.q_norm.weight": "self_attn.q_a_norm.weight",
    "attn.wq_b.weight": "self_attn.q_b_proj.weight",
    "attn.wkv.weight": "self_attn.kv_proj.weight",
    "attn.kv_norm.weight": "self_attn.kv_norm.weight",
    "attn.wo_a.weight": "self_attn.o_a_proj.weight",
    "attn.wo_b.weight": "self_attn.o_b_proj.weight",
    "attn.indexer.wq_b.weight": "self_attn.compressor.indexer.q_b_proj.weight",
    "attn.indexer.weights_proj.weight": "self_attn.compressor.indexer.scorer.weights_proj.weight",
    "ffn.gate.weight": "mlp.gate.weight",
    "ffn.gate.bias": "mlp.gate.e_score_correction_bias",
    "ffn.gate.tid2eid": "mlp.gate.tid2eid",
    "ffn.shared_experts.w1.weight": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared_experts.w3.weight": "mlp.shared_experts.up_proj.weight",
    "ffn.shared_experts.w2.weight": "mlp.shared_experts.down_proj.weight",
    **{
        f"hc_{part}_{leaf}": f"{part}_hc.{leaf}"
        for part in ("attn", "ffn")
        for leaf in ("fn", "base", "scale")
    },
    **{
        f"attn.{inner}compressor.{ours}": f"self_attn.compressor.{inner}{theirs}"
        for inner in ("", "indexer.")
        for ours, theirs in (
            ("ape", "position_bias"),
            ("wkv.weight", "kv_proj.weight"),
            ("wgate.weight", "gate_proj.weight"),
            ("norm.weight", "kv_norm.weight"),
        )
    },
}
TOP_NAMES = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    **{f"hc_head_{leaf}": f"model.hc_head.hc_{leaf}" for leaf in ("fn", "base", "scale")},
}


def build_hf(raw_config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DeepseekV4ForCausalLM:
    """The model in float32 with the same weights, FP8 and FP4 dequantised exactly. Drafts are left out."""
    left_out = ("quantization_config", "expert_dtype")
    # A copy: transformers writes into the rope dictionaries it is given.
    raw = {key: copy.deepcopy(value) for key, value in raw_config.items() if key not in left_out}
    with quiet():
        config = DeepseekV4Config(**{**raw, "torch_dtype": "float32"}, attn_implementation="eager")
        model = DeepseekV4ForCausalLM(config).float().eval()
        model.requires_grad_(False)
        model.load_state_dict(hf_state(raw_config, tensors), strict=True)
    return model


def hf_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state = {theirs: value_of(tensors, ours) for ours, theirs in TOP_NAMES.items()}
    for layer in range(config["num_hidden_layers"]):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        for name, hf_name in LAYER_NAMES.items():
            if ours + name in tensors:
                state[theirs + hf_name] = value_of(tensors, ours + name)
        experts = [f"{ours}ffn.experts.{i}." for i in range(config["n_routed_experts"])]
        state[f"{theirs}mlp.experts.gate_up_proj"] = torch.stack(
            [torch.cat([value_of(tensors, f"{e}{w}.weight") for w in ("w1", "w3")]) for e in experts]
        )
        state[f"{theirs}mlp.experts.down_proj"] = torch.stack(
            [value_of(tensors, f"{e}w2.weight") for e in experts]
        )
    return state


def value_of(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name.endswith(".tid2eid"):
        return tensors[name]
    if name.endswith(".weight"):
        return load_matrix(tensors, name.removesuffix(".weight"), torch.float32).values
    return tensors[name].to(torch.float32)


def hf_logits(
    model: DeepseekV4ForCausalLM, ids: list[int], mode: str = "full", *, chunk: int = 64, prefill: int = 0
) -> Tensor:
    """Logits [T, V] float32 of one sequence.

    full: one forward without cache. chunked: prefill in pieces of ``chunk`` tokens. decode: first
    ``prefill`` tokens at once (0: none), then token by token.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is none of {MODES}")
    tokens = torch.tensor(ids, dtype=torch.int64)[None]
    with torch.no_grad(), quiet():
        if mode == "full":
            return model(tokens, use_cache=False).logits[0].float()
        cache = DynamicCache(config=model.config)
        pieces = tokens.split(chunk, dim=1)
        if mode == "decode":
            pieces = tokens[:, :prefill].split(max(prefill, 1), dim=1) if prefill else ()
            pieces = (*pieces, *tokens[:, prefill:].split(1, dim=1))
        parts = [model(piece, past_key_values=cache, use_cache=True).logits[0] for piece in pieces]
    return torch.cat(parts).float()


class OrderedTopK(TorchFunctionMode):
    """Answers every ``topk`` by (value descending, id ascending); everything else passes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.topk, torch.Tensor.topk):
            return ordered_topk(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def ordered_topk(
    x: Tensor,
    k: int,
    dim: int = -1,
    largest: bool = True,
    sorted: bool = True,  # noqa: A002 - torch's signature
) -> torch.return_types.topk:
    ordered = x.sort(dim=dim, descending=largest, stable=True)
    picks = (ordered.values.narrow(dim, 0, k), ordered.indices.narrow(dim, 0, k))
    return torch.return_types.topk(picks)


@contextmanager
def deterministic_topk(model: DeepseekV4ForCausalLM) -> Iterator[DeepseekV4ForCausalLM]:
    """Within the context, index and router selection of transformers break ties by the smaller id.

    torch.topk leaves ties open and settles them differently for different widths: with few index heads ReLU
    makes exact zeros, and transformers then disagrees with itself between decode and one-shot prefill.
    """
    with OrderedTopK():
        yield model


@contextmanager
def quiet() -> Iterator[None]:
    """Transformers' own warnings and log lines do not become test failures."""
    level = hf_logging.get_verbosity()
    hf_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf_logging.set_verbosity(level)
