"""Writes directories of RL runs as a run leaves them, from plain numbers."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from bittrue.rl.config import RlConfig
from bittrue.rl.environment import Environment, Sitting, Sittings
from bittrue.rl.run_files import SourceFacts, write_source
from bittrue.train.run_file import checked

ENVIRONMENT = Environment(
    bittrue="0.5.0",
    commit="ab" * 20,
    is_dirty=False,
    sources="cd" * 32,
    backend="cpu:avx512",
    kernels="ef" * 16,
    threads=2,
    python="3.11.7",
    torch="2.13.0",
    numpy="2.4.0",
    platform="Linux 6.1 x86_64",
    processor="a <fast> one",
    cpus=2,
    cpu_flags=("avx2", "avx512f"),
)


def hex_of(*facts: object) -> str:
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def metrics_of(step: int) -> dict[str, Any]:
    """Step 2 has nothing to learn from, and step 3 staler tokens."""
    line: dict[str, Any] = {
        "step": step,
        "reward/mean": 0.25 + 0.0625 * step,
        "reward/std": 0.4,
        "rollout/num_groups": 3.0,
        "rollout/dropped/zero_spread": 3.0 if step == 2 else 1.0,
        "rollout/response_length/mean": 9.0 + step,
        "rollout/response_length/max": 16.0,
        "rollout/truncated_ratio": 0.125,
        "rollout/staleness/mean": 0.5 if step == 3 else 0.0,
        "rollout/staleness/max": 1.0 if step == 3 else 0.0,
        "verifier/right": 4.0 + step,
        "verifier/wrong": 8.0 - step,
        "train/lr": 1e-3,
        "perf/rollout_seconds": 2.0,
        "perf/train_seconds": 1.0,
        "perf/sync_seconds": 0.25,
        "perf/eval_seconds": 0.5,
        "perf/sync_bytes": 1e6,
    }
    if step % 2 == 0:
        line["eval/countdown/greedy"] = 0.25 + 0.0625 * step
    if step != 2:
        line |= {
            "train/grad_norm": 0.7,
            "train/entropy": 1.5,
            "train/ppo_kl": 0.0,
            "is/ess_ratio": 1.0,
            "parity/num_tokens": 100.0,
            "parity/differing": 0.0,
            "parity/logprob_abs_diff/mean": 0.0,
            "parity/logprob_abs_diff/max": 0.0,
            "parity/k1": 0.0,
            "parity/k3": 0.0,
            "parity/router_overlap": 1.0,
        }
    return line


def facts_of(step: int, *, name: str = "run") -> dict[str, Any]:
    after = hex_of(name, step) if step != 2 else hex_of(name, 1)
    before = hex_of(name, step - 1) if step != 3 else hex_of(name, 1)
    return {
        "step": step,
        "weights_before": before,
        "weights_after": after,
        "masters_after": hex_of("masters", name, step),
        "prompts": hex_of("prompts", step),
        "record": "",
        "outcomes": {"right": 4 + step, "wrong": 8 - step},
        "versions": {before: step} if step != 2 else {},
        "engine_restarts": int(step in (1, 3, 4)),  # from step 2 on those of another sitting
        "seconds": 3.5,
        "begun_at": f"2026-01-01T00:00:{step:02d}+00:00",
    }


def settings_of(**sections: dict[str, Any]) -> RlConfig:
    given: dict[str, dict[str, Any]] = {
        "model": {"start": "models/mini"},
        "data": {"tasks": {"countdown": 1.0}, "seed": 3},
        "run": {"steps": 5, "out": "runs/a"},
    }
    names = given.keys() | sections.keys()
    return checked(RlConfig, {name: {**given.get(name, {}), **sections.get(name, {})} for name in names})


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_run(directory: Path, *, steps: int = 5, **sections: dict[str, Any]) -> Path:
    """A run of ``steps`` steps in which every bit agreed, resumed once; its weights are its name's."""
    directory.mkdir(parents=True, exist_ok=True)
    name = directory.name
    config = settings_of(**sections)
    (directory / "run.json").write_text(config.model_dump_json(indent=1) + "\n")
    last = [{"step": steps, "eval/countdown/greedy": 0.625}] if steps == config.run.steps else []
    write_lines(directory / "metrics.jsonl", [*(metrics_of(step) for step in range(steps)), *last])
    write_lines(directory / "steps.jsonl", [facts_of(step, name=name) for step in range(steps)])
    write_source(
        directory,
        SourceFacts(
            digest=hex_of("data"),
            seed=3,
            isolation="none: own tasks judged in process",
            held_out={"countdown": hex_of("held out")},
        ),
    )
    write_sittings(directory)
    return directory


def write_sittings(directory: Path, **changes: Any) -> None:
    """Two sittings; ``changes`` are of the second one's environment."""
    first = Sitting(0, "2026-01-01T00:00:00+00:00", ENVIRONMENT)
    second = Sitting(2, "2026-01-01T00:01:00+00:00", replace(ENVIRONMENT, **changes))
    encoded = msgspec.json.encode(Sittings((first, second)))
    (directory / "environment.json").write_bytes(encoded)


def edit_line(path: Path, step: int, **changes: Any) -> None:
    """Changes fields of one line; dots in names are written as two underscores."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[step] |= changes
    write_lines(path, lines)
