"""How far the trainer is from the engine, measured before every gradient step, and what is allowed.

Log-probabilities are f32 [N] of packed answer tokens, with the id of their sequence [N] and a mask [N]: the
policy sampled the token. What was chosen (experts, index rows) is compared as sets.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bittrue.errors import ConfigError, ParityBroken

Vector = NDArray[np.float32]

# exp of more is no number a mean can hold; a token there is far beyond every bound.
_MAX_LOG_RATIO = 20.0
# Sets of neighbouring tokens differ far more often than those that two precisions choose for one token. So
# moving a record by one token adds many differences if it is in place, and leaves few if it is not.
_SHIFTED = 0.5
# Sets are compared this many ids at a time, to bound memory.
_CHUNK_IDS = 1 << 22


# ---- log-probabilities -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first token whose bits differ: its sequence, its place among the sequence's packed tokens."""

    sequence: int
    token: int
    recorded: float
    recomputed: float

    def __str__(self) -> str:
        return (
            f"sequence {self.sequence}, token {self.token}: the engine recorded {self.recorded!r} "
            f"({_hex(self.recorded)}), the trainer computes {self.recomputed!r} ({_hex(self.recomputed)})"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Parity:
    """Recorded against recomputed, d = recomputed - recorded, over trainable tokens.

    ``k1``, ``k3``: estimates of KL(engine || trainer) in nats a token, mean of -d and of exp(d) - 1 - d
    (Schulman, "Approximating KL divergence"). ``chi2`` = mean of exp(2 d) - 1. ``beyond_ln2``: share of
    |d| > ln 2, a factor of two. ``differing``: tokens whose bits differ or are no number. ``worst`` [S]: the
    largest |d| of each sequence, inf where one is no number.
    """

    num_tokens: int
    differing: int
    mean_abs: float
    max_abs: float
    k1: float
    k3: float
    chi2: float
    beyond_ln2: float
    worst: NDArray[np.float64]
    first: Mismatch | None


def measure(
    recorded: Vector, recomputed: Vector, sequence_ids: NDArray[np.int64], mask: NDArray[np.bool_]
) -> Parity:
    """Spec 1.7 and 3.2. A value that is no number makes every mean NaN, which no bound allows."""
    assert recorded.dtype == np.float32 and recomputed.dtype == np.float32
    assert recorded.shape == recomputed.shape == sequence_ids.shape == mask.shape
    places = np.flatnonzero(mask)
    left, right = recorded[places], recomputed[places]
    is_number = np.isfinite(left) & np.isfinite(right)
    differs = (left.view(np.int32) != right.view(np.int32)) | ~is_number
    d = np.full(len(places), np.nan)
    d[is_number] = right[is_number].astype(np.float64) - left[is_number]
    size = np.abs(d)
    worst = np.zeros(int(sequence_ids.max(initial=-1)) + 1)
    np.maximum.at(worst, sequence_ids[places], np.where(is_number, size, np.inf))
    ratio = np.clip(d, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
    number = max(len(places), 1)
    return Parity(
        num_tokens=len(places),
        differing=int(differs.sum()),
        mean_abs=float(size.sum()) / number,
        max_abs=float(size.max(initial=0.0)),
        k1=float((-d).sum()) / number,
        k3=float((np.expm1(ratio) - ratio).sum()) / number,
        chi2=float(np.expm1(2.0 * ratio).sum()) / number,
        beyond_ln2=float((size > np.log(2.0)).sum()) / number,
        worst=worst,
        first=_first(recorded, recomputed, sequence_ids, places[differs]),
    )


def _first(
    recorded: Vector, recomputed: Vector, sequence_ids: NDArray[np.int64], places: NDArray[np.int64]
) -> Mismatch | None:
    if len(places) == 0:
        return None
    place = int(places[0])
    sequence = int(sequence_ids[place])
    token = int((sequence_ids[:place] == sequence).sum())
    return Mismatch(sequence, token, float(recorded[place]), float(recomputed[place]))


def _hex(value: float) -> str:
    return f"0x{int(np.float32(value).view(np.uint32)):08x}"


@dataclass(frozen=True, slots=True)
class Bounds:
    """The most a parity may show; in nats."""

    max_abs: float = float("inf")
    mean_abs: float = float("inf")
    k3: float = float("inf")


# By what the engine computed in while sampling, each with everything chosen replayed. Sources: spec 5.4 for
# f32, bf16 and fp8; for fp4 the bar that prime-rl sets every model it merges (spec 3.1).
BOUNDS: Mapping[str, Bounds] = {
    "f32": Bounds(max_abs=1e-5),
    "bf16": Bounds(mean_abs=5e-3),
    "fp8": Bounds(k3=5e-3),
    "fp4": Bounds(k3=0.015),
}
MODES = ("exact", *BOUNDS)


def check(parity: Parity, mode: str) -> None:
    """Raises ParityBroken where ``parity`` shows more than ``mode`` allows: exact allows not one bit."""
    if mode not in MODES:
        raise ConfigError(f"parity mode {mode} is unknown; choose one of {', '.join(MODES)}", field="parity")
    if mode == "exact":
        if parity.first is not None:
            raise ParityBroken(
                f"parity is not exact: {parity.differing} of {parity.num_tokens} tokens differ, first "
                f"{parity.first}; check that both run the same weights, ops and precision, or choose a "
                f"parity mode that allows a difference ({', '.join(BOUNDS)})",
                sequence=parity.first.sequence,
                token=parity.first.token,
            )
        return
    bounds = BOUNDS[mode]
    for name in ("max_abs", "mean_abs", "k3"):
        found, allowed = getattr(parity, name), getattr(bounds, name)
        if not found <= allowed:
            sequence = int(np.argmax(parity.worst))
            raise ParityBroken(
                f"parity is out of the bounds of {mode}: {name} is {found:.3g}, allowed {allowed:g}; worst "
                f"is sequence {sequence}, off by up to {parity.worst[sequence]:.3g}; first difference: "
                f"{parity.first}; replay the choices the engine recorded, and check the weights' version",
                sequence=sequence,
            )


# ---- what was chosen ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Selection:
    """Recorded against recomputed choices. ``flips``: share of (token, layer) whose sets differ;
    ``token_flips``: share of tokens with such a layer; ``overlap``: mean share of ids in both.
    ``shifted_overlap``: the overlap if the record is moved by a token, the better of both ways.
    ``first_token``: the first flipped token, -1 = none."""

    num_tokens: int
    flips: float
    token_flips: float
    overlap: float
    shifted_overlap: float
    first_token: int


def compare_selections(recorded: NDArray[Any], recomputed: NDArray[Any]) -> Selection:
    """Ids [T, layers, k], distinct within a set, in any order; negative where a set has fewer than k. The
    overlap of two sets is the share of the larger one that is in both; 1 where both are empty."""
    if recorded.shape != recomputed.shape or recorded.ndim != 3:
        raise ParityBroken(
            f"recorded choices have shape {list(recorded.shape)}, recomputed ones "
            f"{list(recomputed.shape)}; both are [tokens, layers, ids of a set] of the same tokens"
        )
    shares = _overlaps(recorded, recomputed)
    flipped: NDArray[np.bool_] = shares < 1.0
    of_token = flipped.any(axis=1)
    shifted = 0.0
    if flipped.any():
        shifted = max(
            _mean(_overlaps(recorded[1:], recomputed[:-1])), _mean(_overlaps(recorded[:-1], recomputed[1:]))
        )
    return Selection(
        num_tokens=len(shares),
        flips=_mean(np.asarray(flipped, np.float64), empty=0.0),
        token_flips=_mean(np.asarray(of_token, np.float64), empty=0.0),
        overlap=_mean(shares),
        shifted_overlap=shifted,
        first_token=int(of_token.argmax()) if of_token.any() else -1,
    )


def check_selection(selection: Selection, what: str, *, min_overlap: float) -> None:
    """Raises ParityBroken for a record that is not that of these tokens: most of what differs would not if it
    were moved by a token (shifted), or the overlap is too small (shuffled, other weights)."""
    if 1.0 - selection.shifted_overlap < _SHIFTED * (1.0 - selection.overlap):
        raise ParityBroken(
            f"the record of {what} is shifted: it overlaps {selection.overlap:.3f} with what these tokens "
            f"choose, {selection.shifted_overlap:.3f} when moved by one token; record i belongs to token i",
            token=selection.first_token,
        )
    if not selection.overlap >= min_overlap:
        raise ParityBroken(
            f"the record of {what} overlaps {selection.overlap:.3f} with what these tokens choose, at least "
            f"{min_overlap:g} is asked for; first flip at token {selection.first_token}; check that records "
            "stay with their sequences and that both sides run the same weights",
            token=selection.first_token,
        )


def _overlaps(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """Overlap of the sets of each (token, layer), [T, layers]."""
    tokens, layers, k = a.shape
    left, right = a.reshape(-1, k), b.reshape(-1, k)
    step = max(_CHUNK_IDS // max(k, 1), 1)
    parts = [_set_overlap(left[i : i + step], right[i : i + step]) for i in range(0, len(left), step)]
    return np.concatenate([np.zeros(0), *parts]).reshape(tokens, layers)


def _set_overlap(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.float64]:
    """[R] from [R, k] each. An id in both gives 2 id from a and 2 id + 1 from b: neighbours once sorted."""
    codes = np.concatenate([a.astype(np.int64) * 2, b.astype(np.int64) * 2 + 1], axis=1)
    codes.sort(axis=1)
    low, high = codes[:, :-1], codes[:, 1:]
    both = ((low >= 0) & (low % 2 == 0) & (high == low + 1)).sum(axis=1)
    size = np.maximum((a >= 0).sum(axis=1), (b >= 0).sum(axis=1))
    return np.where(size == 0, 1.0, both / np.maximum(size, 1))


def _mean(values: NDArray[np.float64], *, empty: float = 1.0) -> float:
    return float(values.mean()) if values.size else empty
