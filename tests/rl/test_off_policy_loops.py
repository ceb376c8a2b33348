"""Loops that learn from answers of older weights: how old, in which order, and still compared to the bit."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from test_rl_loop import STEPS, config, facts_of, lines_of, of_the_step, weights_after
from torch import Tensor

from bittrue.obs.log import Log
from bittrue.rl.assembly import open_policy
from bittrue.rl.records import Records
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.train.metrics import MetricsFile

TIS = {"correction": "tis"}


def off_policy(kind: str, staleness: int, **loop: Any) -> Any:
    return config(policy=TIS, loop={"kind": kind, "staleness": staleness, **loop})


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(bool((a[name] == tensor).all()) for name, tensor in b.items())


def compared(line: dict[str, float]) -> float:
    """Tokens whose bits were compared in a step; none of them differed."""
    assert line.get("parity/differing", 0.0) == 0.0
    return line.get("parity/num_tokens", 0.0)


@pytest.fixture(scope="module")
def one_off(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("off") / "one"
    return out, weights_after(off_policy("pipelined", 1), out)


def test_one_step_off_learns_from_the_weights_before(one_off: tuple[Path, dict[str, Tensor]]) -> None:
    lines = lines_of(one_off[0])
    assert [line["rollout/staleness/max"] for line in lines] == [0.0, *[1.0] * (STEPS - 1)]
    assert all(line["rollout/staleness/mean"] == line["rollout/staleness/max"] for line in lines)
    # Every answer was compared while its weights were still there; the first step brings two batches.
    records = Records(one_off[0])
    tokens = [sum(len(r.answer_ids) for r in records.read(step).rollouts) for step in range(STEPS)]
    assert [compared(line) for line in lines] == [tokens[0] + tokens[1], *tokens[2:], 0.0]
    assert any(line["is/ratio/max"] != 1.0 for line in lines[1:] if "is/ratio/max" in line)


@pytest.mark.slow
def test_one_step_off_is_the_same_run_in_two_processes_and_after_a_stop(
    one_off: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    settings = off_policy("pipelined", 1, engine="process")
    weights_after(settings, out, stop_after=3)
    (out / "step-000003" / "state.json").unlink()  # the one before is taken
    assert same(weights_after(settings, out), one_off[1])
    assert [of_the_step(line)["reward/mean"] for line in lines_of(out)] == [
        line["reward/mean"] for line in lines_of(one_off[0])
    ]
    assert facts_of(out) == facts_of(one_off[0])
    assert list(map(compared, lines_of(out))) == list(map(compared, lines_of(one_off[0])))


@pytest.mark.slow
@pytest.mark.parametrize("running", ["retract", "in_place"])
@pytest.mark.parametrize("engine", ["inside", "process"])
def test_an_asynchronous_run_is_never_staler_than_it_may_be(
    tmp_path: Path, engine: str, running: str
) -> None:
    settings = config(
        policy=TIS,
        loop={"kind": "async", "staleness": 2, "engine": engine, "running": running},
        rollout={"max_running": 3},  # answers are under way when weights change
        run={"steps": 8},
    )
    weights_after(settings, tmp_path / "run")
    lines = lines_of(tmp_path / "run")
    assert len(lines) == 8 and all(line["rollout/staleness/max"] <= 2.0 for line in lines)
    # An engine inside gets on only while a batch is waited for: of the next ones little is there then.
    assert max(line["rollout/staleness/max"] for line in lines) == (1.0 if engine == "inside" else 2.0)
    assert sum(compared(line) for line in lines) > 0
    if engine == "inside":  # the interleaving is that of the steps: some answer saw weights change
        assert any(line["rollout/weight_version/mixed_ratio"] > 0 for line in lines)


@pytest.mark.slow
def test_an_engine_killed_again_and_again_changes_no_byte_of_a_synchronous_run(tmp_path: Path) -> None:
    settings = config(rollout={"speculation": "mtp"}, loop={"engine": "process"})
    log = Log(sys.stderr, "error")
    expected = weights_after(config(), tmp_path / "whole")
    out = tmp_path / "run"
    out.mkdir()
    with open_policy(settings, out, log) as policy, MetricsFile(out / "metrics.jsonl") as metrics:
        engine = policy.engine
        assert isinstance(engine, RemoteEngine)
        step, polled = engine.step, 0

        def step_and_kill() -> Any:
            nonlocal polled
            polled += 1
            if polled % 8 == 0 and engine.pid is not None:
                os.kill(engine.pid, signal.SIGKILL)
            return step()

        engine.step = step_and_kill  # type: ignore[method-assign]
        policy.run.begin(metrics)
        policy.run.go(metrics)
        assert engine.restarts >= 2
        weights = {name: leaf.detach().clone() for name, leaf in policy.trainer.masters.named.items()}
    assert same(weights, expected)
    assert all(line["parity/differing"] == 0 for line in lines_of(out) if "parity/differing" in line)
    assert facts_of(out)[-1]["engine_restarts"] >= 2
    assert all(line.get("rollout/preemptions", 0.0) >= 0.0 for line in lines_of(out))
