"""Stored results of trained models and of training -> their tables on the page."""

from collections.abc import Iterator

from bittrue.bench.cells import head, row, with_spread
from bittrue.bench.result import Measurement, Result
from bittrue.bench.speculation_tasks import MIX

_PEERS = ("default", "fastest")
TASKS = """\
## What a trained model knows

Held-out problems of every task, answers judged by its checker: greedy, or drawn at the temperature named; the
interval is Wilson's. Tokens of recall are those of the whole prompt.

"""
TRAINING = """\
## Training

Forward and backward over documents of equal length, loss on every token, no optimiser but where it is named.
transformers computes in float32 with eager attention; *fastest* is the quickest of its implementations of
experts and of documents in one pass, tried before. bittrue trains the loss of the index and of the balance,
too, which transformers has not; *with draft* a draft module besides. Before anything is timed the losses
have to be equal, and the gradients where the index leaves no entry out.

"""


def share_cells(m: Measurement) -> tuple[str, ...]:
    """Of a share of tries: of what, which measure, tries, right ones, share, its interval."""
    if m.name == "accepted drafts":
        what, right = str(m.labels["text"]), round(m.median * m.repeats)
        measure = f"accepted drafts at {m.labels['place']}"
    else:
        what, right = str(m.labels["task"]), int(m.labels["right"])
        what += f" at {m.labels['tokens']:,} tokens" if "tokens" in m.labels else ""
        drawn = "greedy" if m.labels["temperature"] == 0 else f"temperature {m.labels['temperature']:g}"
        measure = f"{m.name}, {drawn}"
    interval = f"{m.low:.1%} - {m.high:.1%}"
    return what, measure, f"{m.repeats:,}", f"{right:,}", f"{m.median:.1%}", interval


def task_tables(r: Result) -> Iterator[str]:
    yield head(f"{r.config['model']}: task", "measure", "n", "right", "share", "95 % interval")
    for m in r.measurements:
        yield row(*share_cells(m))
    yield "\n"


def training_tables(r: Result) -> Iterator[str]:
    speeds = [m for m in r.measurements if m.name == "training"]
    lengths = list(dict.fromkeys(int(m.labels["length"]) for m in speeds))
    columns = (f"documents of {length:,}" for length in lengths)
    yield head(f"{r.config['preset']}, {r.config['tokens']:,} tokens a step: tokens/s", *columns)
    for by in dict.fromkeys(m.labels["by"] for m in speeds):
        each = [r.find("training", by=by, length=length) for length in lengths]
        yield row(str(by), *map(_speed, each))
    peers = [{_speed(m) for m in speeds if m.has(by=f"transformers, {over}")} for over in _PEERS]
    for over in _PEERS if peers[0] != peers[1] else ("fastest",):  # else they are one
        ratios = [m for m in r.measurements if m.name == "training over transformers" and m.has(over=over)]
        for by in dict.fromkeys(m.labels["by"] for m in ratios):
            each = [next((m for m in ratios if m.has(by=by, length=length)), None) for length in lengths]
            name = f"{by}, over transformers, {over}"
            yield row(f"**{name}**" if over == "fastest" else name, *map(with_spread, each))
    yield "\n"


def _speed(m: Measurement | None) -> str:
    if m is None:
        return ""
    how = f" ({m.labels['experts']}, {m.labels['pass']:,} tokens a pass)" if "experts" in m.labels else ""
    return f"{m.median:,.0f}{how}"


def task_speculation_tables(r: Result) -> Iterator[str]:
    """The mix by way of drafting; then each task by the way that drafts most of the mix's ways."""
    yield from _ways(r)
    found = [m for m in r.measurements if m.name == "decode" and m.labels["text"] != MIX]
    ways = dict.fromkeys((m.labels["by"], m.labels["drafts"]) for m in found)
    fixed = [way for way in ways if str(way[1]).isdecimal()]
    if not fixed:
        return
    by, drafts = max(fixed, key=lambda way: int(way[1]))
    adaptive = f"up to {drafts}"
    places = range(1, int(drafts) + 1)
    yield head(
        f"{r.config['model']}: task, drafts of {by}",
        f"{adaptive}, over off",
        f"{drafts}, over off",
        f"{drafts}: acceptance length",
        *(f"place {place}" for place in places),
    )
    for text in dict.fromkeys(m.labels["text"] for m in found):
        where = {"text": text, "by": by}
        speeds = (r.find("decode over off", **where, drafts=d) for d in (adaptive, drafts))
        length = r.find("acceptance length", **where, drafts=drafts)
        each = (r.find("acceptance", **where, drafts=drafts, place=place) for place in places)
        yield row(str(text), *map(with_spread, speeds), _length(length), *map(_accepted, each))
    yield "\n"


def _ways(r: Result) -> Iterator[str]:
    mix = [m for m in r.measurements if m.name == "decode" and m.has(text=MIX)]
    places = sorted(
        {int(m.labels["place"]) for m in r.measurements if m.name == "acceptance" and m.has(text=MIX)}
    )
    yield head(
        f"{r.config['model']}: {r.config['tasks']} problems of every task, by",
        "drafts",
        "over off",
        "tokens/s",
        "whole answers over off",
        "acceptance length",
        *(f"place {place}" for place in places),
    )
    for m in mix:
        where = {name: m.labels[name] for name in ("text", "by", "drafts")}
        each = (r.find("acceptance", **where, place=place) for place in places)
        yield row(
            *(str(m.labels["by"]), str(m.labels["drafts"])),
            with_spread(r.find("decode over off", **where)),
            f"{m.median:,.0f}",
            with_spread(r.find("whole answers over off", **where)),
            _length(r.find("acceptance length", **where)),
            *map(_accepted, each),
        )
    yield "\n"


def _length(m: Measurement | None) -> str:
    return "" if m is None else f"{m.median:.2f}"


def _accepted(m: Measurement | None) -> str:
    return "" if m is None else f"{m.median:.0%} of {m.labels['drafted']:,}"
