"""Runs of reinforcement learning that a benchmark is made of: taken to their end once, read ever after."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from bittrue.bench.result import Label, Measurement, Unit
from bittrue.bench.tasks import wilson
from bittrue.errors import UsageError
from bittrue.obs.log import Log
from bittrue.rl.certificate import CERTIFICATE_FILE
from bittrue.rl.config import RlConfig
from bittrue.rl.run_files import CONFIG_FILE, RunFiles, read_run, read_settings
from bittrue.rl.sitting import Tell, train_policy
from bittrue.train.checkpoint import run_directory

_HELD_OUT, _GREEDY = "eval/", "/greedy"
_UNITS: dict[str, Unit] = {
    "reward/mean": "ratio",
    "train/ppo_kl": "nats",
    "train/teacher_kl": "nats",
    "is/ess_ratio": "ratio",
    "rollout/staleness/mean": "count",
    "rollout/staleness/max": "count",
}


def finished(config: RlConfig, out: Path, *, export: Path | None = None) -> RunFiles:
    """What the run of ``config`` in ``out`` left there: begun, gone on with, or only read where it was at its
    end. Raises UsageError where ``out`` has a run of other settings."""
    if (out / CONFIG_FILE).exists() and read_settings(out) != config.model_dump(mode="json"):
        raise UsageError(f"{out} has a run of other settings; choose another --work, or remove that one")
    exported = export is None or (export / "config.json").is_file()
    found = read_run(out) if (out / CERTIFICATE_FILE).exists() else None
    if found is None or not exported or not _is_finished(found, config):
        with run_directory(out):
            train_policy(config, out, Log(sys.stderr, "warning"), export=export, tell=_teller(config, out))
        found = read_run(out)
    if not _is_finished(found, config):
        fact = f"the run in {out} ended at step {len(found.steps)} of {config.run.steps}"
        raise UsageError(f"{fact}; start the same command again")
    return found


def _is_finished(run: RunFiles, config: RlConfig) -> bool:
    held_out_at_end = int(config.run.eval_every > 0)
    return len(run.steps) == config.run.steps and len(run.metrics) == config.run.steps + held_out_at_end


def _teller(config: RlConfig, out: Path) -> Tell:
    def tell(step: int, values: Mapping[str, float]) -> None:
        reward = f", reward {values['reward/mean']:.3f}" if "reward/mean" in values else ""
        sys.stderr.write(f"{out.name}: step {step} of {config.run.steps}{reward}\n")

    return tell


# ---- measurements ------------------------------------------------------------------------------------


def by_step(run: RunFiles, names: tuple[str, ...], labels: Mapping[str, Label]) -> Iterator[Measurement]:
    """Metrics of every step that has them."""
    for name in names:
        for step, value in run.curve(name):
            yield Measurement(name, _UNITS[name], value, value, value, 1, {**labels, "step": step})


def seconds_by_step(run: RunFiles, labels: Mapping[str, Label]) -> Iterator[Measurement]:
    """Of whole steps, without what was held out."""
    for facts in run.steps:
        s = facts.seconds
        yield Measurement("step", "s", s, s, s, 1, {**labels, "step": facts.step})


def held_out_shares(run: RunFiles, labels: Mapping[str, Label]) -> Iterator[Measurement]:
    """Greedy shares of held-out problems with their Wilson intervals, by updates done."""
    problems = int(run.setting("run.eval_problems"))
    for line in run.metrics:
        for name, value in line.items():
            if name.startswith(_HELD_OUT) and name.endswith(_GREEDY):
                low, high = wilson(round(value * problems), problems)
                own = {**labels, "updates": int(line["step"])}
                yield Measurement(name, "ratio", value, low, high, problems, own)


def compared(run: RunFiles, labels: Mapping[str, Label]) -> Iterator[Measurement]:
    """How many tokens were sampled, how many of them compared bit by bit, and how many differed."""
    lines = [line for line in run.metrics if "reward/mean" in line]
    those = [line for line in lines if line.get("parity/num_tokens", 0.0) > 0]
    answers = int(run.setting("rollout.prompts")) * int(run.setting("rollout.group"))
    counts = {
        "steps": len(lines),
        "steps compared": len(those),
        "tokens sampled": sum(round(line["rollout/response_length/mean"] * answers) for line in lines),
        "tokens compared": sum(line["parity/num_tokens"] for line in those),
        "tokens that differ": sum(line["parity/differing"] for line in those),
    }
    for name, value in counts.items():
        yield Measurement(name, "count", value, value, value, 1, dict(labels))
    if those:
        largest = max(line["parity/logprob_abs_diff/max"] for line in those)
        yield Measurement("difference, largest", "nats", largest, largest, largest, len(those), dict(labels))
