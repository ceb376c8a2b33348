"""Learning from answers of older weights: one run, synchronous and up to four versions behind.

Usage: python benchmarks/rl_staleness.py --run configs/rl-gain.toml --start /tmp/gain/start \\
    --work /tmp/staleness --out benchmarks/results/rl-staleness.json

Every arm has the same seed, prompts, steps, rate, correction (truncated importance sampling) and an engine in
a process of its own; they differ in how many versions may lie between sampling and training. What came while
its weights were still there is compared with the trainer bit by bit. A run that is at its end in --work is
read, one that was stopped goes on.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bittrue.bench.result import Label, Measurement, Result, new_result, write_result
from bittrue.bench.rl_runs import by_step, compared, finished, held_out_shares, seconds_by_step
from bittrue.errors import ConfigError
from bittrue.rl.config import RlConfig
from bittrue.train.run_file import load_run_file

BY_STEP = ("reward/mean", "train/ppo_kl", "is/ess_ratio", "rollout/staleness/mean", "rollout/staleness/max")


@dataclass(frozen=True, slots=True)
class Plan:
    """``sizes`` replace settings of the run file, by dotted name."""

    run: Path
    work: Path
    staleness: Sequence[int]
    sizes: Mapping[str, object]

    def config(self, kind: str, staleness: int, correction: str = "tis") -> RlConfig:
        """The run file as one arm has it. Raises ConfigError."""
        loop = {"loop.kind": kind, "loop.staleness": staleness, "loop.engine": "process"}
        return load_run_file(RlConfig, self.run, {**self.sizes, **loop, "policy.correction": correction})


def measurements(plan: Plan) -> Iterator[Measurement]:
    yield from refusals(plan)
    for staleness in plan.staleness:
        kind = "async" if staleness else "sync"
        arm = f"{kind} {staleness}" if staleness else kind
        run = finished(plan.config(kind, staleness), plan.work / arm.replace(" ", "-"))
        labels: dict[str, Label] = {"arm": arm, "staleness": staleness}
        yield from held_out_shares(run, labels)
        yield from compared(run, labels)
        yield from by_step(run, BY_STEP, labels)
        yield from seconds_by_step(run, labels)


def refusals(plan: Plan) -> Iterator[Measurement]:
    """Whether a loop that learns from older weights is refused where nothing corrects for that."""
    for kind in ("pipelined", "async"):
        refused = ""
        try:
            plan.config(kind, 1, correction="none")
        except ConfigError as error:
            refused = str(error)
        labels: dict[str, Label] = {"kind": kind, "error": refused}
        is_refused = float(bool(refused))
        yield Measurement(
            "refused without a correction", "count", is_refused, is_refused, is_refused, 1, labels
        )


def measure(plan: Plan) -> Result:
    plan.work.mkdir(parents=True, exist_ok=True)
    config = plan.config("sync", 0)
    chosen: dict[str, Label] = {
        "task": ", ".join(config.data.tasks),
        "run": str(plan.run),
        "correction": config.policy.correction,
        "steps": config.run.steps,
        "lr": config.optim.lr,
        "answers": config.rollout.prompts * config.rollout.group,
        "held out": config.run.eval_problems,
        "seed": config.data.seed,
    }
    if config.run.threads:
        chosen["threads"] = config.run.threads
    found = tuple(measurements(plan))
    return new_result("rl-staleness", shlex.join(["python", *sys.argv]), chosen, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("configs/rl-gain.toml"))
    parser.add_argument("--start", type=Path, required=True, help="checkpoint that every arm starts from")
    parser.add_argument("--work", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--staleness", default="0,1,2,3,4", help="versions behind, by comma; 0 = sync")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20, help="steps between held-out measurements")
    parser.add_argument("--problems", type=int, default=1000, help="held-out problems")
    parser.add_argument("--prompts", type=int, help="of a step, in place of the run file's")
    parser.add_argument("--group", type=int, help="answers to each, in place of the run file's")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    sizes: dict[str, object] = {
        "model.start": str(given.start),
        "run.steps": given.steps,
        "run.eval_every": given.every,
        "run.eval_problems": given.problems,
        "run.eval_samples": 0,
        "run.checkpoint_every": 20,
    }
    own = {"rollout.prompts": given.prompts, "rollout.group": given.group}
    sizes |= {name: value for name, value in own.items() if value is not None}
    staleness = [int(number) for number in given.staleness.split(",")]
    result = measure(Plan(given.run, given.work, staleness, sizes))
    if given.out is not None:
        write_result(given.out, result)


if __name__ == "__main__":
    main()
