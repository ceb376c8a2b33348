"""certificate.json of an RL run: what it claims, condensed from its directory, for anyone to check."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from bittrue.errors import CertificateInvalid, CheckpointError
from bittrue.rl.environment import Sitting
from bittrue.rl.metrics import METRICS
from bittrue.rl.parity import BOUNDS, MODES
from bittrue.rl.records import Records
from bittrue.rl.run_files import FILES, RunFiles, StepFacts, read_run
from bittrue.train.checkpoint import write_file

CERTIFICATE_FILE = "certificate.json"
FORMAT = 1
_DROPPED = "rollout/dropped/"
_SECONDS = ("rollout", "train", "sync", "eval")


@dataclass(frozen=True, slots=True)
class Extent:
    """A metric over the steps that measured it: smallest, largest, mean, and how many; of numbers only."""

    low: float
    high: float
    mean: float
    steps: int


@dataclass(frozen=True, slots=True)
class Worst:
    """The value of a metric at the step where it was worst."""

    value: float
    step: int


@dataclass(frozen=True, slots=True)
class Code:
    """What computed the last sitting. ``environments``: how many different ones the sittings had."""

    commit: str
    is_dirty: bool
    sources: str
    kernels: str
    environments: int


@dataclass(frozen=True, slots=True)
class Steps:
    """How far the run came. ``resumed``: the steps from which later sittings took it on."""

    done: int
    asked: int
    is_finished: bool
    resumed: tuple[int, ...]
    engine_restarts: int
    begun_at: str


@dataclass(frozen=True, slots=True)
class Weights:
    """``published``: the version before the first step and that after each. ``breaks``: steps that began
    with other weights than the step before ended with, or learned from tokens of weights never published."""

    start: str
    end: str
    masters_end: str
    published: tuple[str, ...]
    breaks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ParityTable:
    """Trainer against engine. ``compared``: before each gradient or, where a step learns from answers of
    older weights, as answers come. ``steps`` measured it, of these ``steps_differing`` had a token with any
    other bit; ``unmeasured`` stepped without. ``worst``, by metric: the largest size, of an overlap the
    smallest. ``not_numbers``: values that were none."""

    mode: str
    compared: Literal["before each gradient", "as answers come"]
    steps: int
    steps_differing: int
    unmeasured: int
    tokens: int
    tokens_differing: int
    not_numbers: int
    worst: dict[str, Worst]


@dataclass(frozen=True, slots=True)
class CorrectionTable:
    """What was done about tokens that another policy sampled."""

    mode: str
    extents: dict[str, Extent]


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificate:
    """What a run claims. Digests are SHA-256 in hex where their field does not say otherwise; docs/
    certificate.md explains every field. ``digest`` is of all the others."""

    format: int
    files: dict[str, str]
    config: str
    seeds: dict[str, int]
    data: dict[str, str]
    isolation: str
    code: Code
    steps: Steps
    weights: Weights
    records: str
    parity: ParityTable
    correction: CorrectionTable
    outcomes: dict[str, int]
    groups: int
    drops: dict[str, int]
    held_out: dict[str, tuple[tuple[int, float], ...]]
    staleness: dict[str, Extent]
    seconds: dict[str, float]
    problems: tuple[str, ...]
    verdict: str
    holds: bool
    digest: str = ""


# ---- made and checked --------------------------------------------------------------------------------


def write_certificate(directory: Path) -> Path:
    """Writes the certificate of the run in ``directory``. Raises CheckpointError."""
    path = directory / CERTIFICATE_FILE
    encoded = msgspec.json.encode(make_certificate(directory))
    write_file(path, msgspec.json.format(encoded, indent=1).decode() + "\n")
    return path


def make_certificate(directory: Path) -> Certificate:
    """Condenses what the run in ``directory`` wrote. Raises CheckpointError that names the file."""
    run = read_run(directory)
    parity, weights = _parity(run), _weights(run.steps)
    steps = _steps(run)
    problems = (*run.torn, *weights.breaks, *_record_problems(run), *_environment_problems(run))
    within = _within(parity)
    made = Certificate(
        format=FORMAT,
        files=file_digests(directory),
        config=_config_digest(run.config),
        seeds={"data.seed": run.setting("data.seed"), "source": run.source.seed},
        data=_data(run),
        isolation=run.source.isolation,
        code=_code(run),
        steps=steps,
        weights=weights,
        records=_joined(each.record for each in run.steps),
        parity=parity,
        correction=CorrectionTable(run.setting("policy.correction"), _extents(run, "is/", "opsm/")),
        outcomes=_outcomes(run.steps),
        groups=int(sum(value for _, value in run.curve("rollout/num_groups"))),
        drops=_drops(run),
        held_out=_held_out(run),
        staleness=_extents(run, "rollout/staleness/", "rollout/weight_version/mixed_ratio"),
        seconds=_seconds(run),
        problems=problems,
        verdict=_verdict(parity, problems, within=within),
        holds=within and not problems,
    )
    return replace(made, digest=_digest(_canonical(made)))


def check_certificate(path: Path) -> Certificate:
    """The certificate at ``path`` (or in that directory), if it is what the run beside it gives.

    Raises CertificateInvalid naming the first field that differs; CheckpointError where a file is missing.
    """
    path = path / CERTIFICATE_FILE if path.is_dir() else path
    found = read_certificate(path)
    _compare(path, _digest(_canonical(found)), found.digest, "digest", "the certificate itself was changed")
    # Files first: one that was changed may not even be readable as what it was.
    for name, digest in file_digests(path.parent).items():
        _compare(path, digest, found.files.get(name), f"files.{name}", f"{name} was changed")
    written = dict(_leaves(_fields(found)))
    for name, value in _leaves(_fields(make_certificate(path.parent))):
        _compare(path, value, written.get(name), name, "the run gives another value")
    return found


def read_certificate(path: Path) -> Certificate:
    """A certificate as it is written, unchecked. Raises CertificateInvalid, CheckpointError."""
    try:
        content = path.read_bytes()
    except OSError as error:
        fact = f"cannot read {path}: {error.strerror or error}"
        raise CheckpointError(f"{fact}; name the directory of a run", file=str(path)) from error
    try:
        return msgspec.json.decode(content, type=Certificate)
    except msgspec.DecodeError as error:
        fact = f"{path} is no certificate of format {FORMAT}: {error}"
        raise CertificateInvalid(f"{fact}; take it from a copy of the run", field="format") from error


def file_digests(directory: Path) -> dict[str, str]:
    """SHA-256 of every file a certificate is made from, by name. Raises CheckpointError."""
    found = {}
    for name in FILES:
        try:
            found[name] = hashlib.sha256((directory / name).read_bytes()).hexdigest()
        except OSError as error:
            fact = f"{directory} lacks {name} of an RL run: {error.strerror or error}"
            raise CheckpointError(f"{fact}; name its directory", file=str(directory / name)) from error
    return found


def _compare(path: Path, now: object, written: object, field: str, why: str) -> None:
    if now != written:
        raise CertificateInvalid(
            f"{path} does not hold: {field} says {written!r}, but it is {now!r}: {why}; do not rely on this "
            "run, or take its files from a copy",
            field=field,
        )


def _fields(certificate: Certificate) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(certificate)
    return fields


def _leaves(value: object, name: str = "") -> list[tuple[str, object]]:
    """Every value by its dotted name; of lists and tables their size as well, so that none is a prefix."""
    if isinstance(value, Mapping):
        items = [(f"{name}.{key}" if name else str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"{name}[{i}]", item) for i, item in enumerate(value)]
    else:
        return [(name, value)]
    return [leaf for key, item in items for leaf in _leaves(item, key)] + [(f"{name}.size", len(items))]


def _canonical(certificate: Certificate) -> dict[str, Any]:
    fields = _fields(certificate)
    del fields["digest"]
    return fields


def _digest(value: object) -> str:
    """SHA-256 of the canonical JSON: keys sorted, no spaces, ASCII."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _joined(digests: Any) -> str:
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


