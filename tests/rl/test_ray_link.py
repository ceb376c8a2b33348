"""Engines and verifiers in Ray actors give what those of this process give, and outlive their actors."""

import functools
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.remote import (
    NUM_TOKENS,
    TIGHT,
    Dying,
    assert_same,
    engine_here,
    rollouts,
    run_config,
    two_models,
    update_to,
)

from bittrue.errors import CheckpointError, ConfigError, EngineDied, VerifierUnavailable
from bittrue.obs.log import Log
from bittrue.rl.ray_link import RayLink, RayPool
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.rl.verifiers.exact import Exact
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.reward_function import reward_function
from bittrue.rl.verifiers.verifier import answer_of

SLOW = """
import time

def takes_its_time(prompts, completions, **columns):
    time.sleep(1.0)
    return [1.0]
"""


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A cluster of this machine, for these tests; its workers find the stand-ins."""
    import ray as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=256 << 20)
    yield module
    module.shutdown()


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for start in (lambda: RayLink(run_config(tmp_path)), RayPool):
        with pytest.raises(ConfigError, match=r"pip install bittrue\[ray\]"):
            start()


@pytest.mark.slow
def test_rollouts_in_a_ray_actor_are_those_of_this_process_and_outlive_it(ray: Any, tmp_path: Path) -> None:
    models = two_models(tmp_path)
    here = engine_here(models[1])
    expected = rollouts(here)
    here.close()
    link = RayLink(run_config(models[0]), factory=TIGHT)
    engine = RemoteEngine(link, log=Log(io.StringIO()))
    assert engine.update_weights(update_to(models[1]))
    assert_same(rollouts(engine), expected)
    first = engine.pid
    assert first not in (None, os.getpid())
    assert_same(rollouts(Dying(engine, [NUM_TOKENS // 4])), expected)
    assert engine.restarts == 1 and engine.pid != first
    killer = threading.Timer(0.2, lambda: ray.kill(link._actor))
    killer.start()
    while engine.restarts == 1:
        assert_same(rollouts(engine), expected)
    killer.join()
    assert engine.stats().weight_version == update_to(models[1]).version
    engine.close()
    engine.close()


@pytest.mark.slow
def test_an_engine_that_cannot_start_in_an_actor_says_why(ray: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        RemoteEngine(RayLink(run_config(tmp_path)), log=Log(io.StringIO()))
    link = RayLink(run_config(tmp_path), factory="no_such_module:Engine")
    with pytest.raises(EngineDied, match="no_such_module"):
        RemoteEngine(link, log=Log(io.StringIO()))


@pytest.mark.slow
def test_a_pool_in_an_actor_judges_alike_and_is_asked_again_when_it_dies(ray: Any, tmp_path: Path) -> None:
    file = tmp_path / "slow_rewards.py"
    file.write_text(SLOW)
    slow = reward_function(f"{file}:takes_its_time", "p")
    jobs = [(Exact(str(n % 3)), answer_of(str(n % 5))) for n in range(30)]
    make = functools.partial(Pool, num_workers=2, limits=Limits(seconds=60.0, cpu_seconds=20))
    with make() as pool:
        expected = [(verdict.outcome, verdict.score) for verdict in pool.judge_all(jobs)]
    with RayPool(make, log=Log(io.StringIO())) as pool:
        assert [(verdict.outcome, verdict.score) for verdict in pool.judge_all(jobs)] == expected
        assert set(pool.health().kinds) == {"exact"}
        first = pool.pid
        killer = threading.Timer(0.5, lambda: os.kill(first, signal.SIGKILL))
        killer.start()
        begun_s = time.monotonic()
        verdicts = pool.judge_all([*jobs, (slow, answer_of("x"))])
        killer.join()
        assert [(verdict.outcome, verdict.score) for verdict in verdicts] == [*expected, ("right", 1.0)]
        assert pool.restarts == 1 and pool.pid != first and time.monotonic() - begun_s > 1.5


@pytest.mark.slow
def test_a_pool_that_cannot_start_or_dies_of_everything_says_so(ray: Any) -> None:
    with pytest.raises(ConfigError, match="0 workers judge nothing"):
        RayPool(functools.partial(Pool, num_workers=0))
    with pytest.raises(VerifierUnavailable, match="died 2 times in a row"):
        RayPool(dies, max_restarts=1, log=Log(io.StringIO()))


def dies() -> Pool:
    os.kill(os.getpid(), signal.SIGKILL)
    return Pool()
