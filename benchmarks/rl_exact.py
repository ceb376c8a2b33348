"""Exactness under fire: a run whose engine is preempted and killed, and recorded steps run again.

Usage: python benchmarks/rl_exact.py --work /tmp/exact --out benchmarks/results/rl-exact-mini.json

Run 1: 100 synchronous steps on models/mini, the engine in a process of its own with continuous batching,
shared prefixes and drafts, a sequence put off by force in every third of its steps, killed once (SIGKILL)
while it samples. Run 2: one step off policy with truncated importance sampling. Run 3: PPO with a value head
and a penalty for the distance to the first policy. Then random steps of all three are computed again from
their records and compared byte by byte (law L10).
"""

import argparse
import os
import random
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bittrue.bench.result import Label, Measurement, Result, new_result, write_result
from bittrue.engine.engine import Engine
from bittrue.engine.link import ProcessLink
from bittrue.engine.types import TokenEvent
from bittrue.obs.log import Log
from bittrue.rl import assembly
from bittrue.rl.assembly import Policy, open_policy
from bittrue.rl.config import RlConfig
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.rl.replay_step import StepReplay
from bittrue.rl.run_files import CONFIG_FILE
from bittrue.train.metrics import METRICS_FILE, MetricsFile, read_metrics
from bittrue.train.run_file import checked

STEPS = {"exact": 100, "one-off": 30, "ppo": 30}
KILLED_AT = 50
PREEMPTED_EVERY = 3


class Preempting(Engine):
    """An engine that takes the memory away from one of its sequences in every third step."""

    _steps = 0

    def step(self) -> list[TokenEvent]:
        self._steps += 1
        if self._steps % PREEMPTED_EVERY == 0 and self._outputs:
            names = sorted(self._outputs)
            self.preempt(names[self._steps * 7919 % len(names)])
        return super().step()


def settings(name: str) -> RlConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"start": "models/mini"},
        "data": {"seed": 7, "tasks": {"countdown": 2.0, "brackets": 1.0}},
        "rollout": {"prompts": 24, "group": 8, "max_tokens": 32, "speculation": "mtp"},
        "optim": {"lr": 3e-4},
        "run": {"steps": STEPS[name], "eval_every": 0, "keep": 1000, "threads": 2},
    }
    changed: dict[str, dict[str, dict[str, Any]]] = {
        "exact": {"loop": {"engine": "process"}},
        "one-off": {
            "loop": {"kind": "pipelined", "staleness": 1},
            "policy": {"correction": "tis"},
        },
        "ppo": {"policy": {"advantage": "gae", "reference_kl": 0.05, "kl_in": "reward"}},
    }
    own = changed[name]
    names = base.keys() | own.keys()
    return checked(RlConfig, {key: {**base.get(key, {}), **own.get(key, {})} for key in names})


def run_one(name: str, out: Path) -> tuple[list[Mapping[str, float]], int]:
    """The metrics of a run, and how often its engine was started again."""
    config = settings(name)
    out.mkdir(parents=True)
    (out / CONFIG_FILE).write_text(config.model_dump_json(indent=1) + "\n")
    log = Log(sys.stderr, "warning")
    assembly._link = lambda kind, run: ProcessLink.start(run, factory="rl_exact:Preempting")
    with open_policy(config, out, log) as policy, MetricsFile(out / METRICS_FILE) as metrics:
        policy.run.begin(metrics)
        killer = threading.Thread(target=_kill_once, args=(policy,), daemon=True)
        if name == "exact":
            killer.start()

        def tell(values: Mapping[str, float]) -> None:
            sys.stderr.write(f"\r{name}: step {policy.run.step} of {config.run.steps} ")

        policy.run.go(metrics, tell=tell)
        restarts = getattr(policy.engine, "restarts", 0)
    sys.stderr.write("\n")
    return list(read_metrics(out / METRICS_FILE)), restarts


def _kill_once(policy: Policy) -> None:
    """Kills the engine while it samples the answers of a step."""
    engine = policy.engine
    assert isinstance(engine, RemoteEngine)
    while policy.run.step < KILLED_AT:
        time.sleep(0.01)
    while not engine.unfinished():
        time.sleep(0.001)
    pid = engine.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def parity(name: str, lines: list[Mapping[str, float]], restarts: int) -> Iterator[Measurement]:
    labels: dict[str, Label] = {"run": name}
    compared = [line for line in lines if "parity/num_tokens" in line]
    counts = {
        "steps": len(lines),
        "steps compared": len(compared),
        "tokens compared": sum(line["parity/num_tokens"] for line in compared),
        "tokens that differ": sum(line["parity/differing"] for line in compared),
        "choices that differ": sum(line.get("parity/router_flips", 0.0) for line in compared),
        "preemptions": sum(line.get("rollout/preemptions", 0.0) for line in lines),
        "engine restarts": restarts,
    }
    for quantity, value in counts.items():
        yield Measurement(quantity, "count", value, value, value, 1, labels)
    largest = max(line["parity/logprob_abs_diff/max"] for line in compared)
    yield Measurement("difference, largest", "nats", largest, largest, largest, len(compared), labels)
    for quantity, metric in (
        ("prefix tokens from the cache", "rollout/prefix_hit_rate"),
        ("tokens of a speculative step", "rollout/spec_accept_length"),
    ):
        found = sorted(line[metric] for line in lines if metric in line)
        if found:
            middle = found[len(found) // 2]
            yield Measurement(quantity, "ratio", middle, found[0], found[-1], len(found), labels)


def replayed(work: Path, count: int, seed: int) -> Iterator[Measurement]:
    rng = random.Random(seed)
    chosen = [(name, rng.randrange(STEPS[name])) for name in rng.choices(list(STEPS), k=count)]
    for name, step in chosen:
        found = StepReplay(work / name, Log(sys.stderr, "warning")).run(step)
        sys.stderr.write(f"replayed {name} step {step}: {'same' if found.is_same else 'DIFFERENT'}\n")
        same = float(found.is_same)
        yield Measurement(
            "step replayed, same bytes", "count", same, same, same, 1, {"run": name, "step": step}
        )


def measure(work: Path, count: int, seed: int) -> Result:
    found: list[Measurement] = []
    for name in STEPS:
        found += parity(name, *run_one(name, work / name))
    found += replayed(work, count, seed)
    config: dict[str, Label] = {"model": "models/mini", "replayed": count, "seed": seed}
    return new_result("rl-exact", shlex.join(["python", *sys.argv]), config, found)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="new folder for the runs")
    parser.add_argument("--replayed", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    result = measure(given.work, given.replayed, given.seed)
    if given.out is not None:
        write_result(given.out, result)


if __name__ == "__main__":
    main()
