"""An independent simulation of DeepSeek-V4: one whole sequence in plain torch, no cache, no chunks.

Written from the model's specification alone, so that it can contradict the package. Two levels:

  maths      no quantisation of activations, keys or values; ``act`` float32 or bfloat16.
  published  bfloat16 activations, in FP8 before FP8/FP4 weights; FP8 keys/values; Hadamard + FP4 index path.

Every intermediate is a tensor of ``compute`` dtype that holds values already rounded to ``act`` where the
model rounds. Running with compute = float64 takes the order of additions out of the picture: the distance
between the float32 and the float64 run of the same checkpoint is the noise that any correct implementation
may show, and it is what tolerances at the published level should be derived from.

Choices the published reference leaves open or makes otherwise, fixed here: the per-head query norm is
computed in float32 and rounded once (the reference: bf16 tensor arithmetic); index scores stay float32 (the
reference: bf16); every top-k goes by (value descending, id ascending); routed experts are added in ascending
id order, in hash layers in table order; each expert's output is rounded to ``act`` before it is added.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from oracles.formats import Matrix, hadamard, load_matrix, quant_fp4, quant_fp8
from torch import Tensor

CSA_RATIO = 4
QUERY_BLOCK = (
    128  # queries handled at once in attention and index scores: bounds memory, changes nothing else
)
NEG_INF = float("-inf")

RawConfig = Mapping[str, Any]


@dataclass(slots=True)
class Trace:
    """What one run saw: ids by layer, [T, k], -1 for none; residual streams [T, M, D] after each layer."""

    logits: Tensor | None = None
    index_ids: dict[int, Tensor] = field(default_factory=dict)
    index_margins: dict[int, Tensor] = field(
        default_factory=dict
    )  # [T] score gap between last pick and first loser
    expert_ids: dict[int, Tensor] = field(default_factory=dict)
    streams: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """Where values are rounded, and what is quantised."""

    published: bool
    act: torch.dtype
    compute: torch.dtype

    def round(self, x: Tensor) -> Tensor:
        return x.to(self.act).to(self.compute)

    def linear(self, x: Tensor, weight: Matrix) -> Tensor:
        """x [..., K] by weight [O, K], unrounded. At the published level FP8/FP4 weights take FP8 inputs."""
        if self.published and weight.is_quantised:
            x = quant_fp8(x, 128)
        return x @ weight.values.T

    def rms(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        normed = x / torch.sqrt(x.square().mean(-1, keepdim=True) + eps)
        return self.round(normed if weight is None else weight * normed)


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint: raw config.json and tensors under their official names."""

    config: RawConfig
    tensors: Mapping[str, Tensor]
    arith: Arithmetic

    def matrix(self, name: str) -> Matrix:
        return load_matrix(self.tensors, name, self.arith.compute)

    def vector(self, name: str) -> Tensor:
        return self.tensors[name].to(torch.float32).to(self.arith.compute)


def published_logits(
    config: RawConfig,
    tensors: Mapping[str, Tensor],
    token_ids: list[int],
    *,
    level: str = "published",
    act: torch.dtype = torch.bfloat16,
    compute: torch.dtype = torch.float32,
) -> Tensor:
    """Logits [T, V] float32 of one sequence starting at position 0."""
    logits = published_trace(config, tensors, token_ids, level=level, act=act, compute=compute).logits
    assert logits is not None
    return logits


