"""The speed the project aims at, and what the stored results say to it."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from bittrue.bench.result import Label, Measurement, Result, Unit
from bittrue.bench.rl_sums import DISTILLED, gain, not_compared, not_same, overlaps, total
from bittrue.bench.speculation_tasks import MIX

Results = Mapping[str, Result]  # by file name

_FLASH_INDEX = {"index_heads": 64, "index_topk": 512}  # the index of DeepSeek-V4-Flash
_LONG = 917504  # "900K"
_MIN_TRAINING = 3.0  # over transformers
_TRAINING_LENGTHS = (64, 256, 1024)
# Of held-out answers: task with what finds the measurement, measure, least and most.
_TASK_SHARES: tuple[tuple[str, dict[str, Label], str, float, float], ...] = (
    ("sort", {}, "right answers", 0.95, 1.0),
    ("reverse", {}, "right answers", 0.95, 1.0),
    ("add", {}, "right answers", 0.95, 1.0),
    ("brackets", {}, "right answers", 0.90, 1.0),
    ("recall", {"tokens": 4096}, "right answers", 0.95, 1.0),
    ("recall", {"tokens": 32768}, "right answers", 0.95, 1.0),
    ("calc", {}, "well-formed calls", 0.95, 1.0),
    ("calc", {}, "right answers", 0.95, 1.0),
    ("countdown", {"temperature": 1.0}, "right answers", 0.10, 0.50),
)
_REPLAY_RATIOS = (("both over none", 0.6, False), ("shuffled over both", 3.0, True))
_PEER_RATIOS = (
    ("decode", 1, 256, 2.0),
    ("decode", 1, 4096, 2.0),
    ("decode", 1, 32768, 4.0),
    ("decode", 8, 4096, 4.0),
    ("prefill", 1, 4096, 3.0),
    ("prefill", 1, 32768, 3.0),
)


@dataclass(frozen=True, slots=True)
class Target:
    """One aim. ``seen`` is None where no stored result tells; ``file`` is the result that tells."""

    measure: str
    unit: Unit
    bound: float
    is_least: bool  # whether ``bound`` is the least allowed; else it is the most
    seen: Measurement | None
    file: str = ""

    @property
    def is_met(self) -> bool | None:
        if self.seen is None:
            return None
        return self.seen.median >= self.bound if self.is_least else self.seen.median <= self.bound


def targets(results: Results) -> list[Target]:
    """Every aim, once per result that measures it, in the order of the aims."""
    return [
        *_of(results, "peers", _peers),
        *_of(results, "frontier", _frontier),
        *_of(results, "ops", _ops),
        *_of(results, "server", _server),
        *_of(results, "cache", _cache),
        *_of(results, "agent", _agent),
        *_of(results, "speculation", _speculation),
        *_of(results, "tasks", _tasks),
        *_of(results, "training", _training),
        *_of(results, "rl-replay", _replay),
        *_of(results, "rl-trl", _rl_peer),
        *_of(results, "rl-gain", _rl_gain),
        *_of(results, "rl-exact", _rl_exact),
        *_of(results, "rl-distill", _rl_distill),
    ]


def _of(results: Results, benchmark: str, aims: Callable[[Result | None], Iterator[Target]]) -> list[Target]:
    """The aims of one benchmark for each of its results that measure any; without one, as not measured."""
    found = []
    for file, result in results.items():
        if result.benchmark == benchmark:
            found += [replace(t, file=file) for t in aims(result)]
    seen = [t for t in found if t.seen is not None]
    measured = {_without_model(t.measure) for t in seen}
    missing = [t for t in aims(None) if t.measure not in measured]
    return [*seen, *missing]


def _without_model(measure: str) -> str:
    return measure.partition(" (")[0]


def _peers(result: Result | None) -> Iterator[Target]:
    for kind, batch, context, least in _PEER_RATIOS:
        name = f"{kind} over fastest peer"
        seen = result.find(name, batch=batch, context=context) if result else None
        where = f", batch {batch}" if kind == "decode" else ""
        preset = f" ({result.config['preset']})" if result else ""
        yield Target(
            f"{kind}{where}, context {context:,}, over the fastest peer{preset}", "ratio", least, True, seen
        )


def _frontier(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    is_flash = result is not None and all(result.config[k] == v for k, v in _FLASH_INDEX.items())
    seen = result.find("decode over decode at 4096", context=_LONG, batch=1) if result and is_flash else None
    yield Target(f"decode at {_LONG:,} over decode at 4,096, Flash's index{model}", "ratio", 0.6, True, seen)
    longest = None
    if result:
        shares = [m for m in result.measurements if m.name == "resident over ledger"]
        longest = max(shares, key=lambda m: int(m.labels["context"]), default=None)
    yield Target(f"resident memory over the ledger, longest context{model}", "ratio", 1.05, False, longest)


def _ops(result: Result | None) -> Iterator[Target]:
    for form in ("fp4", "fp8", "bf16"):
        name = "linear, share of bandwidth"
        seen = result.find(name, format=form, of="copy") if result else None
        yield Target(f"linear, one row, {form}, share of copy bandwidth", "ratio", 0.8, True, seen)
    for form in ("f32", "bf16"):
        for rows in (64, 128, 512):
            name = "linear, share of torch"
            seen = result.find(name, format=form, rows=rows, of="torch f32") if result else None
            yield Target(f"linear, {rows} rows, {form}, share of torch's product", "ratio", 0.9, True, seen)


def _server(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    seen = result.find("start to first token") if result else None
    yield Target(f"server start to first token{model}", "s", 3.0, False, seen)
    seen = result.find("added per streamed token", streams=16) if result else None
    yield Target(f"added by the server per streamed token, 16 streams{model}", "s", 1e-3, False, seen)


def _cache(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    ways = {"device": 0.02, "host": 0.05, "disk, read lately": 0.15, "disk, not in memory": 0.15}
    for way, most in ways.items():
        seen = result.find("first token over cold", **{"from": way}) if result else None
        yield Target(
            f"first token of a cached prompt from {way}, over cold{model}", "ratio", most, False, seen
        )
    ratios = [m for m in result.measurements if m.name == "cached bytes over arithmetic"] if result else []
    largest = max(ratios, key=lambda m: m.median, default=None)
    yield Target(f"bytes of a cached prompt, over the arithmetic{model}", "ratio", 1.0, False, largest)
    seen = result.find("prefill without a hit, over off", cache="on") if result else None
    yield Target(f"prefill without a hit, cache on over off{model}", "ratio", 1.02, False, seen)
    for batch in (1, 8):
        seen = result.find("decode step, over off", cache="on", batch=batch) if result else None
        yield Target(f"decode step, batch {batch}, cache on over off{model}", "ratio", 1.02, False, seen)


def _agent(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    seen = result.find("token hit rate", of="cache") if result else None
    yield Target(f"token hit rate of an agent's session{model}", "ratio", 0.95, True, seen)


def _speculation(result: Result | None) -> Iterator[Target]:
    """Drafts that are never right must cost next to nothing."""
    model = f" ({result.config['model']})" if result else ""
    for text, by in (("random, of 32 tokens", "ngram"), ("of random weights", "mtp")):
        for batch in (1, 8):
            found = {"text": text, "by": by, "drafts": "adaptive", "batch": batch}
            seen = result.find("decode over off", **found) if result else None
            measure = f"decode with drafts of {by} that are wrong, batch {batch}, over off{model}"
            yield Target(measure, "ratio", 0.97, True, seen)
    seen = result.find("decode over off", text=MIX, by="mtp", drafts="up to 4", batch=1) if result else None
    yield Target(
        f"decode with drafts of mtp on the tasks, batch 1, over off{model}", "ratio", 1.0, True, seen
    )


def _tasks(result: Result | None) -> Iterator[Target]:
    """Shares of held-out problems; where a most is given, room is left above it on purpose."""
    is_test = result is not None and result.config["split"] == "test"
    model = f" ({result.config['model']})" if result else ""
    for task, labels, name, least, most in _TASK_SHARES:
        found: dict[str, Label] = {"temperature": 0.0, **labels, "task": task}
        seen = result.find(name, **found) if result and is_test else None
        where = f" at {labels['tokens']:,} tokens" if "tokens" in labels else ""
        drawn = ", drawn" if found["temperature"] else ""
        yield Target(f"{task}{where}, {name}{drawn}{model}", "ratio", least, True, seen)
        if most < 1:
            yield Target(f"{task}{where}, {name}{drawn}, headroom{model}", "ratio", most, False, seen)


def _training(result: Result | None) -> Iterator[Target]:
    preset = f" ({result.config['preset']})" if result else ""
    for length in _TRAINING_LENGTHS:
        found: dict[str, Label] = {"by": "bittrue, published", "over": "fastest", "length": length}
        seen = result.find("training over transformers", **found) if result else None
        measure = f"training, documents of {length:,} tokens, over the fastest of transformers{preset}"
        yield Target(measure, "ratio", _MIN_TRAINING, True, seen)


def _replay(result: Result | None) -> Iterator[Target]:
    """Of the sampled tokens of the policy whose weights every precision has to round."""
    model = f" ({result.config['model']})" if result else ""
    policies = [str(m.labels["policy"]) for m in result.measurements] if result else []
    found: dict[str, Label] = {"policy": (policies or [""])[-1], "answers": "sampled"}
    same = result.find("tokens that differ", **found, rollout="f32", replay="none") if result else None
    yield Target(f"rollouts in f32, log-probabilities that differ{model}", "count", 0.0, False, same)
    for precision in ("bf16", "fp8", "fp4"):
        for name, bound, is_least in _REPLAY_RATIOS:
            seen = result.find(name, **found, rollout=precision) if result else None
            measure = f"rollouts in {precision}, mean difference, replay: {name}{model}"
            yield Target(measure, "ratio", bound, is_least, seen)


def _rl_peer(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    seen = result.find("step, TRL over bittrue") if result else None
    yield Target(f"steps of reinforcement learning a second, over TRL's{model}", "ratio", 3.0, True, seen)


def _rl_gain(result: Result | None) -> Iterator[Target]:
    task = f" ({result.config['task']})" if result else ""
    seen = gain(result) if result else None
    yield Target(f"rewards over the best control, mean over seeds{task}", "ratio", 0.15, True, seen)
    seen = overlaps(result) if result else None
    yield Target(f"seeds whose interval touches a control's{task}", "count", 0.0, False, seen)


def _rl_exact(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    seen = total(result, "tokens that differ") if result else None
    yield Target(f"trainer against engine, log-probabilities that differ{model}", "count", 0.0, False, seen)
    seen = not_compared(result, "exact") if result else None
    yield Target(f"steps under fire that were not compared{model}", "count", 0.0, False, seen)
    for name in ("engine restarts", "preemptions"):
        seen = result.find(name, run="exact") if result else None
        yield Target(f"{name} in steps under fire{model}", "count", 1.0, True, seen)
    seen = not_same(result) if result else None
    yield Target(f"recorded steps that give other bytes when run again{model}", "count", 0.0, False, seen)


def _rl_distill(result: Result | None) -> Iterator[Target]:
    model = f" ({result.config['model']})" if result else ""
    for task in DISTILLED:
        seen = result.find("student over specialist", task=task) if result else None
        yield Target(f"student of two over the specialist of {task}{model}", "ratio", 0.95, True, seen)
