"""Stored results of the cache, of agents, drafts and recovery -> their tables on the page."""

from collections.abc import Iterator

from bittrue.bench.cells import head, row, shown, with_spread
from bittrue.bench.report_train import task_speculation_tables
from bittrue.bench.result import Label, Measurement, Result

CACHE = """\
## The prefix cache

Time from asking for one token to having it, of a prompt asked before; every round has another prompt.
*Replay* is another question behind the same text, at whose place there is no state: it is computed again from
the stored rows. *Not in memory*: the system was asked to forget the files before. *Cold* has no cache.

"""
AGENT = """\
## A session of an agent

Every prompt is the history so far: tools called, one branch, an edit every fifth turn
(`bittrue/bench/agent.py`). *Ideal* is a cache that loses nothing and could resume anywhere.

"""
SPECULATION = """\
## Drafts

Decode speed over that without drafts, in turn, and the share of drafts at each place that became output. A
text that is *copied* repeats a passage of the prompt, *1 of 16 changed* with other tokens here and there: a
grammar makes random weights say it. In a *random* text of 32 tokens, looking back nearly always finds
something, and it is wrong; *of random weights* is what these say by themselves. Where *problems* are the
text, a trained model answers held-out ones, one at a time: *up to 4* are as many drafts as pay, *4* as many
in every step; *whole answers* has the prompts in it, too; the *acceptance length* is tokens a decode step.

"""
RECOVERY = """\
## Recovery

The engine process is killed (SIGKILL) while all streams are open: seconds until each goes on.

"""


def cache_tables(r: Result) -> Iterator[str]:
    yield from _first_tokens(r)
    yield from _bytes(r)
    yield from _shapes(r)
    yield from _cost(r)


def _first_tokens(r: Result) -> Iterator[str]:
    yield head(f"{r.config['model']}: from", "time to first token", "over cold", "tokens not computed")
    for m in _named(r, "time to first token"):
        share = r.find("first token over cold", **{"from": m.labels["from"]})
        cached = m.labels.get("cached")
        known = "" if cached is None else f"{cached:,} of {m.labels['tokens']:,}"
        yield row(str(m.labels["from"]), with_spread(m), with_spread(share), known)
    yield "\n"
    held = r.find("disk cache in the page cache", **{"from": "disk, not in memory"})
    if held is not None:
        kept = f"{held.median:.0%}"
        yield f"After that request the system still held {kept} of the files' blocks in memory.\n\n"


def _bytes(r: Result) -> Iterator[str]:
    """One line per strategy: bytes per token by tier, and how far they are from the arithmetic."""
    name = "bytes per cached token"
    tiers = list(dict.fromkeys(m.labels["tier"] for m in _named(r, name)))
    if not tiers:
        return
    yield head("strategy", "states", *(f"{t}, bytes a token" for t in tiers), "over arithmetic", "long texts")
    for strategy in dict.fromkeys(m.labels["strategy"] for m in _named(r, name)):
        each = [r.find(name, strategy=strategy, tier=tier) for tier in tiers]
        ratios = [m.median for m in _named(r, "cached bytes over arithmetic") if m.has(strategy=strategy)]
        limit = r.find("bytes per token by arithmetic", strategy=strategy)
        states = next(m.labels["states"] for m in each if m is not None)
        cells = ("" if m is None else f"{m.median:,.0f}" for m in each)
        long = "" if limit is None else f"{limit.median:,.0f}"
        yield row(str(strategy), str(states), *cells, f"{min(ratios):.4f} to {max(ratios):.4f}", long)
    yield "\n"


def _shapes(r: Result) -> Iterator[str]:
    """One line per model that was not loaded."""
    found = [m for m in _named(r, "bytes per token by arithmetic") if "shape" in m.labels]
    strategies = list(dict.fromkeys(m.labels["strategy"] for m in found))
    if not found:
        return
    yield head("shape, by arithmetic", *map(str, strategies), "a state", "a state on disk", "replay, tokens")
    for shape in dict.fromkeys(m.labels["shape"] for m in found):
        of_shape = [r.find("bytes per token by arithmetic", shape=shape, strategy=s) for s in strategies]
        names = ("bytes of a state", "bytes of a state on disk", "tokens of a replay from nothing")
        others = [r.find(name, shape=shape) for name in names]
        yield row(str(shape), *("" if m is None else f"{m.median:,.0f}" for m in (*of_shape, *others)))
    yield "\n"


def _cost(r: Result) -> Iterator[str]:
    names = ("prefill without a hit", "decode step")
    rows = [(n, m.labels) for n in names for m in _named(r, n) if m.labels["cache"] == "off"]
    kinds = [m.labels["cache"] for m in _named(r, names[0]) if m.labels["cache"] != "off"]
    if not rows:
        return
    yield head("the cache where it gains nothing", "off", *(f"{kind}, over off" for kind in kinds))
    for name, labels in rows:
        where = {k: v for k, v in labels.items() if k != "cache"}
        ratios = (r.find(f"{name}, over off", **{**where, "cache": kind}) for kind in kinds)
        what = ", ".join(f"{k} {v:,}" for k, v in where.items())
        yield row(f"{name}, {what}", with_spread(r.find(name, **labels)), *map(with_spread, ratios))
    yield "\n"


def agent_tables(r: Result) -> Iterator[str]:
    yield head(f"{r.config['model']}: of the prompts' tokens, cached", "all", "after the first request")
    for rate in _named(r, "token hit rate"):
        later = r.find("token hit rate after the first request", of=rate.labels["of"])
        cells = ("" if m is None else f"{m.median:.1%}" for m in (rate, later))
        yield row(str(rate.labels["of"]), *cells)
    yield "\n" + head("cache", "requests", "the session", "time to first token")
    for whole in _named(r, "session"):
        first = r.find("time to first token", cache=whole.labels["cache"])
        requests = str(whole.labels["requests"])
        yield row(str(whole.labels["cache"]), requests, shown(whole.median, "s"), with_spread(first))
    yield "\n"


def speculation_tables(r: Result) -> Iterator[str]:
    if "tasks" in r.config:
        yield from task_speculation_tables(r)
        return
    places = sorted({int(m.labels["place"]) for m in _named(r, "acceptance")})
    model = f"{r.config['model']}: text"
    yield head(model, "batch", "by", "drafts", "over off", "tokens/s", *(f"place {p}" for p in places))
    for m in _named(r, "decode"):
        where = {name: m.labels[name] for name in ("text", "batch", "by", "drafts")}
        each = (r.find("acceptance", **where, place=place) for place in places)
        yield row(
            *map(str, where.values()),
            with_spread(r.find("decode over off", **where)),
            f"{m.median:,.0f}",
            *("" if a is None else f"{a.median:.0%} of {a.labels['drafted']:,}" for a in each),
        )
    yield "\n"


def recovery_tables(r: Result) -> Iterator[str]:
    names = ("kill to engine ready", "kill to next token", "kill to next token of the last stream")
    yield head(
        f"{r.config['model']}: streams", "disk cache", "engine ready", "next token", "of the last stream"
    )
    for m in _named(r, names[0]):
        where: dict[str, Label] = {name: m.labels[name] for name in ("streams", "tier")}
        yield row(
            *(str(m.labels["streams"]), "yes" if m.labels["tier"] == "disk" else "no"),
            *(with_spread(r.find(name, **where)) for name in names),
        )
    yield "\n"


def _named(r: Result, name: str) -> list[Measurement]:
    return [m for m in r.measurements if m.name == name]
