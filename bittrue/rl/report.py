"""report.html of an RL run: what it shows, its curves beside those of controls, and where it comes from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from bittrue.errors import UsageError
from bittrue.rl.certificate import Certificate, make_certificate
from bittrue.rl.environment import Environment
from bittrue.rl.run_files import curve, read_curves, read_run, read_settings
from bittrue.train.checkpoint import write_file
from bittrue.train.page import columns, facts, figures, page, shown, table
from bittrue.train.plot import Line, Plot, bars, svg

REPORT_FILE = "report.html"
_ENDS = 10  # steps in the means at both ends of a curve
_HELD_OUT = "eval/"
_SHORT = 12  # digits of a digest where it is told from others

Metrics = Sequence[Mapping[str, float]]


@dataclass(frozen=True, slots=True)
class Curves:
    """The numbers of a run, by its name; those of a control are drawn dashed."""

    name: str
    metrics: Metrics
    settings: Mapping[str, object]
    is_control: bool = True


@dataclass(frozen=True, slots=True)
class _Picture:
    """One plot: its title, its metrics with their names in the legend, and its axis."""

    title: str
    metrics: Mapping[str, str]
    is_logarithmic: bool = False


_PICTURES = (
    _Picture("Reward of the answers sampled, mean", {"reward/mean": "mean"}),
    _Picture(
        "|trainer - engine| of log-probabilities, nats, largest", {"parity/logprob_abs_diff/max": "max"}
    ),
    _Picture("KL of engine to trainer, k3, nats a token", {"parity/k3": "k3"}, is_logarithmic=True),
    _Picture(
        "Share of tokens whose choices differ",
        {"parity/router_token_flips": "experts", "parity/index_token_flips": "rows"},
    ),
    _Picture("KL of the sampling policy to the trained one, k1, nats a token", {"train/ppo_kl": "KL"}),
    _Picture(
        "KL to the reference or to teachers, nats a token",
        {"train/kl": "reference", "train/teacher_kl": "teachers"},
    ),
    _Picture("Entropy, nats a token", {"train/entropy": "entropy"}),
    _Picture(
        "Tokens of an answer",
        {"rollout/response_length/mean": "mean", "rollout/response_length/max": "longest"},
    ),
    _Picture("Share of answers cut at their limit", {"rollout/truncated_ratio": "cut"}),
    _Picture(
        "Share of groups with equal scores",
        {"rollout/frac_reward_zero_std": "equal", "rollout/frac_all_one": "all right"},
    ),
    _Picture("Effective share of the tokens under the corrections' weights", {"is/ess_ratio": "ESS"}),
    _Picture(
        "Staleness of the tokens, versions",
        {"rollout/staleness/mean": "mean", "rollout/staleness/max": "most"},
    ),
    _Picture("Gradient norm, before clipping", {"train/grad_norm": "norm"}, is_logarithmic=True),
    _Picture("Loss of the value head", {"train/value_loss": "loss"}, is_logarithmic=True),
    _Picture("Learning rate", {"train/lr": "lr"}),
    _Picture(
        "Seconds of a step",
        {
            "perf/rollout_seconds": "sampling and scoring",
            "perf/train_seconds": "update",
            "perf/sync_seconds": "publishing",
            "perf/eval_seconds": "held out",
        },
    ),
)


def write_report(directory: Path, controls: Sequence[Path] = ()) -> Path:
    """Writes the report of the run in ``directory``, beside the curves of other runs. Raises CheckpointError
    naming a file, UsageError for a control that is the run itself or has the name of another."""
    certificate = make_certificate(directory)
    run = read_run(directory)
    own = Curves(_name(directory), run.metrics, run.config, is_control=False)
    names = [own.name, *(_name(control) for control in controls)]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two runs of the report are called {twice}; rename one of the directories")
    others = [Curves(_name(path), read_curves(path), read_settings(path)) for path in controls]
    path = directory / REPORT_FILE
    write_file(path, report_html(certificate, own, others, run.sittings[-1].environment))
    return path


def report_html(
    certificate: Certificate, own: Curves, controls: Sequence[Curves], environment: Environment
) -> str:
    """The page."""
    runs = [own, *controls]
    steps = certificate.steps
    marks = [step for step in steps.resumed if 0 < step < steps.done]
    kind = "good" if certificate.holds else "bad"
    parts = [
        f"<h1>RL run {escape(own.name)}</h1>",
        f'<p class="verdict {kind}">{escape(_headline(certificate))}</p>',
        f'<p class="quiet">{escape(_progress(certificate))}</p>',
        f'<p class="quiet">certificate <code>{certificate.digest}</code></p>',
        *_problems(certificate.problems),
        figures(svg(plot) for plot in plots(runs, marks)),
        columns({"Parity": _parity(certificate), "Answers and time": _answers(certificate)}),
        figures(
            [
                bars("Answers by what their verifier said", certificate.outcomes),
                bars("Groups not learned from, by reason", certificate.drops),
            ]
        ),
        *_comparison(runs),
        f"<h2>Weights</h2>{_weights(certificate)}",
        columns({"Data and code": facts(_origin(certificate)), "Environment": facts(_machine(environment))}),
        f"<h2>Run file</h2>{facts(_settings(own.settings))}",
    ]
    return page(f"RL run {own.name}", parts)


def plots(runs: Sequence[Curves], marks: Sequence[int] = ()) -> Iterator[Plot]:
    """Every picture, of what at least one run measured. ``marks``: steps at which the run was taken on."""
    held_out = {name: name.removeprefix(_HELD_OUT) for name in _held_out(runs)}
    solved = [_Picture("Held-out share solved", held_out)] if held_out else []
    for picture in (_PICTURES[0], *solved, *_PICTURES[1:]):
        lines = [
            _line(run, metric, _legend(picture, run, label, several=len(runs) > 1))
            for run in runs
            for metric, label in _of(picture, run)
        ]
        drawn = [line for line in lines if line.steps]
        if drawn:
            # On a scale of ratios there is no zero: where all bits agree, the plain one shows it.
            is_positive = all(value > 0 for line in drawn for value in line.values)
            yield Plot(picture.title, drawn, picture.is_logarithmic and is_positive, marks)


def _of(picture: _Picture, run: Curves) -> list[tuple[str, str]]:
    """The metrics a run has in a picture: a control only the first, except of what was held out."""
    metrics = list(picture.metrics.items())
    return metrics[:1] if run.is_control and not metrics[0][0].startswith(_HELD_OUT) else metrics


def _held_out(runs: Sequence[Curves]) -> list[str]:
    """The names of every held-out curve there is."""
    names = {name for run in runs for line in run.metrics for name in line}
    return sorted(name for name in names if name.startswith(_HELD_OUT))


def _line(run: Curves, metric: str, name: str) -> Line:
    points = curve(run.metrics, metric)
    return Line(name, [step for step, _ in points], [v for _, v in points], is_dashed=run.is_control)


def _legend(picture: _Picture, run: Curves, label: str, *, several: bool) -> str:
    words = ([run.name] if several else []) + ([label] if len(picture.metrics) > 1 or not several else [])
    return ": ".join(words)


# ---- sections ----------------------------------------------------------------------------------------


def _headline(certificate: Certificate) -> str:
    verdict = certificate.verdict
    return verdict if certificate.steps.is_finished else f"{verdict}; not at its end yet"


def _progress(certificate: Certificate) -> str:
    steps, parity = certificate.steps, certificate.parity
    said = [f"{steps.done:,} of {steps.asked:,} steps, begun {steps.begun_at or '-'}"]
    idle = steps.done - parity.steps - parity.unmeasured
    if idle:
        said.append(f"without an answer to learn from: {idle:,}")
    if parity.unmeasured:
        said.append(f"learned from answers compared earlier: {parity.unmeasured:,}")
    if steps.resumed:
        said.append(f"taken on at step {', '.join(map(str, steps.resumed))}")
    if steps.engine_restarts:
        said.append(f"restarts of an engine: {steps.engine_restarts}")
    return "; ".join(said)


def _problems(problems: Sequence[str]) -> list[str]:
    items = "".join(f"<li>{escape(problem)}</li>" for problem in problems)
    return [f'<h2>Problems</h2><ul class="bad">{items}</ul>'] if problems else []


def _parity(certificate: Certificate) -> str:
    parity = certificate.parity
    head = facts(
        {
            "asked for": f"{parity.mode}, compared {parity.compared}",
            "steps compared": f"{parity.steps:,}",
            "steps with a differing bit": f"{parity.steps_differing:,}",
            "tokens compared": f"{parity.tokens:,}",
            "tokens with a differing bit": f"{parity.tokens_differing:,}",
            "correction": certificate.correction.mode,
        }
    )
    worst = [(name, f"{found.value:.3g}", str(found.step)) for name, found in parity.worst.items()]
    extents = certificate.correction.extents | certificate.staleness
    rows = [(n, f"{e.low:.3g}", f"{e.mean:.3g}", f"{e.high:.3g}") for n, e in extents.items()]
    body = head + table(("worst over all steps", "value", "step"), worst)
    return body + (table(("over the steps", "least", "mean", "most"), rows) if rows else "")


def _answers(certificate: Certificate) -> str:
    total = certificate.seconds["steps"] + certificate.seconds["eval"]
    rows = {
        "answers judged": f"{sum(certificate.outcomes.values()):,}",
        "timeouts, crashes": ", ".join(
            f"{certificate.outcomes.get(name, 0):,}" for name in ("timeout", "crash")
        ),
        "judges": certificate.isolation,
        "groups": f"{certificate.groups:,}",
        "not learned from": f"{sum(certificate.drops.values()):,}",
    }
    times = [
        (name, _duration(seconds), f"{seconds / total:.0%}" if total else "-")
        for name, seconds in certificate.seconds.items()
    ]
    return facts(rows) + table(("wall clock", "time", "of all"), times)


def _comparison(runs: Sequence[Curves]) -> list[str]:
    """First and last values of the curves that say what was learned, and in what the controls differ."""
    held_out = _held_out(runs)
    rows = []
    for run in runs:
        for name in ("reward/mean", *held_out):
            points = [value for _, value in curve(run.metrics, name)]
            if points:
                width = _ENDS if name == "reward/mean" else 1
                ends = (_mean(points[:width]), _mean(points[-width:]), max(points))
                head = f"{run.name}: {name}" if len(runs) > 1 else name
                rows.append((head, str(len(points)), *(f"{value:.4f}" for value in ends)))
    parts = {"First and last": table(("curve", "values", "first", "last", "largest"), rows)}
    parts["First and last"] += f'<p class="quiet">Rewards: means of {_ENDS} steps, and the largest step.</p>'
    if len(runs) > 1:
        own = _settings(runs[0].settings)
        other = [
            (control.name, f"{name}: {own.get(name, '-')} here, {value} there")
            for control in runs[1:]
            for name, value in _settings(control.settings).items()
            if name != "run.out" and own.get(name) != value
        ]
        differing = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in other)
        parts["What the controls change"] = f"<table>{differing}</table>" if other else "<p>Nothing.</p>"
    return [columns(parts)] if rows else []


def _weights(certificate: Certificate) -> str:
    weights = certificate.weights
    ends = facts(
        {
            "before the first step": weights.start or "-",
            "after the last": weights.end or "-",
            "masters after the last": weights.masters_end or "-",
            "versions published": f"{len(set(weights.published)):,}",
        }
    )
    pairs = zip(weights.published, weights.published[1:], strict=False)
    rows = [(str(i), before[:_SHORT], after[:_SHORT]) for i, (before, after) in enumerate(pairs)]
    chain = table(("step", "before", "after"), rows)
    return f"{ends}<details><summary>every publication</summary>{chain}</details>"


def _origin(certificate: Certificate) -> dict[str, str]:
    code = certificate.code
    changed = " with changes" if code.is_dirty else ""
    return {
        **{f"seed {name}": str(seed) for name, seed in certificate.seeds.items()},
        **{f"data {name}": digest for name, digest in certificate.data.items()},
        "settings": certificate.config,
        "commit": f"{code.commit}{changed}" if code.commit else "not a checkout",
        "sources": code.sources,
        "kernels": code.kernels,
        "environments": str(code.environments),
        "records": certificate.records,
        **certificate.files,
    }


def _machine(environment: Environment) -> dict[str, str]:
    return {
        "bittrue": environment.bittrue,
        "ops": environment.backend,
        "threads": f"{environment.threads} of {environment.cpus} processors",
        "processor": environment.processor,
        "system": environment.platform,
        "python, torch, numpy": ", ".join((environment.python, environment.torch, environment.numpy)),
        "processor flags": " ".join(environment.cpu_flags),
    }


def _settings(settings: Mapping[str, object]) -> dict[str, str]:
    return {
        f"{section}.{key}": shown(value)
        for section, values in settings.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _name(directory: Path) -> str:
    return directory.resolve().name