# ---- what was run ------------------------------------------------------------------------------------


def _config_digest(config: Mapping[str, Any]) -> str:
    """Of the resolved settings; where the run lies is none of them."""
    kept = {section: dict(values) for section, values in config.items()}
    kept.get("run", {}).pop("out", None)
    return _digest(kept)


def _data(run: RunFiles) -> dict[str, str]:
    held_out = {f"held_out.{task}": digest for task, digest in sorted(run.source.held_out.items())}
    return {"source": run.source.digest, **held_out, "asked": _joined(each.prompts for each in run.steps)}


def _ran(run: RunFiles) -> list[Sitting]:
    """The sittings; a run directory without one has not begun. Raises CheckpointError."""
    if not run.sittings:
        raise CheckpointError(
            f"{run.directory} names no sitting in its environment; run `bittrue rl` there again",
            file=str(run.directory),
        )
    return list(run.sittings)


def _code(run: RunFiles) -> Code:
    sittings = _ran(run)
    last = sittings[-1].environment
    different = len({each.environment for each in sittings})
    return Code(last.commit, last.is_dirty, last.sources, last.kernels, different)


def _environment_problems(run: RunFiles) -> list[str]:
    """Code that changed between sittings: the run is then nobody's, for no one version gives it again."""
    found, sittings = [], _ran(run)
    for before, after in zip(sittings, sittings[1:], strict=False):
        for name in ("sources", "kernels", "backend", "torch"):
            if getattr(before.environment, name) != getattr(after.environment, name):
                found.append(f"step {after.step} went on with other {name} than the sitting before")
    return found


