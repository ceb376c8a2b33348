"""What stored runs of reinforcement learning add up to, for the page and for its targets."""

from collections.abc import Sequence

from bittrue.bench.result import Label, Measurement, Result, Unit
from bittrue.bench.tasks import wilson

RL = "rl"
GREEDY, SAMPLED = "/greedy", "/pass@1"
DISTILLED = ("countdown", "sub-think")


# ---- what rewards add --------------------------------------------------------------------------------


def arms(r: Result) -> list[str]:
    return list(dict.fromkeys(str(m.labels["arm"]) for m in r.measurements))


def seeds(r: Result) -> list[int]:
    return sorted({int(m.labels["seed"]) for m in r.measurements})


def curve(r: Result, arm: str, seed: int, suffix: str = GREEDY) -> list[Measurement]:
    """Held-out shares of one arm and seed, by updates, ascending."""
    own = [m for m in r.measurements if m.name.endswith(suffix) and m.has(arm=arm, seed=seed)]
    return sorted(own, key=lambda m: int(m.labels["updates"]))


def ends(r: Result, arm: str) -> list[Measurement]:
    """The last greedy share of each seed."""
    return [curve(r, arm, seed)[-1] for seed in seeds(r)]


def pooled(shares: Sequence[Measurement]) -> Measurement:
    """One share of all their trials, with its Wilson interval."""
    right, total = sum(round(m.median * m.repeats) for m in shares), sum(m.repeats for m in shares)
    return Measurement(shares[0].name, "ratio", right / total, *wilson(right, total), total)


def gain(r: Result) -> Measurement | None:
    """What rl ends above the control that ends highest, as a mean over seeds; low and high are the least and
    the most of a seed."""
    found = {arm: ends(r, arm) for arm in arms(r)}
    own = found.pop(RL, None)
    if own is None or not found:
        return None
    best = max(found, key=lambda arm: _mean([m.median for m in found[arm]]))
    over = [a.median - b.median for a, b in zip(own, found[best], strict=True)]
    labels: dict[str, Label] = {"control": best}
    return Measurement("gain", "ratio", _mean(over), min(over), max(over), len(over), labels)


def overlaps(r: Result) -> Measurement | None:
    """Seeds in which the interval of rl at the end does not lie above that of every control."""
    if gain(r) is None:
        return None
    highest = [max(m.high for m in each) for each in zip(*(ends(r, a) for a in _controls(r)), strict=True)]
    return _count("overlaps", sum(m.low <= top for m, top in zip(ends(r, RL), highest, strict=True)))


def _controls(r: Result) -> list[str]:
    return [arm for arm in arms(r) if arm != RL]


# ---- exactness ---------------------------------------------------------------------------------------


def total(r: Result, name: str, **labels: Label) -> Measurement | None:
    """The sum of every measurement of that name."""
    found = [m for m in r.measurements if m.name == name and m.has(**labels)]
    return _count(name, sum(m.median for m in found)) if found else None


def not_compared(r: Result, run: str) -> Measurement | None:
    """Steps of a run whose log-probabilities nobody compared."""
    steps, those = r.find("steps", run=run), r.find("steps compared", run=run)
    return None if steps is None or those is None else _count("not compared", steps.median - those.median)


def not_same(r: Result) -> Measurement | None:
    """Steps that, run again, gave other bytes."""
    found = replays(r)
    return _count("other bytes", sum(not m.median for m in found)) if found else None


def replays(r: Result) -> list[Measurement]:
    return [m for m in r.measurements if m.name == "step replayed, same bytes"]


# ---- one student of two specialists ------------------------------------------------------------------


def kept_gain(r: Result, task: str) -> Measurement | None:
    """Of what the specialist of a task learned beyond the start, the part that the student has."""
    found = [r.find("right answers", of=of, task=task, temperature=0.0) for of in ("start", "student", task)]
    start, student, specialist = (None if m is None else m.median for m in found)
    if start is None or student is None or specialist is None or specialist <= start:
        return None
    kept = (student - start) / (specialist - start)
    return Measurement("kept of the gain", "ratio", kept, kept, kept, 1, {"task": task})


def _count(name: str, value: float) -> Measurement:
    unit: Unit = "count"
    return Measurement(name, unit, value, value, value, 1)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
