"""Stored results of reinforcement learning -> their tables on the page."""

from collections.abc import Iterator

from bittrue.bench.cells import head, row, shown
from bittrue.bench.result import Measurement, Result

REPLAY = """\
## What replay is worth

Engines sampled answers; a trainer that computes in float32 on the policy's own weights computes their
log-probabilities again. Rollouts in f32 and bf16: weights, activations and rows; fp8 and fp4: the format of
the experts at the published level, with FP8 matrices, activations and rows, and FP4 index keys. d is the
difference of log-probabilities in nats. Choices are compared as they are made under replay: what is repeated
cannot flip. *Shuffled* records are of random other tokens (rows: of earlier ones), *shifted* ones of the
token before, both replayed whole; they are compared with what the trainer chooses for itself, and *refused*
is the share of seeds whose records the check of selections refuses. Means over seeds; in brackets their
range. Sampled answers go on behind their end token; given ones stand in the prompts, behind the place from
which on rows are chosen.

"""
_RATIOS = ("routing over none", "index over none", "both over none", "shuffled over both")


def replay_tables(r: Result) -> Iterator[str]:
    """A table of cells for each policy, and one of the shares that replay leaves."""
    policies = tuple(dict.fromkeys(str(m.labels["policy"]) for m in r.measurements))
    for policy in policies:
        yield from _cells(r, policy)
    yield from _ratios(r, policies)


def _cells(r: Result, policy: str) -> Iterator[str]:
    columns = ("mean |d|", "largest", "k3", "beyond ln 2", "tokens that differ", "router flips")
    title = f"{r.config['model']} {policy}, sampled answers: rollouts"
    yield head(title, "replay", *columns, "index flips", "refused")
    for m in r.measurements:
        if m.name != "difference, mean" or not m.has(policy=policy, answers="sampled"):
            continue
        where = {name: m.labels[name] for name in ("policy", "rollout", "replay")}
        here = {**where, "answers": "sampled"}
        yield row(
            str(m.labels["rollout"]),
            str(m.labels["replay"]),
            _mean(m),
            _largest(r.find("difference, largest", **here)),
            _plain(r.find("k3", **here)),
            _share(r.find("beyond a factor of two", **here)),
            _of(r.find("tokens that differ", **here), r.find("tokens compared", **here)),
            _share(r.find("router flips", **where)),
            _share(r.find("index flips", **where)),
            _share(r.find("records refused", **where), digits=0),
        )
    yield "\n"


def _ratios(r: Result, policies: tuple[str, ...]) -> Iterator[str]:
    columns = ("weights off by", "answers", "mean |d| without replay")
    yield head(f"{r.config['model']}: policy", "rollouts", *columns, *_RATIOS)
    for m in (each for policy in policies for each in _rounding(r, policy)):
        for answers in ("sampled", "given"):
            where = {"policy": m.labels["policy"], "rollout": m.labels["rollout"], "answers": answers}
            ratios = [r.find(name, **where) for name in _RATIOS]
            cells = ("" if ratio is None else _mean(ratio) for ratio in ratios)
            without = _plain(r.find("difference, mean", **where, replay="none"))
            yield row(str(m.labels["policy"]), str(m.labels["rollout"]), _share(m), answers, without, *cells)
    yield "\n"


def _rounding(r: Result, policy: str) -> list[Measurement]:
    return [m for m in r.measurements if m.name == "rounding of weights" and m.has(policy=policy)]


def _of(part: Measurement | None, whole: Measurement | None) -> str:
    if part is None or whole is None:
        return ""
    return f"{float(part.labels['mean']):,.0f} of {float(whole.labels['mean']):,.0f}"


def _mean(m: Measurement) -> str:
    """With the range over seeds."""
    values = (float(m.labels["mean"]), m.low, m.high)
    if m.repeats == 1 or m.low == m.high:
        return shown(values[0], m.unit)
    mean, low, high = (shown(value, m.unit) for value in values)
    return f"{mean} ({low} to {high})"


def _plain(m: Measurement | None) -> str:
    return "" if m is None else shown(float(m.labels["mean"]), m.unit)


def _largest(m: Measurement | None) -> str:
    return "" if m is None else shown(m.high, m.unit)


def _share(m: Measurement | None, *, digits: int = 2) -> str:
    return "" if m is None else f"{float(m.labels['mean']):.{digits}%}"
