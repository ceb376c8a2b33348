"""Trainer, engine and verifiers as Ray actors: one of them is killed, the run ends in the same weights."""

import functools
import io
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_rl_loop import config, facts_of, weights_after

from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig
from bittrue.rl.ray_run import Sitting, train_on_ray

PROMPTS = [
    {"prompt": f"{a}+{b}=", "verifier": {"kind": "exact", "expected": str(a + b)}}
    for a in range(12, 60, 7)
    for b in range(11, 99, 9)
]


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    import ray as module

    module.init(num_cpus=4, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
    yield module
    module.shutdown()


def settings(folder: Path, engine: str) -> RlConfig:
    file = folder / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in PROMPTS))
    return config(
        data={"tasks": {}, "prompts": str(file), "seed": 5},
        loop={"engine": engine},
        run={"steps": 6, "checkpoint_every": 1},
        verifiers={"workers": 1},
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the prompts and what a run in one process says of its steps."""
    folder = tmp_path_factory.mktemp("ray")
    weights_after(settings(folder, "inside"), folder / "here")
    return folder, facts_of(folder / "here")


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["trainer", "engine", "verifiers"])
def test_a_run_of_three_actors_ends_in_the_same_weights_when_one_is_killed(
    ray: Any, expected: tuple[Path, list[dict[str, Any]]], killed: str
) -> None:
    folder, facts = expected
    out = folder / killed
    out.mkdir()
    log = io.StringIO()
    actors: list[Any] = []
    steps: list[int] = []
    kill = threading.Thread(target=functools.partial(_kill, killed, steps))
    kill.start()
    ended = train_on_ray(
        Sitting(settings(folder, "ray").model_dump_json(), out),
        Log(log),
        tell=lambda step, values: steps.append(step),
        on_actor=actors.append,
    )
    kill.join()
    assert ended.is_finished and ended.step == 6
    assert len(actors) == (2 if killed == "trainer" else 1)
    same = ("weights_after", "masters_after", "record", "outcomes")
    found = facts_of(out)
    assert [[line[name] for name in same] for line in found] == [
        [line[name] for name in same] for line in facts
    ]
    assert max(line["engine_restarts"] for line in found) == int(killed == "engine")
    assert (out / "certificate.json").is_file() and (out / "report.html").is_file()


def _kill(what: str, steps: list[int]) -> None:
    """Sends SIGKILL to the process of one actor, as soon as two steps are done."""
    while not steps or max(steps) < 2:
        time.sleep(0.02)
    name = {"trainer": "_TrainerHost", "engine": "_EngineHost", "verifiers": "_PoolHost"}[what]
    # Ray names the process of an actor after its class.
    (pid,) = [
        int(file.parent.name)
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if file.read_bytes().startswith(f"ray::{name}".encode())
    ]
    os.kill(pid, signal.SIGKILL)