def _steps(run: RunFiles) -> Steps:
    done, asked = len(run.steps), int(run.setting("run.steps"))
    return Steps(
        done=done,
        asked=asked,
        is_finished=done >= asked,
        resumed=tuple(each.step for each in _ran(run)[1:]),
        engine_restarts=_restarts(run),
        begun_at=_ran(run)[0].begun_at,
    )


def _restarts(run: RunFiles) -> int:
    """Of engines, in all sittings: each counts its own."""
    total = before = 0
    begun = {each.step for each in _ran(run)}
    for each in run.steps:
        before = 0 if each.step in begun else before
        total, before = total + each.engine_restarts - before, each.engine_restarts
    return total


def _weights(steps: Sequence[StepFacts]) -> Weights:
    if not steps:
        return Weights("", "", "", (), ())
    published = [steps[0].weights_before, *(each.weights_after for each in steps)]
    breaks, known = [], set()
    for i, each in enumerate(steps):
        known.add(each.weights_before)
        if each.weights_before != published[i]:
            breaks.append(
                f"step {each.step} began with weights {each.weights_before[:12]}, but the step before ended "
                f"with {published[i][:12]}"
            )
        foreign = sorted(each.versions.keys() - known)
        breaks += [f"step {each.step} learned from tokens of unknown weights {v[:12]}" for v in foreign]
    return Weights(published[0], published[-1], steps[-1].masters_after, tuple(published), tuple(breaks))


def _record_problems(run: RunFiles) -> list[str]:
    """Records that are there and not what their step wrote. A run may have kept only the newest."""
    records, found = Records(run.directory), []
    for each in run.steps:
        if each.record and records.has(each.step):
            try:
                is_same = records.digest(each.step) == each.record
            except CheckpointError:
                is_same = False
            if not is_same:
                found.append(f"records/{records.path(each.step).name} is not what step {each.step} wrote")
    return found


# ---- what was measured -------------------------------------------------------------------------------


def _parity(run: RunFiles) -> ParityTable:
    mode = run.setting("policy.parity")
    if mode not in MODES:
        fact = f"{run.directory} asks for parity {mode!r}, which is none of {', '.join(MODES)}"
        raise CheckpointError(f"{fact}; take run.json from a copy of the run", file=str(run.directory))
    measured = [line for line in run.metrics if "parity/num_tokens" in line]
    differing = [int(line["parity/differing"]) for line in measured]
    stepped = sum("train/grad_norm" in line and "parity/num_tokens" not in line for line in run.metrics)
    worst, not_numbers = {}, 0
    for metric in METRICS:
        name = metric.name
        if not name.startswith("parity/") or name in ("parity/num_tokens", "parity/differing"):
            continue
        found = run.curve(name)
        not_numbers += sum(name in line for line in run.metrics) - len(found)
        if found:
            choose = min if name.endswith("_overlap") else max
            step, value = choose(found, key=lambda point: abs(point[1]))
            worst[name] = Worst(value, step)
    return ParityTable(
        mode=mode,
        compared="as answers come" if run.setting("loop.staleness") else "before each gradient",
        steps=len(measured),
        steps_differing=sum(count > 0 for count in differing),
        unmeasured=stepped,
        tokens=sum(int(line["parity/num_tokens"]) for line in measured),
        tokens_differing=sum(differing),
        not_numbers=not_numbers,
        worst=worst,
    )


