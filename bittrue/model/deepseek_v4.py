"""DeepSeek-V4, the whole architecture, read top to bottom: streams, blocks, attention, experts, head.

One definition for serving and training. It owns no arithmetic (every op comes from the OpTable it is given)
and no cache (it is handed the LayerCache of each layer), so the same lines run on every backend. Sections
refer to spec/deepseek-v4.md.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.ops.contracts import Batch, CompressorWeights, ExpertBank, LayerCache, LayerKind, OpTable, Weight

TORCH_DTYPE = {"f32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class HyperConnection:
    """Mixes the M residual streams before and after one sub-layer (2.6)."""

    fn: Tensor  # [(2+M)M, M*D] f32
    base: Tensor  # [(2+M)M] f32
    scale: Tensor  # [3] f32


@dataclass(frozen=True, slots=True)
class Compressor:
    """Pools several tokens into one row (2.4): projections, then what the pooling op needs."""

    wkv: Weight
    wgate: Weight
    pool: CompressorWeights


@dataclass(frozen=True, slots=True)
class Indexer:
    """Chooses which compressed rows a query reads (2.5)."""

    wq_b: Weight
    weights_proj: Weight
    compressor: Compressor


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention sub-layer (2.3); compressor for CSA and HCA, indexer for CSA only."""

    wq_a: Weight
    q_norm: Tensor
    wq_b: Weight
    wkv: Weight
    kv_norm: Tensor
    wo_a: Weight
    wo_b: Weight
    sink: Tensor  # [N] f32
    compressor: Compressor | None
    indexer: Indexer | None


@dataclass(frozen=True, slots=True)
class FeedForward:
    """One mixture of experts (2.7): a learned router (bias) or a hash router (table), routed and shared
    experts."""

    gate: Weight
    bias: Tensor | None  # [E] f32, learned router only
    table: Tensor | None  # [V, k] i64, hash router only
    experts: ExpertBank


@dataclass(frozen=True, slots=True)
class Block:
    """One layer: hyper-connected attention, then hyper-connected experts."""

    kind: LayerKind
    hc_attn: HyperConnection
    attn_norm: Tensor
    attn: Attention
    hc_ffn: HyperConnection
    ffn_norm: Tensor
    ffn: FeedForward


@dataclass(frozen=True, slots=True)
class Parameters:
    """Every tensor of the main model, as the checkpoint stores it."""

    embed: Tensor  # [V, D]
    blocks: tuple[Block, ...]
    hc_head: HyperConnection  # fn [M, M*D], base [M], scale [1]
    norm: Tensor  # [D]
    head: Weight  # [V, D]


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosines and sines of the step's positions, [T, R/2] each, for one rotary table."""

    cos: Tensor
    sin: Tensor


