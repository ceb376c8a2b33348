"""Writes a checkpoint in the published layout as GGUF (architecture deepseek4)."""

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file
from torch import Tensor

TYPES = {
    "f32": GGMLQuantizationType.F32,
    "bf16": GGMLQuantizationType.BF16,
    "q8_0": GGMLQuantizationType.Q8_0,
}
FILE_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7}
SQRT_SOFTPLUS = 4  # llama.cpp's number of the router's score function

ROOT_NAMES = {
    "embed.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    "hc_head_fn": "output_hc_fn.weight",
    "hc_head_base": "output_hc_base.weight",
    "hc_head_scale": "output_hc_scale.weight",
}
LAYER_NAMES = {
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.kv_norm.weight": "attn_kv_a_norm.weight",
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    **{f"hc_{p}_{x}": f"hc_{p}_{x}.weight" for p in ("attn", "ffn") for x in ("fn", "base", "scale")},
}
EXPERT_NAMES = {"w1": "ffn_gate_exps", "w2": "ffn_down_exps", "w3": "ffn_up_exps"}
STAYS_F32 = ("ape", "hc_", "gate_inp", "norm", "sink", "exp_probs")


def write_gguf(directory: Path, out: Path, *, matrices: str, pre: str) -> None:
    """``matrices`` is the type of every matrix (one of TYPES); ``pre`` names the tokenizer's first split."""
    config = json.loads((directory / "config.json").read_text())
    tensors = load_file(directory / "model.safetensors")
    writer = GGUFWriter(str(out), "deepseek4")
    writer.add_string("general.name", directory.name)
    writer.add_uint32("general.file_type", FILE_TYPES[matrices])
    _write_config(writer, config)
    _write_tokenizer(writer, directory, config, pre)
    for name, tensor in tensors.items():
        target = _name(name)
        if target is not None:
            _add(writer, target, tensor, matrices)
    for layer in range(config["num_hidden_layers"]):
        for ours, theirs in EXPERT_NAMES.items():
            experts = range(config["n_routed_experts"])
            stacked = [tensors[f"layers.{layer}.ffn.experts.{e}.{ours}.weight"].float() for e in experts]
            _add(writer, f"blk.{layer}.{theirs}.weight", torch.stack(stacked), matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: GGUFWriter, c: Mapping[str, Any]) -> None:
    layers = c["num_hidden_layers"]
    integers = {
        "vocab_size": c["vocab_size"],
        "context_length": c["max_position_embeddings"],
        "embedding_length": c["hidden_size"],
        "embedding_length_out": c["hidden_size"] * c["hc_mult"],
        "block_count": layers,
        "feed_forward_length": c["moe_intermediate_size"],
        "attention.head_count": c["num_attention_heads"],
        "attention.head_count_kv": 1,
        "attention.key_length": c["head_dim"],
        "attention.value_length": c["head_dim"],
        "attention.q_lora_rank": c["q_lora_rank"],
        "attention.sliding_window": c["sliding_window"],
        "attention.output_group_count": c["o_groups"],
        "attention.output_lora_rank": c["o_lora_rank"],
        "attention.indexer.head_count": c["index_n_heads"],
        "attention.indexer.key_length": c["index_head_dim"],
        "attention.indexer.top_k": c["index_topk"],
        "hyper_connection.count": c["hc_mult"],
        "hyper_connection.sinkhorn_iterations": c["hc_sinkhorn_iters"],
        "hash_layer_count": c["num_hash_layers"],
        "rope.dimension_count": c["qk_rope_head_dim"],
        "expert_count": c["n_routed_experts"],
        "expert_used_count": c["num_experts_per_tok"],
        "expert_feed_forward_length": c["moe_intermediate_size"],
        "expert_shared_count": c["n_shared_experts"],
        "expert_gating_func": SQRT_SOFTPLUS,
    }
    floats = {
        "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        "attention.compress_rope_freq_base": c["compress_rope_theta"],
        "hyper_connection.epsilon": c["hc_eps"],
        "rope.freq_base": c["rope_theta"],
        "expert_weights_scale": c["routed_scaling_factor"],
    }
    arrays = {
        "attention.compress_ratios": [int(ratio) for ratio in c["compress_ratios"]],
        "swiglu_clamp_exp": [float(c["swiglu_limit"])] * layers,
        "swiglu_clamp_shexp": [float(c["swiglu_limit"])] * layers,
    }
    for name, integer in integers.items():
        writer.add_uint32(f"deepseek4.{name}", integer)
    for name, number in floats.items():
        writer.add_float32(f"deepseek4.{name}", number)
    for name, array in arrays.items():
        writer.add_array(f"deepseek4.{name}", array)
    writer.add_bool("deepseek4.expert_weights_norm", c["norm_topk_prob"])
    _write_yarn(writer, c["rope_scaling"])


