"""Chooses the next token of each sequence: arg-max of the adjusted logits plus noise that is a function of
(seed, position, token id), so the choice never depends on the batch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bittrue.engine.types import SamplingParams, TokenLogprob
from bittrue.ops.contracts import OpTable

NEVER = -float("inf")
# Colder is the same choice, but the quotients would overflow: equal infinities, and NaN from zero.
COLDEST = 1e-30


@dataclass(frozen=True, slots=True)
class SampleInput:
    """What the choice of one token depends on besides the logits."""

    params: SamplingParams
    position: int  # absolute position of the token to choose
    prompt: Sequence[int]
    generated: Sequence[int]
    forbidden: tuple[int, ...]  # ids masked now: end-of-sequence and stop ids before min_tokens
    allowed: np.ndarray | None  # [V] bool from the grammar, None = all


@dataclass(frozen=True, slots=True)
class SampleOutput:
    token_id: int
    logprob: TokenLogprob | None


def adjust_logits(row: np.ndarray, item: SampleInput) -> np.ndarray:
    """Penalties, bias and masks on one row of logits [V] f32 (a copy is returned). OpenAI's presence and
    frequency penalties count generated tokens; the repetition penalty counts prompt and generated ones, as
    elsewhere."""
    p = item.params
    row = row.copy()
    if p.repetition_penalty != 1.0:
        seen = np.unique(np.asarray([*item.prompt, *item.generated], dtype=np.int64))
        scores = row[seen]
        factor = np.float32(p.repetition_penalty)
        row[seen] = np.where(scores > 0, scores / factor, scores * factor)
    if item.generated and (p.presence_penalty or p.frequency_penalty):
        counts = Counter(item.generated)
        ids = np.fromiter(counts, dtype=np.int64)
        times = np.fromiter(counts.values(), dtype=np.float32)
        row[ids] -= np.float32(p.frequency_penalty) * times + np.float32(p.presence_penalty)
    for token_id, bias in p.logit_bias.items():
        row[token_id] += np.float32(bias)
    if item.allowed is not None:
        row[~item.allowed] = NEVER
    if item.forbidden:
        free = row.copy()
        row[list(item.forbidden)] = NEVER
        # A finished grammar allows nothing but the end: min_tokens yields to it, or no token would be left.
        if not np.isfinite(row).any():
            return free
    return row


def truncate(row: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Applies top_k, then top_p over what is left, then min_p, to a row of scaled logits; ties by (value,
    smaller id)."""
    vocab = row.shape[0]
    top_k = params.top_k if 0 < params.top_k < vocab else vocab
    if top_k == vocab and params.top_p >= 1.0 and params.min_p <= 0.0:
        return row
    order = np.argsort(-row, kind="stable")[:top_k]
    values = row[order].astype(np.float64)
    weights = np.exp(values - values[0])
    keep = weights > 0
    if params.top_p < 1.0:
        mass = np.cumsum(weights)
        keep &= (mass - weights) < params.top_p * mass[-1]
    if params.min_p > 0.0:
        keep &= weights >= params.min_p
    keep[0] = True
    kept = np.full_like(row, NEVER)
    chosen = order[keep]
    kept[chosen] = row[chosen]
    return kept


def _is_plain(item: SampleInput) -> bool:
    p = item.params
    return (
        p.repetition_penalty == 1.0
        and not p.presence_penalty
        and not p.frequency_penalty
        and not p.logit_bias
        and not item.forbidden
        and item.allowed is None
    )


def choose_tokens(logits: Tensor, items: Sequence[SampleInput], ops: OpTable) -> list[int]:
    """The chosen token id per row of ``logits`` [R, V] f32. Temperature 0 is the arg-max; the smaller id
    wins a tie."""
    if all(item.params.temperature == 0 and _is_plain(item) for item in items):
        best: list[int] = ops.argmax(logits).tolist()
        return best
    rows = logits.numpy()
    vocab = logits.shape[1]
    noisy = [i for i, item in enumerate(items) if item.params.temperature > 0]
    noise: dict[int, np.ndarray] = {}
    if noisy:
        seeds = torch.tensor([items[i].params.seed for i in noisy], dtype=torch.int64)
        positions = torch.tensor([items[i].position for i in noisy], dtype=torch.int64)
        noise = dict(zip(noisy, ops.gumbel(seeds, positions, vocab).numpy(), strict=True))
    chosen = []
    for i, item in enumerate(items):
        row = rows[i] if _is_plain(item) else adjust_logits(rows[i], item)
        if i in noise:
            temperature = np.float32(max(item.params.temperature, COLDEST))
            row = truncate(row / temperature, item.params) + noise[i]
        chosen.append(int(np.argmax(row)))  # numpy's argmax is the first maximum
    return chosen


def token_logprob(logprobs: Tensor, token_id: int, num_top: int) -> TokenLogprob:
    """The chosen token's log-probability and the ``num_top`` likeliest, by (value descending, id ascending).
    ``logprobs`` [V] f32."""
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        num_top = min(num_top, logprobs.shape[0])
        floor = torch.topk(logprobs, num_top).values[-1]
        ids = torch.nonzero(logprobs >= floor).squeeze(1).numpy()
        values = logprobs[ids].numpy()
        order = np.lexsort((ids, -values))[:num_top]
        top = tuple((int(ids[j]), float(values[j])) for j in order)
    return TokenLogprob(token_id, float(logprobs[token_id]), top)


def sample(logits: Tensor, items: Sequence[SampleInput], ops: OpTable) -> list[SampleOutput]:
    """Chooses one token per row and reports the log-probabilities asked for (under the model: before
    temperature, penalties and masks)."""
    chosen = choose_tokens(logits, items, ops)
    wanted = [i for i, item in enumerate(items) if item.params.logprobs is not None]
    reports: dict[int, TokenLogprob] = {}
    if wanted:
        logprobs = ops.log_softmax(logits[wanted].contiguous())
        for row, i in zip(logprobs, wanted, strict=True):
            reports[i] = token_logprob(row, chosen[i], items[i].params.logprobs or 0)
    return [SampleOutput(token_id, reports.get(i)) for i, token_id in enumerate(chosen)]