class DeepseekV4:
    """The forward pass. ``level`` and ``act`` are the numeric level (9.1): maths = no simulated quantisation,
    published = bf16 with the FP8 and FP4 rules of 2.9."""

    def __init__(
        self, config: ModelConfig, parameters: Parameters, ops: OpTable, *, level: Level, act: ActDtype
    ) -> None:
        self.config = config
        self.parameters = parameters
        self.ops = ops
        self.level = level
        self.act = TORCH_DTYPE[act]
        self._main_freq = torch.tensor(config.main_inv_freq(), dtype=torch.float32)
        self._compress_freq = torch.tensor(config.compress_inv_freq(), dtype=torch.float32)

    def on(self, ops: OpTable) -> "DeepseekV4":
        """The same model computed by other ops."""
        other = copy.copy(self)
        other.ops = ops
        return other

    @property
    def is_published(self) -> bool:
        return self.level == "published"

    # ---- top level (2.1) ---------------------------------------------------------------------------------

    def forward(self, batch: Batch, caches: Sequence[LayerCache]) -> Tensor:
        """Runs the T tokens of ``batch``, updating the caches. Returns the streams after the last block,
        [T, M, D] act."""
        window_angles = self.window_angles(batch.positions)
        compress_angles = Angles(*self.ops.rope_angles(batch.positions, self._compress_freq))
        streams = self.ops.embed(batch.token_ids, self.parameters.embed, self.config.hc_mult, self.act)
        for block, cache in zip(self.parameters.blocks, caches, strict=True):
            angles = window_angles if block.kind == "window" else compress_angles
            streams = self.block(streams, batch, block, cache, angles)
        return streams

    def logits(self, streams: Tensor) -> Tensor:
        """Logits [R, V] f32 of R rows of streams [R, M, D] (2.1 steps 3-4)."""
        return self.project(self.hidden(streams))

    def hidden(self, streams: Tensor) -> Tensor:
        """What the head reads [R, D] act, of R rows of streams [R, M, D]: collapsed and normalised (2.1 step
        3)."""
        return self.collapse(streams, self.parameters.hc_head, self.parameters.norm)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits [R, V] f32 of what the head reads [R, D] act (2.1 step 4)."""
        return self.ops.linear(hidden, self.parameters.head, out_dtype=torch.float32)

    def collapse(self, streams: Tensor, by: HyperConnection, norm: Tensor) -> Tensor:
        """``hidden`` with another collapse and norm: a draft layer has its own."""
        config = self.config
        return self.ops.hc_head(
            streams.contiguous(),
            by.fn,
            by.base,
            by.scale,
            norm,
            eps=config.hc_eps,
            norm_eps=config.norm_eps,
        )

    # ---- blocks (2.6) ------------------------------------------------------------------------------------

    def window_angles(self, positions: Tensor) -> Angles:
        """The angles of window layers at ``positions`` [T] i32."""
        return Angles(*self.ops.rope_angles(positions, self._main_freq))

    def block(self, streams: Tensor, batch: Batch, block: Block, cache: LayerCache, angles: Angles) -> Tensor:
        """One layer: streams [T, M, D] act before it -> after it, its cache updated."""
        streams = self._attention_sublayer(streams, batch, block, cache, angles)
        return self._experts_sublayer(streams, batch, block)

    def store_rows(
        self, streams: Tensor, batch: Batch, block: Block, cache: LayerCache, angles: Angles
    ) -> None:
        """Updates the cache of a window layer as ``block`` does, and computes nothing else: a row depends on
        its own token's streams alone."""
        x, _, _ = self._hc_pre(streams, block.hc_attn, block.attn_norm)
        p = block.attn
        kv = self.ops.linear(x, p.wkv, quantize=self.is_published)
        rows = self.ops.kv_rows(kv, p.kv_norm, angles.cos, angles.sin, self.config.norm_eps, cache.row_format)
        self.ops.store_window(rows, batch, cache.window)

    def _attention_sublayer(
        self, streams: Tensor, batch: Batch, block: Block, cache: LayerCache, angles: Angles
    ) -> Tensor:
        x, post, comb = self._hc_pre(streams, block.hc_attn, block.attn_norm)
        y = self._attention(x, batch, block.attn, cache, angles)
        return self.ops.hc_post(y, streams, post, comb)

    def _experts_sublayer(self, streams: Tensor, batch: Batch, block: Block) -> Tensor:
        x, post, comb = self._hc_pre(streams, block.hc_ffn, block.ffn_norm)
        y = self._feed_forward(x, batch, block.ffn)
        return self.ops.hc_post(y, streams, post, comb)

    def _hc_pre(self, streams: Tensor, hc: HyperConnection, norm: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The normalised input of a sub-layer, and what carries its output back into the streams."""
        config = self.config
        return self.ops.hc_pre(
            streams,
            hc.fn,
            hc.base,
            hc.scale,
            norm,
            iters=config.hc_iters,
            eps=config.hc_eps,
            norm_eps=config.norm_eps,
        )

    # ---- attention (2.3) ---------------------------------------------------------------------------------

    def _attention(self, x: Tensor, batch: Batch, p: Attention, cache: LayerCache, angles: Angles) -> Tensor:
        ops, config = self.ops, self.config
        num_tokens, heads, head_dim = x.shape[0], config.num_heads, config.head_dim

        qa, kv, *wide = self._input_projections(x, p)
        q, *index_q = self._query_projections(ops.rms_norm(qa, p.q_norm, config.norm_eps), p)
        q = q.view(num_tokens, heads, head_dim)

        # One vector per token is key and value of every head.
        step_rows = ops.kv_rows(kv, p.kv_norm, angles.cos, angles.sin, config.norm_eps, cache.row_format)

        # Compressed rows that close in this step are written first: their last token may already read them.
        ids = None
        if p.compressor is not None:
            self._compress(wide[0], wide[1], batch, p.compressor, cache)
        if p.indexer is not None:
            ids = self._select(index_q[0], tuple(wide[2:]), batch, p.indexer, cache, angles)

        o = ops.attention(
            q,
            step_rows,
            batch,
            cache,
            ids,
            p.sink,
            angles.cos,
            angles.sin,
            window=config.window,
            scale=head_dim**-0.5,
            norm_eps=config.norm_eps,
            round_probs=self.is_published,
        )
        ops.store_window(step_rows, batch, cache.window)
        o = ops.grouped_linear(o.view(num_tokens, config.o_groups, -1), p.wo_a)
        o = o.view(num_tokens, config.o_groups * config.o_lora_rank)
        return ops.linear(o, p.wo_b, quantize=self.is_published)

    def _input_projections(self, x: Tensor, p: Attention) -> tuple[Tensor, ...]:
        """All projections of the normalised input: wq_a and wkv, quantised where 2.9 says, then in float32
        the compressor's wkv and wgate and the indexer's wkv, wgate and weights_proj, where there are any."""
        weights = [p.wq_a, p.wkv]
        if p.compressor is not None:
            weights += [p.compressor.wkv, p.compressor.wgate]
        if p.indexer is not None:
            weights += [p.indexer.compressor.wkv, p.indexer.compressor.wgate, p.indexer.weights_proj]
        num_wide = len(weights) - 2
        return self.ops.linears(
            x,
            tuple(weights),
            quantize=(self.is_published,) * 2 + (False,) * num_wide,
            out_dtypes=(None,) * 2 + (torch.float32,) * num_wide,
        )

    def _query_projections(self, qr: Tensor, p: Attention) -> tuple[Tensor, ...]:
        """The queries of the heads and, where the layer chooses rows, of the index."""
        weights = (p.wq_b,) if p.indexer is None else (p.wq_b, p.indexer.wq_b)
        num = len(weights)
        return self.ops.linears(qr, weights, quantize=(self.is_published,) * num, out_dtypes=(None,) * num)

    def _compress(self, u: Tensor, gate: Tensor, batch: Batch, p: Compressor, cache: LayerCache) -> None:
        """Feeds the main compressor of a CSA or HCA layer (2.4)."""
        if cache.kind == "csa":
            self.ops.csa_compress(
                u,
                gate,
                p.pool,
                batch,
                cache.csa,
                cache.rows,
                cache.row_format,
                act=self.act,
                hadamard=False,
            )
        else:
            self.ops.hca_compress(
                u,
                gate,
                p.pool,
                batch,
                cache.hca_fold,
                cache.hca_pending,
                cache.rows,
                cache.row_format,
                act=self.act,
            )

    def _select(
        self,
        q: Tensor,
        projected: tuple[Tensor, ...],
        batch: Batch,
        p: Indexer,
        cache: LayerCache,
        angles: Angles,
    ) -> Tensor:
        """Ids of the compressed rows each query reads, [T, k] i32 ascending, -1 padded (2.5). ``projected``:
        the step by the indexer's wkv, wgate and weights_proj."""
        ops, config = self.ops, self.config
        u, gate, weights = projected
        heads, dim = config.index_num_heads, config.index_head_dim
        ops.csa_compress(
            u,
            gate,
            p.compressor.pool,
            batch,
            cache.csa_index,
            cache.keys,
            cache.key_format,
            act=self.act,
            hadamard=self.is_published,
        )
        return ops.index_topk(
            q.view(-1, heads, dim),
            weights,
            batch,
            cache.keys,
            cache.key_format,
            angles.cos,
            angles.sin,
            k=config.index_topk,
            weight_scale=dim**-0.5 * heads**-0.5,
        )

    # ---- experts (2.7) -----------------------------------------------------------------------------------

    def _feed_forward(self, x: Tensor, batch: Batch, p: FeedForward) -> Tensor:
        ops, config = self.ops, self.config
        scores = ops.linear(x, p.gate, out_dtype=torch.float32)
        if p.table is not None:
            ids, weights = ops.route_hash(scores, batch.token_ids, p.table, config.routed_scale)
        else:
            ids, weights = ops.route_topk(scores, p.bias, config.experts_per_token, config.routed_scale)
        return ops.experts(x, ids, weights, p.experts, limit=config.swiglu_limit, quantize=self.is_published)
