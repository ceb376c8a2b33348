"""Stored runs of reinforcement learning -> their tables and curves on the page."""

from collections.abc import Iterator, Sequence

from bittrue.bench.cells import head, row, shown, with_spread
from bittrue.bench.result import Measurement, Result
from bittrue.bench.rl_sums import (
    DISTILLED,
    GREEDY,
    RL,
    SAMPLED,
    arms,
    curve,
    ends,
    gain,
    kept_gain,
    overlaps,
    pooled,
    replays,
    seeds,
)
from bittrue.train.plot import Line, Plot

_LAST = 10  # steps at the end of a run, of which the mean is told
GAIN = """\
## What rewards add to labels

Labels are a fixed set of prompts, each answered by a teacher that is always right and verbose; a model
learned them to the plateau. From there, at the same rate and with as many trained tokens in every update:
*rl*, the checker's rewards on fresh prompts; *random*, rewards of a coin; *continued*, more of the labels;
*rejection*, the right ones among the answers that the start gives to the prompts of rl. Shares of held-out
prompts; a seed has prompts of its own, also held-out ones; intervals are Wilson's, 95 %.

"""
EXACT = """\
## Exactness under fire

*exact*: the engine in a process of its own with batches, shared prefixes, drafts and too little memory for
all its sequences, killed once in the middle of a step. *one-off*: learning from answers of the version
before. *ppo*: a value head, and a penalty for the distance to the first policy. Log-probabilities of the
trainer are compared with the sampled ones bit by bit; a step whose groups all scored alike has nothing to
learn, and is not compared. Choices are of experts.

"""
STALENESS = """\
## Learning from older weights

The same run with more and more versions between sampling and training; same seed, steps, rate and
correction. KL is that of the sampling policy to the trained one, estimated by k1, which may fall below 0;
*largest* is by size. ESS is the effective share of tokens under the correction's weights. Answers are
compared where their weights are still there when they have come. Trainer and engine share the cores: the
seconds say what a step took here, not what overlap is worth.

"""
DISTILL = """\
## Two specialists in one student

The specialists were made by rewards, each on its task alone; the student learned both tasks from them on
its own answers, without rewards, from the same start. Shares of test problems, greedy; intervals are
Wilson's, 95 %; those of ratios go from the least of one interval over the most of the other to the reverse.

"""


# ---- what rewards add --------------------------------------------------------------------------------


def gain_tables(r: Result) -> Iterator[str]:
    updates = int(ends(r, RL)[0].labels["updates"]) if RL in arms(r) else 0
    columns = (*(f"seed {seed}" for seed in seeds(r)), "all seeds")
    yield head(f"{r.config['task']}, greedy, after {updates} updates", *columns)
    first = [curve(r, arms(r)[0], seed)[0] for seed in seeds(r)]
    for name, shares in (("the start", first), *((arm, ends(r, arm)) for arm in arms(r))):
        yield row(name, *map(_share, shares), _share(pooled(shares)))
    yield "\n"
    yield from _sampled(r, columns)
    found, overlapping = gain(r), overlaps(r)
    if found is not None and overlapping is not None:
        mean, low, high = (f"{100 * value:+.1f}" for value in (found.median, found.low, found.high))
        touching = f"{overlapping.median:.0f} of {found.repeats} seeds"
        yield (
            f"rl ends {mean} points from the best control, {found.labels['control']} ({low} to {high} by "
            f"seed); its interval touches a control's in {touching}.\n\n"
        )
    if "note" in r.config:
        yield f"{r.config['note']}\n\n"


def _sampled(r: Result, columns: Sequence[str]) -> Iterator[str]:
    """Where one answer to each prompt was drawn, too."""
    found = {arm: [curve(r, arm, seed, SAMPLED) for seed in seeds(r)] for arm in arms(r)}
    if not all(lines for each in found.values() for lines in each):
        return
    yield head(f"{r.config['task']}, at temperature 1", *columns)
    first = [lines[0].median for lines in found[arms(r)[0]]]
    last = {arm: [lines[-1].median for lines in each] for arm, each in found.items()}
    for name, values in {"the start": first, **last}.items():
        yield row(name, *(f"{value:.1%}" for value in (*values, _mean(values))))
    yield "\n"


