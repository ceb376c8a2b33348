"""An OpTable whose ops can be differentiated: the model's own lines run on it, and autograd records them.

What the model passes on as opaque bytes (rows, pages) keeps its differentiable values here, beside it: the
values of the step's rows, and those of the entries written to each layer's pages.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat
from bittrue.model.deepseek_v4 import Block
from bittrue.ops.contracts import CSA_RATIO, HCA_RATIO, Batch, CompressorWeights, LayerCache, OpTable, Weight
from bittrue.ops.contracts import ExpertBank as Bank
from bittrue.train.autograd import (
    Embed,
    ExpertCall,
    Experts,
    GroupedLinear,
    Hadamard,
    HcHead,
    HcPost,
    HcPre,
    HyperCall,
    Linears,
    Product,
    Quantize,
    RmsNorm,
    Rope,
    Route,
    RouteCall,
    Step,
)
from bittrue.train.autograd_cache import (
    AttendRows,
    AttentionCall,
    Compress,
    CompressCall,
    IndexCall,
    IndexScores,
    KvRows,
    RowsCall,
)
from bittrue.train.masters import Masters

# In replayed ids: nothing was recorded for this token, so it chooses for itself.
UNKNOWN = -2


@dataclass(frozen=True, slots=True)
class Replay:
    """Ids chosen before, [T, k] i32 each, in place of today's: gradients flow through weights and scores that
    are computed anew. ``experts`` by the bias tensor of the router (its id): every learned router has one of
    its own. ``rows`` by the key pages of the layer (their id), ascending and -1 padded."""

    experts: Mapping[int, Tensor] = field(default_factory=dict)
    rows: Mapping[int, Tensor] = field(default_factory=dict)


class DifferentiableOps:
    """The ops of one forward and backward pass over whole documents."""

    def __init__(
        self,
        masters: Masters,
        step: Step,
        *,
        is_dense: bool = False,
        replay: Replay | None = None,
    ) -> None:
        """``is_dense``: attention reads every visible entry, while the index learns to choose."""
        self._masters, self._step = masters, step
        self._is_dense, self._replay = is_dense, replay or Replay()
        assert not (is_dense and self._replay.rows), "attention reads every entry, or those of a record"
        self.chosen: dict[int, Tensor] = {}  # as in Replay
        self.chosen_rows: dict[int, Tensor] = {}
        self._rows: tuple[Tensor, Tensor] | None = None  # values and bytes of the last kv_rows
        self._entries: dict[int, Tensor] = {}  # values by the pages they were written to
        self._index_scores: Tensor | None = None  # of the last choice
        self._apart = {id(w.data) for w in _index_weights(masters)}

    def table(self) -> OpTable:
        """These ops in the place of the backend's; what they leave out cannot be differentiated."""
        return replace(
            self._step.ops,
            capture=None,
            name=f"differentiable {self._step.ops.name}",
            embed=self.embed,
            rms_norm=self.rms_norm,
            rope=self.rope,
            quant_fp8=self.quant_fp8,
            quant_fp4=self.quant_fp4,
            hadamard=self.hadamard,
            kv_rows=self.kv_rows,
            linear=self.linear,
            linears=self.linears,
            grouped_linear=self.grouped_linear,
            experts=self.experts,
            route_topk=self.route_topk,
            route_hash=self.route_hash,
            hc_pre=self.hc_pre,
            hc_post=self.hc_post,
            hc_head=self.hc_head,
            store_window=self.store_window,
            csa_compress=self.csa_compress,
            hca_compress=self.hca_compress,
            index_topk=self.index_topk,
            attention=self.attention,
        )

    # ---- vectors -----------------------------------------------------------------------------------------

    def embed(self, token_ids: Tensor, table: Tensor, streams: int, act: torch.dtype) -> Tensor:
        return _apply(Embed, self._masters.leaf(table), self._step, token_ids, table, streams)

    def rms_norm(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        master = None if weight is None else self._masters.leaf(weight)
        return _apply(RmsNorm, x, master, self._step, weight, eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
        return _apply(Rope, x, self._step, cos, sin, inverse)

    def hadamard(self, x: Tensor) -> Tensor:
        return _apply(Hadamard, x, self._step)

    def quant_fp8(self, x: Tensor, group: int) -> Tensor:
        return _apply(Quantize, x, self._step, "fp8", group)

    def quant_fp4(self, x: Tensor, group: int) -> Tensor:
        return _apply(Quantize, x, self._step, "fp4", group)

    # ---- hyper-connections -------------------------------------------------------------------------------

    def hc_pre(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        *,
        iters: int,
        eps: float,
        norm_eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = HyperCall(fn, base, scale, norm, eps, norm_eps, iters)
        result: tuple[Tensor, Tensor, Tensor] = _apply_to_many(
            HcPre, streams, self._step, call, *self._hyper(call)
        )
        return result

    def hc_post(self, y: Tensor, streams: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        return _apply(HcPost, y, streams, post, comb, self._step)

    def hc_head(
        self,
        streams: Tensor,
        fn: Tensor,
        base: Tensor,
        scale: Tensor,
        norm: Tensor,
        *,
        eps: float,
        norm_eps: float,
    ) -> Tensor:
        call = HyperCall(fn, base, scale, norm, eps, norm_eps)
        return _apply(HcHead, streams, self._step, call, *self._hyper(call))

    def _hyper(self, call: HyperCall) -> tuple[Tensor, ...]:
        return tuple(self._masters.leaf(t) for t in (call.fn, call.base, call.scale, call.norm))

    # ---- matrices ----------------------------------------------------------------------------------------

    def linear(
        self, x: Tensor, weight: Weight, *, quantize: bool = False, out_dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.linears(x, (weight,), quantize=(quantize,), out_dtypes=(out_dtype,))[0]

    def linears(
        self,
        x: Tensor,
        weights: tuple[Weight, ...],
        *,
        quantize: tuple[bool, ...],
        out_dtypes: tuple[torch.dtype | None, ...],
    ) -> tuple[Tensor, ...]:
        matrices = [self._masters.matrix(weight) for weight in weights]
        products = tuple(
            Product(weight, matrix.values, quantized, dtype, id(weight.data) in self._apart)
            for weight, matrix, quantized, dtype in zip(weights, matrices, quantize, out_dtypes, strict=True)
        )
        result: tuple[Tensor, ...] = _apply_to_many(
            Linears, x, self._step, products, *(m.master for m in matrices)
        )
        return result

    def grouped_linear(self, x: Tensor, weight: Weight) -> Tensor:
        matrix = self._masters.matrix(weight)
        return _apply(GroupedLinear, x, matrix.master, self._step, weight, matrix.values)

    def experts(
        self, x: Tensor, ids: Tensor, weights: Tensor, bank: Bank, *, limit: float, quantize: bool
    ) -> Tensor:
        trained = self._masters.bank(bank)
        call = ExpertCall(ids, bank, trained.values, limit, quantize)
        return _apply(Experts, x, weights, self._step, call, *trained.masters)

    def route_topk(self, logits: Tensor, bias: Tensor | None, k: int, scale: float) -> tuple[Tensor, Tensor]:
        values, key = logits.detach().contiguous(), id(bias)
        ids, weights = self._step.ops.route_topk(values, bias, k, scale)
        given = self._replay.experts.get(key)
        if (
            given is not None
        ):  # a table with a row for every token: that choice, the weights of today's scores
            table, every = torch.where(given == UNKNOWN, ids, given), torch.arange(len(values))
            ids, weights = self._step.ops.route_hash(values, every, table.long(), scale)
        self.chosen[key] = ids
        return ids, self._route(logits, ids, weights, scale, key)

    def route_hash(
        self, logits: Tensor, token_ids: Tensor, table: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        ids, weights = self._step.ops.route_hash(logits.detach().contiguous(), token_ids, table, scale)
        return ids, self._route(logits, ids, weights, scale, None)

    def _route(self, logits: Tensor, ids: Tensor, weights: Tensor, scale: float, key: int | None) -> Tensor:
        call = RouteCall(ids, weights, scale, self._offsets, key is not None, key or 0)
        return _apply(Route, logits, self._step, call)

    # ---- cache -------------------------------------------------------------------------------------------

    def begin(self, batch: Batch) -> None:
        """Names the batch of the pass to come: a router is not told which document a token belongs to."""
        self._offsets = batch.offsets

    def kv_rows(
        self, kv: Tensor, norm: Tensor, cos: Tensor, sin: Tensor, eps: float, fmt: RowFormat
    ) -> Tensor:
        call = RowsCall(norm, (cos, sin), eps, fmt, [])
        values = _apply(KvRows, kv, self._masters.leaf(norm), self._step, call)
        self._rows = (values, call.made[0])
        return values

    def store_window(self, rows: Tensor, batch: Batch, window: Tensor) -> None:
        self._step.ops.store_window(self._bytes(rows), batch, window)

    def _bytes(self, values: Tensor) -> Tensor:
        assert self._rows is not None and self._rows[0] is values, "the model passes on the rows just made"
        return self._rows[1]

    def csa_compress(
        self,
        u: Tensor,
        gate: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        state: Tensor,
        pages: Tensor,
        fmt: RowFormat,
        *,
        act: torch.dtype,
        hadamard: bool,
    ) -> None:
        self._compress(u, gate, weights, batch, (state,), pages, fmt, CSA_RATIO, hadamard)

    def hca_compress(
        self,
        u: Tensor,
        gate: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        fold: Tensor,
        pending: Tensor,
        pages: Tensor,
        fmt: RowFormat,
        *,
        act: torch.dtype,
    ) -> None:
        self._compress(u, gate, weights, batch, (fold, pending), pages, fmt, HCA_RATIO, False)

    def _compress(
        self,
        u: Tensor,
        gate: Tensor,
        weights: CompressorWeights,
        batch: Batch,
        state: tuple[Tensor, ...],
        pages: Tensor,
        fmt: RowFormat,
        ratio: int,
        hadamard: bool,
    ) -> None:
        at, positions = _places(batch, ratio, pages.shape[1])
        call = CompressCall(weights, batch, state, pages, fmt, ratio, hadamard, at, positions)
        masters = (self._masters.leaf(weights.ape), self._masters.leaf(weights.norm))
        self._entries[id(pages)] = _apply(Compress, u, gate, *masters, self._step, call)

    def index_topk(
        self,
        q: Tensor,
        head_weights: Tensor,
        batch: Batch,
        keys: Tensor,
        fmt: RowFormat,
        cos: Tensor,
        sin: Tensor,
        *,
        k: int,
        weight_scale: float,
    ) -> Tensor:
        given = self._replay.rows.get(id(keys))
        if self._is_dense:
            ids = _all_visible(batch)
        elif given is not None and not (given[:, 0] == UNKNOWN).any():
            ids = given
        else:
            asked = (self._step.narrow(q.detach()), head_weights.detach().contiguous(), batch, keys, fmt)
            ids = self._step.ops.index_topk(*asked, cos, sin, k=k, weight_scale=weight_scale)
            if given is not None:
                ids = torch.where(given[:, :1] == UNKNOWN, ids, given)
        self.chosen_rows[id(keys)] = ids
        if torch.is_grad_enabled():
            call = IndexCall(ids, batch, (cos, sin), fmt, weight_scale)
            entries = self._entries[id(keys)]
            self._index_scores = _apply(IndexScores, q, head_weights, entries, self._step, call)
        return ids

    def attention(
        self,
        q: Tensor,
        step_rows: Tensor,
        batch: Batch,
        cache: LayerCache,
        ids: Tensor | None,
        sink: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        window: int,
        scale: float,
        norm_eps: float,
        round_probs: bool,
    ) -> Tensor:
        rows = self._bytes(step_rows)
        call = AttentionCall(rows, batch, cache, ids, sink, (cos, sin), window, scale, norm_eps, round_probs)
        entries = None if cache.rows is None else self._entries[id(cache.rows)]
        scores = self._index_scores if ids is not None else None
        self._index_scores = None
        leaf = self._masters.leaf(sink)
        return _apply(AttendRows, q, step_rows, entries, leaf, scores, self._step, call)


def _apply(function: Any, *arguments: Any) -> Tensor:
    # torch's apply has no types.
    result: Tensor = function.apply(*arguments)
    return result


def _apply_to_many(function: Any, *arguments: Any) -> Any:
    return function.apply(*arguments)


def _index_weights(masters: Masters) -> Iterator[Weight]:
    blocks: tuple[Block, ...] = masters.parameters.blocks
    for block in blocks:
        index = block.attn.indexer
        if index is not None:
            yield from (index.wq_b, index.weights_proj, index.compressor.wkv, index.compressor.wgate)


def _places(batch: Batch, ratio: int, per_page: int) -> tuple[Tensor, Tensor]:
    """Where the entries of whole documents lie in the flattened pages [N] i64, and the positions they are
    rotated at [N] i32; of documents that began earlier, nothing: no gradient is asked of those."""
    name = f"entries of {ratio}"
    found = batch.memo.get(name)
    if found is None:
        lengths = (batch.offsets[1:] - batch.offsets[:-1]).long() * (batch.starts == 0)
        counts = lengths // ratio
        doc = torch.repeat_interleave(torch.arange(len(counts)), counts)
        first = counts.cumsum(0) - counts
        entry = torch.arange(len(doc)) - first[doc]
        page = batch.page_table[doc, entry // per_page].long()
        found = (page * per_page + entry % per_page, (entry * ratio).int())
        batch.memo[name] = found
    return found


def _all_visible(batch: Batch) -> Tensor:
    """Ids [T, k] i32 of every entry each token may see, ascending, -1 padded."""
    visible = (batch.positions + 1) // CSA_RATIO
    width = int(visible.max()) if len(visible) else 0
    ids = torch.arange(width, dtype=torch.int32).repeat(len(visible), 1)
    return torch.where(ids < visible[:, None], ids, -1)