def published_trace(
    config: RawConfig,
    tensors: Mapping[str, Tensor],
    token_ids: list[int],
    *,
    level: str = "published",
    act: torch.dtype = torch.bfloat16,
    compute: torch.dtype = torch.float32,
) -> Trace:
    """As ``published_logits``, with index selections, expert ids and the residual streams of every layer."""
    if level not in ("maths", "published"):
        raise ValueError(f"level {level!r} is neither 'maths' nor 'published'")
    arith = Arithmetic(level == "published", act, compute)
    source = Source(config, tensors, arith)
    trace = Trace()
    with torch.no_grad():
        tokens = torch.tensor(token_ids, dtype=torch.int64)
        embedded = arith.round(source.vector("embed.weight")[tokens])
        streams = embedded[:, None, :].expand(-1, config["hc_mult"], -1)
        for layer in range(config["num_hidden_layers"]):
            prefix = f"layers.{layer}."
            x, post, comb = hyper_pre(source, streams, f"{prefix}hc_attn")
            x = arith.rms(x, source.vector(f"{prefix}attn_norm.weight"), config["rms_norm_eps"])
            streams = hyper_post(arith, attention(source, x, layer, trace), streams, post, comb)
            x, post, comb = hyper_pre(source, streams, f"{prefix}hc_ffn")
            x = arith.rms(x, source.vector(f"{prefix}ffn_norm.weight"), config["rms_norm_eps"])
            streams = hyper_post(arith, experts(source, x, tokens, layer, trace), streams, post, comb)
            trace.streams.append(streams)
        hidden = arith.rms(hyper_head(source, streams), source.vector("norm.weight"), config["rms_norm_eps"])
        trace.logits = (hidden @ source.vector("head.weight").T).to(torch.float32)
    return trace


# ---- hyper-connections -----------------------------------------------


def hyper_mix(source: Source, streams: Tensor, fn: str) -> Tensor:
    flat = streams.flatten(1)
    inverse = 1 / torch.sqrt(flat.square().mean(-1, keepdim=True) + source.config["rms_norm_eps"])
    return (flat @ source.vector(fn).T) * inverse


