"""Two specialists made by rewards, and one student that learns from both on its own answers.

Usage: python benchmarks/rl_distill.py --work /tmp/distill --out benchmarks/results/rl-distill-mini.json

The specialists and the student start from the same checkpoint. The student learns both tasks together by
on-policy distillation: each answer's tokens are judged by the teacher of its task over the whole vocabulary;
rewards play no part. Its rate is the best of a few short trials, by the divergence they end with, on prompts
of another seed. All are measured greedily on the same test problems, which nothing was chosen by. Parts that
are at their end in --work are read, those that were stopped go on.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.bench.engines import Model
from bittrue.bench.result import Label, Measurement, Result, new_result, write_result
from bittrue.bench.rl_runs import by_step, compared, finished
from bittrue.bench.tasks import TaskBench
from bittrue.rl.config import RlConfig
from bittrue.rl.run_files import RunFiles
from bittrue.train.run_file import checked

TASKS = ("countdown", "sub-think")
# The longest reference answers have 16 and 73 tokens.
MAX_TOKENS = {"countdown": 32, "sub-think": 96}
START, STUDENT = "start", "student"
TRIAL_SEED, TRIAL_ENDS = 1_000_000, 4  # steps whose mean says how a trial ended


@dataclass(frozen=True, slots=True)
class Size:
    """Of a run: steps, prompts of a step and answers to each."""

    steps: int
    prompts: int
    group: int

    @classmethod
    def parse(cls, text: str) -> "Size":
        """``"150,24,8"``."""
        return cls(*(int(number) for number in text.split(",")))


@dataclass(frozen=True, slots=True)
class Plan:
    """``lr``: of the specialists; ``rates``: those the student may have, tried for ``trial_steps`` each."""

    start: Path
    work: Path
    specialists: Mapping[str, Size]
    lr: float
    student: Size
    rates: Sequence[float]
    trial_steps: int
    problems: int
    threads: int
    seed: int

    def config(self, tasks: Sequence[str], size: Size, lr: float, seed: int) -> dict[str, dict[str, Any]]:
        return {
            "model": {"start": str(self.start)},
            "data": {"seed": seed, "tasks": dict.fromkeys(tasks, 1.0)},
            "rollout": {
                "prompts": size.prompts,
                "group": size.group,
                "max_tokens": max(MAX_TOKENS[task] for task in tasks),
            },
            "optim": {"lr": lr},
            "run": {"steps": size.steps, "eval_every": 0, "threads": self.threads},
        }


# ---- the runs ----------------------------------------------------------------------------------------


def specialise(plan: Plan, task: str) -> RunFiles:
    """The run of one specialist, with its checkpoint beside."""
    values = plan.config([task], plan.specialists[task], plan.lr, plan.seed)
    return finished(checked(RlConfig, values), plan.work / f"run-{task}", export=plan.work / task)


def distil(plan: Plan, name: str, size: Size, lr: float, seed: int, export: Path | None = None) -> RunFiles:
    """A run of the student."""
    values = plan.config(TASKS, size, lr, seed)
    values["distill"] = {
        "teachers": {task: {"model": str(plan.work / task), "tasks": [task]} for task in TASKS}
    }
    return finished(checked(RlConfig, values), plan.work / name, export=export)


def try_rates(plan: Plan) -> dict[float, float]:
    """Divergence that a short run ends with, by its rate."""
    found = {}
    for lr in plan.rates:
        size = Size(plan.trial_steps, plan.student.prompts, plan.student.group)
        run = distil(plan, f"trial-{lr:g}", size, lr, plan.seed + TRIAL_SEED)
        last = [value for _, value in run.curve("train/teacher_kl")][-TRIAL_ENDS:]
        found[lr] = sum(last) / len(last)
    return found


# ---- what they can do --------------------------------------------------------------------------------


def shares(plan: Plan, name: str, directory: Path) -> Iterator[Measurement]:
    """Of the test problems of both tasks that a checkpoint solves greedily."""
    bench = TaskBench(
        model=Model.of(directory),
        tell=lambda text: _tell(name, text),
        tasks=TASKS,
        count=plan.problems,
        threads=plan.threads,
    )
    for m in bench.run():
        if m.name == "right answers":
            labels = {**m.labels, "of": name}
            yield Measurement(m.name, m.unit, m.median, m.low, m.high, m.repeats, labels)


def _tell(name: str, text: str) -> None:
    sys.stderr.write(f"{name}: {text}\n")


def ratios(found: Sequence[Measurement]) -> Iterator[Measurement]:
    """The student's share over that of each specialist on its task; the range from the least of one interval
    over the most of the other to the reverse."""

    def greedy(of: str, task: str) -> Measurement:
        return next(m for m in found if m.has(of=of, task=task, temperature=0.0))

    for task in TASKS:
        own, teacher = greedy(STUDENT, task), greedy(task, task)
        if teacher.low > 0:
            values = (own.median / teacher.median, own.low / teacher.high, own.high / teacher.low)
            yield Measurement("student over specialist", "ratio", *values, own.repeats, {"task": task})


def measurements(plan: Plan) -> Iterator[Measurement]:
    for task in TASKS:
        yield from _run(specialise(plan, task), task, "reward/mean")
    tried = try_rates(plan)
    lr = min(tried, key=lambda rate: tried[rate])
    for rate, apart in tried.items():
        labels: dict[str, Label] = {"lr": rate, "chosen": rate == lr}
        yield Measurement("divergence of a trial", "nats", apart, apart, apart, 1, labels)
    student = distil(plan, "run-student", plan.student, lr, plan.seed, plan.work / STUDENT)
    yield from _run(student, STUDENT, "reward/mean", "train/teacher_kl")
    found = list(shares(plan, START, plan.start))
    for name in (*TASKS, STUDENT):
        found += shares(plan, name, plan.work / name)
    yield from found
    yield from ratios(found)


def _run(run: RunFiles, of: str, *curves: str) -> Iterator[Measurement]:
    labels: dict[str, Label] = {"of": of}
    yield from compared(run, labels)
    yield from by_step(run, curves, labels)


def measure(plan: Plan) -> Result:
    plan.work.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Label] = {
        "model": plan.start.name,
        **{f"{task} steps": size.steps for task, size in plan.specialists.items()},
        "specialists' lr": plan.lr,
        "student steps": plan.student.steps,
        "student answers": plan.student.prompts * plan.student.group,
        "problems": plan.problems,
        "split": "test",
        "seed": plan.seed,
        "threads": plan.threads,
    }
    found = tuple(measurements(plan))
    return new_result("rl-distill", shlex.join(["python", *sys.argv]), chosen, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    size = "steps, prompts of a step, answers to each"
    parser.add_argument("--start", type=Path, default=Path("models/mini"))
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and checkpoints")
    parser.add_argument("--countdown", type=Size.parse, default="150,24,8", help=size)
    parser.add_argument("--sub-think", type=Size.parse, default="80,16,8", help=size)
    parser.add_argument("--lr", type=float, default=5e-4, help="of the specialists")
    parser.add_argument("--student", type=Size.parse, default="100,24,2", help=size)
    parser.add_argument("--rates", default="3e-4,1e-3,2e-3", help="rates that the student tries, by comma")
    parser.add_argument("--trial-steps", type=int, default=12, help="of one trial of a rate")
    parser.add_argument("--problems", type=int, default=1000, help="of each task, at the end")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    plan = Plan(
        start=given.start,
        work=given.work,
        specialists={"countdown": given.countdown, "sub-think": given.sub_think},
        lr=given.lr,
        student=given.student,
        rates=[float(rate) for rate in given.rates.split(",")],
        trial_steps=given.trial_steps,
        problems=given.problems,
        threads=given.threads,
        seed=given.seed,
    )
    result = measure(plan)
    if given.out is not None:
        write_result(given.out, result)


if __name__ == "__main__":
    main()
