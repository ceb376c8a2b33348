"""The contract of every op: one typed attribute per op, with shapes, dtypes, accumulation, rounding, order and ties.

Conventions. T tokens of one step, in any mix of sequences; N heads; D hidden size; c head size; R rope size.
``act`` is the activation dtype, float32 or bfloat16, and is the dtype of the tensor given. Every op computes in float32
and rounds once, when it writes its result, unless it says otherwise. Every op is *row-wise*: the result for a token is a
function of that token's own inputs and of the cache rows it may see, bit for bit, whatever T, the neighbours, the
order of rows or the number of threads. Each op accepts T = 0. Inputs are contiguous unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from bittrue.config.formats import RowFormat

LayerKind = Literal["window", "csa", "hca"]
CSA_RATIO = 4
HCA_RATIO = 128
PAGE_TOKENS = 128


@dataclass(frozen=True, slots=True)
class Weight:
    """A matrix [O, K] as the checkpoint stores it, never unpacked in memory (spec 2.10).

    format f32 / bf16: ``data`` [O, K] of that dtype, ``scale`` None.
    format fp8: ``data`` [O, K] float8_e4m3fn, ``scale`` [ceil(O/128), ceil(K/128)] float8_e8m0fnu; value = data * 2^(byte - 127).
    format fp4: ``data`` [O, K/2] int8 (element 2i in the low nibble), ``scale`` [O, ceil(K/32)] float8_e8m0fnu.
    """

    data: Tensor
    scale: Tensor | None
    format: Literal["f32", "bf16", "fp8", "fp4"]

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.data.shape
        return (rows, cols * 2) if self.format == "fp4" else (rows, cols)


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """The experts of one layer: w1 (gate) and w3 (up) [I, D], w2 (down) [D, I], one Weight each per routed expert, and the
    shared expert's (w1, w3, w2), whose hidden size may be another. Matrices may be rewritten in place, not exchanged."""

    w1: tuple[Weight, ...]
    w3: tuple[Weight, ...]
    w2: tuple[Weight, ...]
    shared: tuple[Weight, Weight, Weight] | None = None
    # What a backend derives from the bank once: the checked addresses of its matrices.
    derived: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Batch:
    """Where each token of a step stands. Built once per step; all index tensors int32 unless said otherwise.

    Tokens of sequence s are rows ``offsets[s]:offsets[s+1]``, at absolute positions ``starts[s]``, ``starts[s]+1``, ...
    """

    token_ids: Tensor  # [T] i64
    positions: Tensor  # [T] i32, absolute
    seq_ids: Tensor  # [T] i32, the sequence (0..S-1) of each token
    offsets: Tensor  # [S+1] i32
    starts: Tensor  # [S] i32, absolute position of the sequence's first token in this step
    folds: Tensor  # [S] i32, position at which the HCA running pool stands: starts - min(starts, pending rows), see hca_compress
    slots: Tensor  # [S] i32, state slot
    kept: Tensor  # [S] i32, compressed entries whose last token precedes this position stand already: they are read, not written
    page_table: Tensor  # [S, P] i32, page id of tokens 128*i .. 128*i+127; unused entries -1
    # What a backend derives from the tensors, once a step.
    memo: dict[str, Any] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def num_tokens(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def num_sequences(self) -> int:
        return int(self.starts.shape[0])


@dataclass(frozen=True, slots=True)
class LayerCache:
    """The cache tensors of one layer. Rows are opaque bytes (uint8) in the formats below; unused parts are None.

    State (one slot per live sequence, every row addressed by absolute position):
      window   [slots, W, row bytes]: row of position p at p mod W; W = window + max draft.
      csa      [slots, Rc, 2, 2c] f32: for position p at p mod Rc, (u, gate + ape), halves A then B; Rc = 8 + max draft.
      csa_index the same with the index head size.
      hca_fold [slots, 3, c] f32: running (max, sum, weighted sum) of the open 128-window up to position ``folds[s]``.
      hca_pending [slots, max draft, 2, c] f32: (u, gate + ape) of position p at p mod max draft, not folded yet.
    Pages (a page is 128 tokens; entry i of CSA lies in page i // 32 at i % 32, of HCA in page i):
      rows     [pages, 32 or 1, row bytes]
      keys     [pages, 32, key bytes]
    """

    kind: LayerKind
    row_format: RowFormat
    key_format: RowFormat | None
    window: Tensor
    rows: Tensor | None = None
    keys: Tensor | None = None
    csa: Tensor | None = None
    csa_index: Tensor | None = None
    hca_fold: Tensor | None = None
    hca_pending: Tensor | None = None


@dataclass(frozen=True, slots=True)
class CompressorWeights:
    """What a compressor needs after its two projections: ape f32 [ratio, width], norm weight [c] (f32 or bf16)."""

    ape: Tensor
    norm: Tensor
    inv_freq: Tensor  # [R/2] f32, the layer's own rotary table
    rope_dim: int
    eps: float


class Captured(Protocol):
    """A captured sequence of ops. ``replay()`` gives what the function returned, its tensors computed again."""

    @property
    def result(self) -> Any: ...
    def replay(self) -> Any: ...
    def time(self) -> list[tuple[str, float]]: ...


class Capture(Protocol):
    """Takes a function of an OpTable that only calls ops and reshapes. Its inputs are read again, in place, at every
    replay; its results last until the next replay of any function captured by the same table. ``count``: functions
    captured so far."""

    @property
    def count(self) -> int: ...
    def __call__(self, function: Callable[["OpTable"], Any], /) -> Captured: ...
    def covers(self, table: "OpTable", /) -> bool: ...


@dataclass(frozen=True, slots=True)
class OpTable:
    """One implementation per op. Built once by ops.dispatch.select; nothing else chooses an implementation."""

    name: str

    embed: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]
    """(token_ids [T] i64, table [V, D] f32|bf16, M, act) -> [T, M, D] act: each token's row of the table, M times. Callers check
    the ids; a row of an id outside 0..V-1 is NaN, and nothing outside the table is read."""

    rms_norm: Callable[[Tensor, Tensor | None, float], Tensor]
    """(x [..., D] act, weight [D] f32|bf16 or None, eps) -> [..., D] act.  weight * x * (1 / sqrt(mean(x^2) + eps)); None = 1."""

    rope_angles: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(positions [T] i32, inv_freq [R/2] f32) -> cos, sin [T, R/2] f32. Angle = f32(position) * inv_freq in f32; cos and sin
    of that angle correctly rounded from float64 (positions go to a million: a fast f32 sine would be wrong there)."""

    rope: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    """(x [T, N, c] act, cos [T, R/2], sin [T, R/2], inverse) -> [T, N, c] act. Rotates the adjacent pairs (2k, 2k+1) of the LAST R
    features: (a cos - b sin, a sin + b cos); inverse = the conjugate. The other features pass unchanged."""

    quant_fp8: Callable[[Tensor, int], Tensor]
    """(x [..., K] act, group) -> [..., K] act. Quantise-dequantise to E4M3 in groups along the last axis (the last may be short):
    scale 2^ceil(log2(max(amax, 1e-4) / 448)), round to nearest even, times scale. Exact in bf16."""

    quant_fp4: Callable[[Tensor, int], Tensor]
    """(x [..., K] act, group) -> [..., K] act. The same to E2M1: scale 2^ceil(log2(max(amax, 6 * 2^-126) / 6)), clip to +-6, ties to even."""

    hadamard: Callable[[Tensor], Tensor]
    """(x [..., n] act), n a power of two -> normalised Walsh-Hadamard transform (factor n^-1/2), natural order, butterflies of
    stride 1, 2, 4, ... in f32, one rounding at the end."""

    pack_rows: Callable[[Tensor, RowFormat], Tensor]
    """(x [T, dim] act, format) -> [T, format.bytes] u8. Quantises by the rules of quant_fp8 (groups of 64, the first dim - rope_dim
    features; rope features to bf16) or quant_fp4 (groups of 32, NO Hadamard here), see RowFormat."""

    kv_rows: Callable[[Tensor, Tensor, Tensor, Tensor, float, RowFormat], Tensor]
    """(kv [T, dim] act, norm [dim] f32|bf16, cos, sin [T, R/2] f32, eps, format) -> [T, format.bytes] u8:
    pack_rows(rope(rms_norm(kv, norm, eps), cos, sin)), rounded to act after the norm and after the rope as these three do."""

    unpack_rows: Callable[[Tensor, RowFormat], Tensor]
    """(bytes [..., format.bytes] u8, format) -> [..., dim] f32, exact."""

    linear: Callable[..., Tensor]
    """(x [T, K] act, weight: Weight [O, K], *, quantize: bool = False, out_dtype=None) -> [T, O] of out_dtype (default act). Products with
    the dequantised weight, accumulated in f32 in one fixed order over k. quantize: x passes quant_fp8(., 128) first if the weight's format is fp8
    or fp4, as 2.9 says for activations; otherwise x is taken as it is."""

    linears: Callable[..., tuple[Tensor, ...]]
    """(x [T, K] act, weights: tuple[Weight, ...], *, quantize: tuple[bool, ...], out_dtypes: tuple[dtype | None, ...]) -> one [T, O_i] each:
    linear(x, weights[i], quantize=quantize[i], out_dtype=out_dtypes[i]), bit for bit, in one pass."""

    grouped_linear: Callable[[Tensor, Weight], Tensor]
    """(x [T, G, K] act, weight [G * O, K]) -> [T, G, O] act: group g of x by rows g*O..(g+1)*O of the weight, as linear."""

    experts: Callable[..., Tensor]
    """(x [T, D] act, ids [T, k] i32, weights [T, k] f32, bank: ExpertBank, *, limit: float, quantize: bool) -> [T, D] act. An expert's output is
    act(w2 . act(weight * silu(min(act(w1 x), limit)) * clip(act(w3 x), -limit, limit))). The k chosen ones are added in f32 in slot order from zero,
    then the shared expert's (weight 1), and the sum is rounded once. quantize: x and the hidden values are quantised before a product with an fp8 or
    fp4 matrix, as in linear. An id outside 0..E-1 is refused; in a captured step, where nobody can be told, its token's result is NaN."""

    route_topk: Callable[[Tensor, Tensor | None, int, float], tuple[Tensor, Tensor]]
    """(logits [T, E] f32, bias [E] f32 or None, k, scale) -> ids [T, k] i32 ascending, weights [T, k] f32. score = sqrt(softplus(logit));
    picks the k largest of score + bias by (value descending, id ascending); weight = score / (1e-20 + the chosen scores, added in id order) * scale."""

    route_hash: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(logits [T, E] f32, token_ids [T] i64, table [V, k] i64, scale) -> ids [T, k] i32 = table[token], weights as in route_topk
    (added in table order). A token outside 0..V-1, or one whose row names an expert outside 0..E-1, gets ids 0 and weights NaN:
    nothing foreign is read, and what is wrong shows."""

    hc_pre: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(streams [T, M, D] act, fn [(2+M)M, M*D] f32, base [(2+M)M] f32, scale [3] f32, norm [D] f32|bf16, *, iters, eps, norm_eps)
    -> x [T, D] act, post [T, M] f32, comb [T, M, M] f32 (spec 2.6). comb[j, k] carries source stream j into stream k.
    x = rms_norm(act(sum_j pre_j H_j), norm, norm_eps), the input of the sub-layer."""

    hc_post: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    """(y [T, D] act, streams [T, M, D] act, post [T, M], comb [T, M, M]) -> [T, M, D] act: post_k y + sum_j comb[j, k] H_j, j ascending."""

    hc_head: Callable[..., Tensor]
    """(streams [T, M, D] act, fn [M, M*D] f32, base [M] f32, scale [1] f32, norm [D] f32|bf16, *, eps, norm_eps) -> [T, D] act
    (spec 2.1 steps 3 and 4): the streams collapsed and rounded, then rms_norm with ``norm`` and norm_eps."""

    store_window: Callable[[Tensor, Batch, Tensor], None]
    """(rows [T, bytes] u8, batch, window [slots, W, bytes]) writes the last min(n, W) rows of each sequence at position mod W.
    Called after attention of the layer: until then the step's own rows are read from ``rows``."""

    csa_compress: Callable[..., None]
    """(u [T, 2c] f32, gate [T, 2c] f32, weights: CompressorWeights, batch, state [slots, Rc, 2, 2c], pages [P, 32, bytes],
    format, *, act: torch.dtype, hadamard: bool) -> None. Adds ape[position mod 4] to gate. For every position t of the step with (t+1) mod 4 = 0
    writes entry i = t // 4 to its page: softmax-pooling per channel over half A of tokens 4(i-1)..4(i-1)+3 then half B of tokens 4i..4i+3
    (for i = 0 only the B slots), rows before the step from ``state``; round to act, rms_norm, rope at 4i, then (hadamard) and pack.
    An entry that closes before kept[s] stands already and is not written. Then stores the step's (u, gate + ape) in ``state`` at position mod Rc."""

    hca_compress: Callable[..., None]
    """(u [T, c] f32, gate [T, c] f32, weights, batch, fold [slots, 3, c], pending [slots, max draft, 2, c], pages [P, 1, bytes],
    format, *, act) -> None. Online pooling per channel in token order from (m, s, w) = (-inf, 0, 0) at each multiple of 128:
    m' = max(m, g); s' = s exp(m - m') + exp(g - m'); w' = w exp(m - m') + exp(g - m') u. At (t+1) mod 128 = 0 entry t // 128 = w / s is finished
    as in csa_compress (rope at 128 i) and written, unless t precedes the step or kept[s]. Positions folds[s]..starts[s]-1 come from ``pending``. On return
    ``fold`` stands at max(folds[s], end - max draft) and the later rows are in ``pending``, so that up to ``max draft`` tokens can be undone."""

    index_topk: Callable[..., Tensor]
    """(q [T, Hi, ci] act as projected, head_weights [T, Hi] f32 as projected, batch, keys [P, 32, bytes], format, cos, sin [T, R/2], *, k, weight_scale)
    -> [T, k] i32: ids of the k visible entries (id < (position+1) // 4) with the largest score by (score descending, id ascending), returned in
    ascending id order, -1 where fewer are visible. q passes rope, then, where the keys are fp4, hadamard and quant_fp4(., 32): in both dtypes as these
    ops do. score = chain over heads, ascending, of fma(head_weight * f32(weight_scale), relu(q . key), score), f32. Between FP4 values q . key is the
    f32 sum, in ascending order, of the exact products of each group of 32 features; act bf16 with bf16 keys: magnitudes below 2^-50 count as 0."""

    attention: Callable[..., Tensor]
    """(q [T, N, c] act as projected, step_rows [T, bytes] u8, batch, cache: LayerCache, ids [T, k] i32 or None, sink [N] f32, cos, sin [T, R/2], *,
    window, scale, norm_eps, round_probs: bool) -> [T, N, c] act. q passes rms_norm(., None, norm_eps) and rope, the result, rounded to act, inverse rope, as
    these ops do. Rows of query t, in this order: window rows of positions max(0, t-window+1)..t ascending (from step_rows when in the
    step, else from cache.window), then the compressed entries: ``ids`` (csa), all with id < (t+1) // 128 ascending (hca), none (window layers).
    Every row is key and value. p_j = exp(l_j - M) / (sum_j exp(l_j - M) + exp(sink - M)), M = max over the real l_j; round_probs: p_j's numerator is
    rounded to bf16 for the value product only. Products of two bf16 values (act bf16; rows bf16 or fp8): magnitudes below 2^-50 count as 0."""

    argmax: Callable[[Tensor], Tensor]
    """(logits [R, V] f32), V > 0 -> [R] i64: the smallest id of the largest value; +0 and -0 are equal, and a NaN is larger
    than every number (the first NaN wins), as in numpy and torch."""

    log_softmax: Callable[[Tensor], Tensor]
    """(logits [R, V] f32) -> [R, V] f32: x - (max + log(sum exp(x - max)))."""

    gumbel: Callable[[Tensor, Tensor, int], Tensor]
    """(seeds [R] i64, positions [R] i64, V) -> [R, V] f32. Noise of token id v: -log(-log((h + 0.5) / 2^24)), h = the top 24 bits of
    Philox-4x32-10 word v mod 4 with counter (v // 4, position low, position high, 0) and key (seed low, seed high)."""

    capture: Capture | None = None
    """Not an op: turns a sequence of ops into one call, for backends that can. ``with_ops`` drops it."""

    def with_ops(self, **ops: Callable[..., Any]) -> "OpTable":
        """This table with other implementations of some ops (wrappers, faults planted by tests)."""
        return replace(self, capture=None, **ops)  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        if self.capture is not None and not self.capture.covers(self):
            raise ValueError(
                "an op was exchanged, but captured steps would not use it: exchange it by with_ops"
            )

    @classmethod
    def op_names(cls) -> tuple[str, ...]:
        return tuple(f.name for f in fields(cls) if f.name not in ("name", "capture"))