def hyper_pre(source: Source, streams: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Sub-layer input [T, D], post [T, M], comb [T, M, M] whose row is the source stream."""
    count, eps = source.config["hc_mult"], source.config["hc_eps"]
    mix = hyper_mix(source, streams, f"{name}_fn")
    base, scale = source.vector(f"{name}_base"), source.vector(f"{name}_scale")
    pre = torch.sigmoid(mix[:, :count] * scale[0] + base[:count]) + eps
    post = 2 * torch.sigmoid(mix[:, count : 2 * count] * scale[1] + base[count : 2 * count])
    comb = (mix[:, 2 * count :] * scale[2] + base[2 * count :]).unflatten(-1, (count, count))
    comb = torch.softmax(comb, dim=-1) + eps
    comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    for _ in range(source.config["hc_sinkhorn_iters"] - 1):
        comb = comb / (comb.sum(dim=-1, keepdim=True) + eps)
        comb = comb / (comb.sum(dim=-2, keepdim=True) + eps)
    return source.arith.round((pre[..., None] * streams).sum(1)), post, comb


def hyper_post(arith: Arithmetic, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return arith.round(post[..., None] * y[:, None, :] + torch.einsum("tjk,tjd->tkd", comb, streams))


def hyper_head(source: Source, streams: Tensor) -> Tensor:
    mix = hyper_mix(source, streams, "hc_head_fn")
    gain = (
        torch.sigmoid(mix * source.vector("hc_head_scale") + source.vector("hc_head_base"))
        + source.config["hc_eps"]
    )
    return source.arith.round((gain[..., None] * streams).sum(1))


# ---- rotary embedding -----------------------------------------------


def rope_frequencies(config: RawConfig, ratio: int) -> Tensor:
    """Inverse frequencies [R/2] float32 of a layer with this compress ratio (0: plain base, no scaling)."""
    dim = config["qk_rope_head_dim"]
    theta = float(config["compress_rope_theta"] if ratio else config["rope_theta"])
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    scaling = config.get("rope_scaling")
    if not ratio or not scaling or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return freqs
    original = scaling["original_max_position_embeddings"]

    def correction_index(rotations: float) -> float:
        return dim * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(correction_index(scaling.get("beta_fast", 32))), 0)
    high = min(math.ceil(correction_index(scaling.get("beta_slow", 1))), dim - 1)
    span = (high - low) or 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return (freqs / scaling["factor"]) * ramp + freqs * (1 - ramp)


def rope(arith: Arithmetic, x: Tensor, positions: Tensor, freqs: Tensor, *, inverse: bool = False) -> Tensor:
    """Rotate adjacent pairs of the last R features of x [T, ..., c]; positions [T]. Rounded to act."""
    angle = positions.to(torch.float32)[:, None] * freqs
    cos, sin = (fn(angle.double()).float().to(arith.compute) for fn in (torch.cos, torch.sin))
    if inverse:
        sin = -sin
    shape = (x.shape[0],) + (1,) * (x.dim() - 2) + (freqs.shape[0],)
    cos, sin = cos.view(shape), sin.view(shape)
    width = 2 * freqs.shape[0]
    even, odd = x[..., -width::2], x[..., -width + 1 :: 2]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    return arith.round(torch.cat((x[..., :-width], turned), dim=-1))


# ---- attention -----------------------------------------------


def attention(source: Source, x: Tensor, layer: int, trace: Trace) -> Tensor:
    """x [T, D] -> [T, D], rounded."""
    config, arith = source.config, source.arith
    prefix, eps = f"layers.{layer}.attn.", config["rms_norm_eps"]
    ratio = config["compress_ratios"][layer]
    heads, head_dim = config["num_attention_heads"], config["head_dim"]
    freqs = rope_frequencies(config, ratio)
    positions = torch.arange(x.shape[0])

    latent = arith.round(arith.linear(x, source.matrix(f"{prefix}wq_a")))
    latent = arith.rms(latent, source.vector(f"{prefix}q_norm.weight"), eps)
    q = arith.round(arith.linear(latent, source.matrix(f"{prefix}wq_b"))).unflatten(-1, (heads, head_dim))
    q = rope(arith, arith.rms(q, None, eps), positions, freqs)
    rows = arith.round(arith.linear(x, source.matrix(f"{prefix}wkv")))
    rows = arith.rms(rows, source.vector(f"{prefix}kv_norm.weight"), eps)
    rows = stored_row(source, rope(arith, rows, positions, freqs))

    entries = rows.new_zeros((0, head_dim))
    allowed = torch.zeros((x.shape[0], 0), dtype=torch.bool)
    if ratio:
        entries = stored_row(source, compress(source, x, f"{prefix}compressor.", ratio, head_dim, freqs))
        allowed = visible_entries(x.shape[0], ratio)
    if ratio == CSA_RATIO:
        allowed = index_selection(source, x, latent, layer, freqs, trace)
    out = attend(source, q, rows, entries, allowed, source.vector(f"{prefix}attn_sink"))
    return output_projection(source, rope(arith, out, positions, freqs, inverse=True), prefix)


def stored_row(source: Source, row: Tensor) -> Tensor:
    """What the cache keeps of a rotated row [.., c]: FP8 in groups of 64 but for the rotary features."""
    if not source.arith.published:
        return row
    split = row.shape[-1] - source.config["qk_rope_head_dim"]
    return torch.cat((quant_fp8(row[..., :split], 64), row[..., split:]), dim=-1)


def visible_entries(length: int, ratio: int) -> Tensor:
    """[T, floor(T / ratio)]: entry s is visible to query t when s < floor((t + 1) / ratio)."""
    return torch.arange(length // ratio)[None, :] < ((torch.arange(length) + 1) // ratio)[:, None]


def attend(source: Source, q: Tensor, rows: Tensor, entries: Tensor, allowed: Tensor, sink: Tensor) -> Tensor:
    """q [T, N, c], window rows [T, c], entries [C, c], allowed [T, C], sink [N] -> [T, N, c], rounded."""
    window, scale = source.config["sliding_window"], q.shape[-1] ** -0.5
    keys = torch.cat((rows, entries))
    position = torch.arange(rows.shape[0])
    outputs = []
    for begin in range(0, q.shape[0], QUERY_BLOCK):
        block = slice(begin, begin + QUERY_BLOCK)
        query = position[block, None]
        near = (position <= query) & (position > query - window)
        mask = torch.cat((near, allowed[block]), dim=-1)
        logits = torch.einsum("tnc,rc->tnr", q[block], keys) * scale
        logits = logits.masked_fill(~mask[:, None, :], NEG_INF)
        peak = logits.amax(-1, keepdim=True)  # over real rows only: the sink stays outside
        weight = torch.exp(logits - peak)
        total = weight.sum(-1, keepdim=True) + torch.exp(sink[:, None] - peak)
        if source.arith.published:
            weight = weight.to(torch.bfloat16).to(weight.dtype)
        outputs.append(source.arith.round(torch.einsum("tnr,rc->tnc", weight, keys) / total))
    return torch.cat(outputs)


def output_projection(source: Source, out: Tensor, prefix: str) -> Tensor:
    """Heads in groups through wo_a, whose input is never quantised, then wo_b. out [T, N, c] -> [T, D]."""
    arith, groups = source.arith, source.config["o_groups"]
    grouped = out.reshape(out.shape[0], groups, -1)
    low = source.matrix(f"{prefix}wo_a").values.unflatten(0, (groups, -1))
    low_rank = arith.round(torch.einsum("tgk,gok->tgo", grouped, low)).flatten(1)
    return arith.round(arith.linear(low_rank, source.matrix(f"{prefix}wo_b")))


# ---- compressors and index -----------------------------------------------


def compress(source: Source, x: Tensor, prefix: str, ratio: int, dim: int, freqs: Tensor) -> Tensor:
    """Entries [floor(T / ratio), dim] after pooling, norm and rope, before quantisation."""
    arith = source.arith
    count = x.shape[0] // ratio
    x = x[: count * ratio]
    value = (x @ source.matrix(f"{prefix}wkv").values.T).unflatten(0, (count, ratio))
    gate = (x @ source.matrix(f"{prefix}wgate").values.T).unflatten(0, (count, ratio)) + source.vector(
        f"{prefix}ape"
    )
    if ratio == CSA_RATIO:
        value = with_previous_window(value, dim, 0.0)
        gate = with_previous_window(gate, dim, NEG_INF)
    pooled = arith.round((torch.softmax(gate, dim=1) * value).sum(1))
    normed = arith.rms(pooled, source.vector(f"{prefix}norm.weight"), source.config["rms_norm_eps"])
    return rope(arith, normed, torch.arange(count) * ratio, freqs)


def with_previous_window(slots: Tensor, dim: int, missing: float) -> Tensor:
    """[W, 4, 2 dim] -> [W, 8, dim]: half A of the previous window's tokens, then half B of its own."""
    previous = torch.full_like(slots[..., :dim], missing)
    previous[1:] = slots[:-1, :, :dim]
    return torch.cat((previous, slots[..., dim:]), dim=1)


def index_selection(
    source: Source, x: Tensor, latent: Tensor, layer: int, freqs: Tensor, trace: Trace
) -> Tensor:
    """[T, C] bool: the entries each query may attend to in a CSA layer."""
    config, arith, prefix = source.config, source.arith, f"layers.{layer}.attn.indexer."
    heads, dim = config["index_n_heads"], config["index_head_dim"]
    q = arith.round(arith.linear(latent, source.matrix(f"{prefix}wq_b"))).unflatten(-1, (heads, dim))
    q = stored_key(source, rope(arith, q, torch.arange(x.shape[0]), freqs))
    keys = stored_key(source, compress(source, x, f"{prefix}compressor.", CSA_RATIO, dim, freqs))
    head_weights = (x @ source.matrix(f"{prefix}weights_proj").values.T) * dim**-0.5 * heads**-0.5
    scores = torch.cat(
        [
            (
                torch.relu(torch.einsum("thc,sc->ths", q[i : i + QUERY_BLOCK], keys))
                * head_weights[i : i + QUERY_BLOCK, :, None]
            ).sum(1)
            for i in range(0, x.shape[0], QUERY_BLOCK)
        ]
    )
    visible = visible_entries(x.shape[0], CSA_RATIO)
    scores = scores.masked_fill(~visible, NEG_INF)
    k = min(config["index_topk"], scores.shape[1])
    ordered, ids = scores.sort(
        dim=-1, descending=True, stable=True
    )  # stable: equal scores keep ascending ids
    selected = torch.zeros_like(visible).scatter_(1, ids[:, :k], True) & visible
    trace.index_ids[layer] = ids_ascending(selected, config["index_topk"])
    if k < scores.shape[1]:
        trace.index_margins[layer] = (ordered[:, k - 1] - ordered[:, k]).nan_to_num(nan=math.inf)
    return selected


def stored_key(source: Source, key: Tensor) -> Tensor:
    """Index queries and keys as scored: Hadamard, rounded, FP4 in groups of 32 (published level only)."""
    if not source.arith.published:
        return key  # the transform is orthogonal: on both sides of the product it changes nothing
    return quant_fp4(source.arith.round(hadamard(key)), 32)


def ids_ascending(selected: Tensor, k: int) -> Tensor:
    """[T, C] bool -> [T, k] ids in ascending order, -1 where there are fewer."""
    ids = torch.arange(selected.shape[1]).expand_as(selected).masked_fill(~selected, selected.shape[1])
    ids = torch.nn.functional.pad(ids, (0, k), value=selected.shape[1]).sort(dim=-1).values[:, :k]
    return ids.masked_fill(ids >= selected.shape[1], -1)


# ---- mixture of experts -----------------------------------------------


def experts(source: Source, x: Tensor, tokens: Tensor, layer: int, trace: Trace) -> Tensor:
    """x [T, D] -> routed plus shared experts [T, D], rounded."""
    config, arith, prefix = source.config, source.arith, f"layers.{layer}.ffn."
    ids, weights = route(source, x, tokens, layer)
    trace.expert_ids[layer] = ids
    slots = x.new_zeros((x.shape[0], ids.shape[1], x.shape[1]))
    for expert in range(config["n_routed_experts"]):
        rows, slot = torch.nonzero(ids == expert, as_tuple=True)
        if rows.numel():
            slots[rows, slot] = one_expert(source, x[rows], f"{prefix}experts.{expert}.", weights[rows, slot])
    total = torch.zeros_like(x)
    for slot_index in range(ids.shape[1]):
        total = total + slots[:, slot_index]
    return arith.round(total + one_expert(source, x, f"{prefix}shared_experts.", None))


def route(source: Source, x: Tensor, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Expert ids [T, k] in the order they are added, and their weights [T, k]."""
    config, prefix = source.config, f"layers.{layer}.ffn.gate."
    scores = torch.sqrt(torch.nn.functional.softplus(x @ source.vector(f"{prefix}weight").T))
    if layer < config["num_hash_layers"]:
        ids = source.tensors[f"{prefix}tid2eid"][tokens].to(torch.int64)
    else:
        ranked = (scores + source.vector(f"{prefix}bias")).sort(dim=-1, descending=True, stable=True).indices
        ids = ranked[:, : config["num_experts_per_tok"]].sort(dim=-1).values
    chosen = scores.gather(1, ids)
    total = torch.zeros_like(chosen[:, 0])
    for slot in range(ids.shape[1]):
        total = total + chosen[:, slot]
    return ids, chosen / total[:, None] * config["routed_scaling_factor"]


def one_expert(source: Source, x: Tensor, prefix: str, weight: Tensor | None) -> Tensor:
    """SwiGLU with clamps; the routing weight multiplies before w2, hence before its input is quantised."""
    arith, limit = source.arith, source.config["swiglu_limit"]
    gate = arith.round(arith.linear(x, source.matrix(f"{prefix}w1"))).clamp(max=limit)
    up = arith.round(arith.linear(x, source.matrix(f"{prefix}w3"))).clamp(-limit, limit)
    inner = gate * torch.sigmoid(gate) * up
    inner = arith.round(inner if weight is None else weight[:, None] * inner)
    return arith.round(arith.linear(inner, source.matrix(f"{prefix}w2")))