def gain_plots(r: Result) -> list[Plot]:
    """Every curve: a colour for an arm, a line for a seed."""
    return [
        Plot(
            f"{r.config['task']}, held out, {name}: share right by updates",
            [
                _line(f"{arm} {seed}", curve(r, arm, seed, suffix), "updates", tint=place)
                for seed in seeds(r)
                for place, arm in enumerate(arms(r))
            ],
        )
        for name, suffix in (("greedy", GREEDY), ("at temperature 1", SAMPLED))
        if any(m.name.endswith(suffix) for m in r.measurements)
    ]


# ---- exactness ---------------------------------------------------------------------------------------

_EXACT_COUNTS = (
    *("steps", "steps compared", "tokens compared", "tokens that differ", "choices that differ"),
    *("preemptions", "engine restarts"),
)
_EXACT_RATIOS = ("prefix tokens from the cache", "tokens of a speculative step")


def exact_tables(r: Result) -> Iterator[str]:
    yield head(f"{r.config['model']}: run", *_EXACT_COUNTS, "largest difference", *_EXACT_RATIOS)
    runs = list(dict.fromkeys(str(m.labels["run"]) for m in r.measurements))
    for run in runs:
        counts, largest = (r.find(name, run=run) for name in _EXACT_COUNTS), _of(r, run)
        yield row(
            run,
            *("" if m is None else f"{m.median:,g}" for m in counts),
            largest,
            *(with_spread(r.find(name, run=run)) for name in _EXACT_RATIOS),
        )
    yield "\n"
    again = replays(r)
    if again:
        same = sum(bool(m.median) for m in again)
        yield f"Computed again from their records, {same} of {len(again)} steps gave the same bytes: "
        each = {run: sorted(int(m.labels["step"]) for m in again if m.has(run=run)) for run in runs}
        yield "; ".join(f"{run} {', '.join(map(str, steps))}" for run, steps in each.items() if steps)
        yield ".\n\n"


def _of(r: Result, run: str) -> str:
    found = r.find("difference, largest", run=run)
    return "" if found is None else shown(found.median, found.unit)


# ---- older weights -----------------------------------------------------------------------------------

_STALENESS_CURVES = (
    ("reward/mean", "mean score by step"),
    ("train/ppo_kl", "KL of the sampling policy to the trained one, nats a token"),
    ("is/ess_ratio", "effective share of tokens under the correction's weights"),
)


def staleness_tables(r: Result) -> Iterator[str]:
    title = f"{r.config['task']}, {r.config['steps']} steps: arm"
    columns = (
        *("staleness, mean", "most", f"score, last {_LAST} steps", "KL, mean", "largest"),
        *("ESS, mean", "least", "seconds a step", "tokens compared", "that differ"),
    )
    yield head(title, *columns)
    names = list(dict.fromkeys(str(m.labels["arm"]) for m in r.measurements if "arm" in m.labels))
    for arm in names:
        yield row(arm, *_staleness_cells(r, arm))
    yield "\n"
    held_out = [m for m in r.measurements if m.name.endswith(GREEDY)]
    updates = sorted({int(m.labels["updates"]) for m in held_out})
    for name in dict.fromkeys(m.name for m in held_out):
        task = name.removesuffix(GREEDY).removeprefix("eval/")
        yield head(f"{task}, held out, greedy: arm", *(f"after {number} updates" for number in updates))
        for arm in names:
            yield row(arm, *(_share(r.find(name, arm=arm, updates=number)) for number in updates))
        yield "\n"
    for m in r.measurements:
        if m.name == "refused without a correction":
            how = f"refused: `{m.labels['error']}`" if m.median else "**not refused**"
            yield f"The {m.labels['kind']} loop without a correction is {how}.\n\n"