def _write_yarn(writer: GGUFWriter, yarn: Mapping[str, Any] | None) -> None:
    if yarn is None:
        return
    writer.add_string("deepseek4.rope.scaling.type", "yarn")
    writer.add_float32("deepseek4.rope.scaling.factor", yarn["factor"])
    writer.add_uint32(
        "deepseek4.rope.scaling.original_context_length", yarn["original_max_position_embeddings"]
    )
    writer.add_float32("deepseek4.rope.scaling.yarn_beta_fast", yarn["beta_fast"])
    writer.add_float32("deepseek4.rope.scaling.yarn_beta_slow", yarn["beta_slow"])


def _write_tokenizer(writer: GGUFWriter, directory: Path, config: Mapping[str, Any], pre: str) -> None:
    """A byte-level BPE. Ids that the tokenizer leaves out are named and marked unused."""
    document = json.loads((directory / "tokenizer.json").read_text())
    normal, control, unused = 1, 3, 5
    tokens = [f"[unused{i}]" for i in range(config["vocab_size"])]
    kinds = [unused] * len(tokens)
    for token, i in document["model"]["vocab"].items():
        tokens[i], kinds[i] = token, normal
    for added in document["added_tokens"]:
        tokens[added["id"]], kinds[added["id"]] = added["content"], control
    merges = [m if isinstance(m, str) else " ".join(m) for m in document["model"]["merges"]]
    writer.add_string("tokenizer.ggml.model", "gpt2")
    writer.add_string("tokenizer.ggml.pre", pre)
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", kinds)
    writer.add_array("tokenizer.ggml.merges", merges)
    writer.add_uint32("tokenizer.ggml.bos_token_id", config["bos_token_id"])
    writer.add_uint32("tokenizer.ggml.eos_token_id", config["eos_token_id"])
    writer.add_bool("tokenizer.ggml.add_bos_token", True)


def _name(official: str) -> str | None:
    """The GGUF name of a tensor; None for routed experts, which GGUF stacks."""
    if official in ROOT_NAMES:
        return ROOT_NAMES[official]
    found = re.match(r"layers\.(\d+)\.(.+)", official)
    if found is None:
        raise ValueError(f"{official} has no name in GGUF")
    layer, rest = found.groups()
    return None if rest.startswith("ffn.experts.") else f"blk.{layer}.{LAYER_NAMES[rest]}"


def _add(writer: GGUFWriter, name: str, tensor: Tensor, matrices: str) -> None:
    if tensor.dtype == torch.int64:  # the hash router's table
        writer.add_tensor(name, tensor.to(torch.int32).numpy())
        return
    values = np.ascontiguousarray(tensor.float().numpy())
    kind = TYPES["f32" if values.ndim < 2 or any(part in name for part in STAYS_F32) else matrices]
    if kind is GGMLQuantizationType.F32:
        writer.add_tensor(name, values)
    else:
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--matrices", choices=TYPES, default="bf16")
    parser.add_argument("--pre", default="gpt-2", help="gpt-2 for llama.cpp, joyai-llm for flyweight-llm")
    arguments = parser.parse_args()
    write_gguf(arguments.directory, arguments.out, matrices=arguments.matrices, pre=arguments.pre)


if __name__ == "__main__":
    main()
