"""Stored steps of reinforcement learning against another trainer -> their table on the page."""

from collections.abc import Iterator

from bittrue.bench.cells import head, row, with_spread
from bittrue.bench.result import Measurement, Result

RL_PEER = """\
## A step of reinforcement learning

The same task, batch, first weights and number of threads in TRL's GRPOTrainer with the model of transformers
in float32 (`benchmarks/peers/README.md`); blocks of steps in turn, ratios round by round. A step is problems,
answers, scores, update and publication; *rollout* is answers and scores. bittrue trains in the published
formats, compares every log-probability with the sampled one, and leaves out groups whose answers score alike;
TRL trains on all answers. Both step by AdamW.

"""
_PARTS = ("step", "rollout", "train", "publish")


def rl_peer_tables(r: Result) -> Iterator[str]:
    answers = f"{r.config['prompts']} x {r.config['group']} answers of up to {r.config['max_tokens']} tokens"
    counts = ("tokens of an answer", "right answers", "answers trained on")
    yield head(f"{r.config['model']}, {r.config['task']}, {answers}: seconds of a", *_PARTS, *counts)
    for by in dict.fromkeys(m.labels["by"] for m in r.measurements if m.name == "step"):
        parts = [r.find(name, by=by) for name in _PARTS]
        lengths, *shares = (r.find(name, by=by) for name in counts)
        yield row(
            f"{by}{_way(parts[0])}",
            *map(with_spread, parts),
            f"{lengths.median:.1f}" if lengths else "",
            *(f"{m.median:.0%}" if m else "" for m in shares),
        )
    ratios = [r.find(f"{name}, TRL over bittrue") for name in _PARTS]
    yield row("**trl over bittrue**", *map(with_spread, ratios), *("" for _ in counts))
    for m in r.measurements:
        if m.name == "tried step":
            yield row(f"trl, tried before{_way(m)}", with_spread(m), *("" for _ in (*_PARTS[1:], *counts)))
    yield "\n"


def _way(m: Measurement | None) -> str:
    """How transformers computed, where that is told."""
    if m is None or "experts" not in m.labels:
        return ""
    passes = m.labels["passes"]
    return f" ({m.labels['experts']}, {passes} {'pass' if passes == 1 else 'passes'})"