def _staleness_cells(r: Result, arm: str) -> Iterator[str]:
    mean_age, age = (_values(r, f"rollout/staleness/{name}", arm) for name in ("mean", "max"))
    score, kl, ess = (_values(r, name, arm) for name, _ in _STALENESS_CURVES)
    yield f"{_mean(mean_age):.2f}" if mean_age else ""
    yield f"{max(age):.0f}" if age else ""
    yield f"{_mean(score[-_LAST:]):.3f}" if score else ""
    yield from (shown(value, "nats") for value in (_mean(kl), max(kl, key=abs))) if kl else ("", "")
    yield from (f"{value:.4f}" for value in (_mean(ess), min(ess))) if ess else ("", "")
    seconds = sorted(_values(r, "step", arm))
    yield shown(seconds[len(seconds) // 2], "s") if seconds else ""
    counts = ("tokens sampled", "tokens compared", "tokens that differ")
    sampled, those, differing = (r.find(name, arm=arm) for name in counts)
    yield "" if those is None or sampled is None else f"{those.median:,.0f} of {sampled.median:,.0f}"
    yield "" if differing is None else f"{differing.median:,.0f}"


def _values(r: Result, name: str, arm: str) -> list[float]:
    return [m.median for m in r.measurements if m.name == name and m.has(arm=arm)]


def staleness_plots(r: Result) -> list[Plot]:
    names = list(dict.fromkeys(str(m.labels["arm"]) for m in r.measurements if "arm" in m.labels))
    return [
        Plot(title, [_line(arm, [m for m in r.measurements if m.name == name and m.has(arm=arm)], "step")
                     for arm in names])
        for name, title in _STALENESS_CURVES
    ]  # fmt: skip


# ---- one student of two specialists ------------------------------------------------------------------


def distill_tables(r: Result) -> Iterator[str]:
    yield head(f"{r.config['model']}: greedy, right answers", *DISTILLED)
    names = {"start": "the start", **{task: f"specialist of {task}" for task in DISTILLED}}
    for of, name in {**names, "student": "**the student**"}.items():
        found = (r.find("right answers", of=of, task=task, temperature=0.0) for task in DISTILLED)
        yield row(name, *map(_share, found))
    yield row("student over specialist", *(with_spread(_ratio(r, task)) for task in DISTILLED))
    kept = (kept_gain(r, task) for task in DISTILLED)
    yield row("kept of what the specialist gained", *("" if m is None else f"{m.median:.2f}" for m in kept))
    yield "\n"
    counts = ("steps", "steps compared", "tokens sampled", "tokens compared", "tokens that differ")
    yield head("run", *counts)
    for of in (*DISTILLED, "student"):
        found = (r.find(name, of=of) for name in counts)
        yield row(of, *("" if m is None else f"{m.median:,.0f}" for m in found))
    yield "\n"
    tried = [m for m in r.measurements if m.name == "divergence of a trial"]
    if tried:
        chosen = {True: " (chosen)", False: ""}
        each = (f"{m.labels['lr']:g}{chosen[bool(m.labels['chosen'])]}: {m.median:.4f}" for m in tried)
        yield f"Rates the student tried, nats a token from its teachers: {', '.join(each)}.\n\n"


def _ratio(r: Result, task: str) -> Measurement | None:
    return r.find("student over specialist", task=task)


def distill_plots(r: Result) -> list[Plot]:
    def named(name: str, of: str) -> list[Measurement]:
        return [m for m in r.measurements if m.name == name and m.has(of=of)]

    apart = _line("student", named("train/teacher_kl", "student"), "step")
    scores = [_line(of, named("reward/mean", of), "step") for of in (*DISTILLED, "student")]
    return [
        Plot("divergence of the student from its teachers, nats a token", [apart], is_logarithmic=True),
        Plot("mean score by step; the student's is only measured", scores),
    ]


# ---- cells and lines ---------------------------------------------------------------------------------


def _share(m: Measurement | None) -> str:
    return "" if m is None else f"{m.median:.1%} ({m.low:.1%} to {m.high:.1%})"


def _line(name: str, found: Sequence[Measurement], axis: str, *, tint: int | None = None) -> Line:
    return Line(name, [int(m.labels[axis]) for m in found], [m.median for m in found], tint=tint)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