def _within(parity: ParityTable) -> bool:
    """Whether every step that the weights took kept what the mode asks for."""
    if not parity.steps or _lacks(parity):
        return False
    if parity.mode == "exact":
        return parity.steps_differing == 0
    return all(parity.worst[name].value <= allowed for name, allowed, _ in _allowed(parity.mode))


def _lacks(parity: ParityTable) -> bool:
    """A gradient of tokens that nobody compared; those of older weights were, when they came."""
    is_due = parity.compared == "before each gradient"
    return parity.not_numbers > 0 or (is_due and parity.unmeasured > 0)


def _allowed(mode: str) -> list[tuple[str, float, str]]:
    """(metric, bound, its name in a sentence) of what a mode limits."""
    bounds = BOUNDS[mode]
    every = (
        ("parity/logprob_abs_diff/max", bounds.max_abs, "largest |d|"),
        ("parity/logprob_abs_diff/mean", bounds.mean_abs, "mean |d|"),
        ("parity/k3", bounds.k3, "k3"),
    )
    return [each for each in every if math.isfinite(each[1])]


def _verdict(parity: ParityTable, problems: Sequence[str], *, within: bool) -> str:
    """The sentence at the head of a report."""
    over = f"{parity.steps:,} steps over {parity.tokens:,} tokens"
    over += ", compared as answers came" if parity.compared == "as answers come" else ""
    flawed = f"; {len(problems)} problem{'s' * (len(problems) > 1)}" if problems else ""
    if not parity.steps:
        return f"no step compared a token, so nothing is shown{flawed}"
    if _lacks(parity):
        lacks = f"{parity.unmeasured} steps were not compared, {parity.not_numbers} values are no numbers"
        return f"not shown: {lacks}{flawed}"
    if parity.steps_differing == 0:
        return f"difference 0 at every of {over}{flawed}"
    if parity.mode == "exact":
        differing = f"{parity.tokens_differing:,} tokens differ, at {parity.steps_differing} of {over}"
        return f"NOT exact: {differing}{flawed}"
    said = ", ".join(
        f"{words} at most {parity.worst[name].value:.3g} (allowed {bound:g})"
        for name, bound, words in _allowed(parity.mode)
    )
    head = "within" if within else "OUT of"
    return f"{head} the bounds of {parity.mode} at every of {over}: {said}{flawed}"


def _extents(run: RunFiles, *prefixes: str) -> dict[str, Extent]:
    names = sorted({name for line in run.metrics for name in line if name.startswith(prefixes)})
    found = {}
    for name in names:
        values = [value for _, value in run.curve(name)]
        if values:
            found[name] = Extent(min(values), max(values), math.fsum(values) / len(values), len(values))
    return found


def _outcomes(steps: Sequence[StepFacts]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in steps:
        total.update(each.outcomes)
    return dict(sorted(total.items()))


def _drops(run: RunFiles) -> dict[str, int]:
    names = sorted({name for line in run.metrics for name in line if name.startswith(_DROPPED)})
    return {name.removeprefix(_DROPPED): int(sum(value for _, value in run.curve(name))) for name in names}


def _held_out(run: RunFiles) -> dict[str, tuple[tuple[int, float], ...]]:
    names = sorted({name for line in run.metrics for name in line if name.startswith("eval/")})
    return {name: tuple(run.curve(name)) for name in names}


def _seconds(run: RunFiles) -> dict[str, float]:
    """Wall time of all steps and of their parts; that of held-out measurements (eval) is beside it."""
    parts = {part: math.fsum(v for _, v in run.curve(f"perf/{part}_seconds")) for part in _SECONDS}
    return {"steps": math.fsum(each.seconds for each in run.steps), **parts}
