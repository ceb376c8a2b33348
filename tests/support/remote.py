"""Rollouts of engines here and elsewhere, and how an engine elsewhere is killed under way."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from standins.tight_engine import TightEngine
from support.models import random_ids
from support.small import small_checkpoint

from bittrue.config.run import RunConfig
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.model.publication import Publisher
from bittrue.model.weight_update import WeightUpdate
from bittrue.model.weights import load_checkpoint
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.rl.rollout import Inbox, Prompt, RolloutEngine, Sampler
from bittrue.rl.types import Group

VOCAB = 512
TIGHT = "standins.tight_engine:TightEngine"
# Two of them share a page, four fill all: with 16 answers sequences wait and preempt each other.
PROMPTS = [Prompt(f"p{i}", tuple(random_ids(n, VOCAB, seed=i))) for i, n in enumerate((100, 110, 120, 7))]
PARAMS = SamplingParams(max_tokens=60, temperature=1.0, ignore_eos=True)
GROUP = 4
ALONE = [Prompt("alone", tuple(random_ids(120, VOCAB, seed=9)))]  # its answers have room, beside each other
NUM_TOKENS = len(PROMPTS) * GROUP * PARAMS.max_tokens


def two_models(root: Path) -> list[Path]:
    return [small_checkpoint(root / str(i), precision="fp4", seed=i, draft="mtp") for i in range(2)]


def run_config(model: Path, **knobs: object) -> RunConfig:
    settings: dict[str, object] = {
        "model": str(model),
        "threads": 1,
        "log_level": "error",
        "max_context": 512,
        "max_step_tokens": 64,
        "speculation": "mtp",
        **knobs,
    }
    return RunConfig.model_validate(settings)


def engine_here(model: Path) -> TightEngine:
    return TightEngine(str(model), run_config(model))


def update_to(model: Path) -> WeightUpdate:
    return Publisher().update(dict(load_checkpoint(model).all_tensors()))


def rollouts(engine: RolloutEngine, prompts: Sequence[Prompt] = PROMPTS, *, seed: int = 5) -> list[Group]:
    versions = {engine.stats().weight_version: 7}
    sampler = Sampler(Inbox(engine), PARAMS, group_size=GROUP, policy_versions=versions)
    return sampler.groups(prompts, seed=seed)


def assert_same(found: Sequence[Group], expected: Sequence[Group], *, whole_records: bool = False) -> None:
    """Bit for bit. Where prompts were cached, or sequences preempted or resumed, a record may begin later."""
    assert [group.prompt_key for group in found] == [group.prompt_key for group in expected]
    for group, other in zip(found, expected, strict=True):
        for one, two in zip(group.rollouts, other.rollouts, strict=True):
            assert one.finish_reason == two.finish_reason and one.spans == two.spans
            assert np.array_equal(one.answer_ids, two.answer_ids)
            assert one.logprobs.tobytes() == two.logprobs.tobytes()
            assert one.experts is not None and len(one.experts) >= len(one.answer_ids) - 1
            for mine, theirs in ((one.experts, two.experts), (one.index_rows, two.index_rows)):
                assert mine is not None and theirs is not None
                size = len(theirs) if whole_records else min(len(mine), len(theirs))
                assert np.array_equal(mine[len(mine) - size :], theirs[len(theirs) - size :])


class Dying:
    """An engine elsewhere that is killed when so many tokens have come, another process for each number."""

    def __init__(self, engine: RemoteEngine, at: Sequence[int]) -> None:
        self.engine, self._at = engine, list(at)
        self._num_tokens = 0
        self._killed: int | None = None
        self.add, self.abort, self.has_work = engine.add, engine.abort, engine.has_work
        self.poll, self.update_weights = engine.poll, engine.update_weights
        self.stats, self.close = engine.stats, engine.close

    def step(self) -> list[TokenEvent]:
        if self._at and self._num_tokens >= self._at[0] and self.engine.pid != self._killed:
            self._at.pop(0)
            self._killed = self.engine.pid
            kill(self.engine)
        events = self.engine.step()
        self._num_tokens += sum(len(event.token_ids) for event in events)
        return events


def kill(engine: RemoteEngine) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)


def long_request(name: str, *, seed: int = 3, max_tokens: int = 250) -> Request:
    params = SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True, logprobs=0)
    return Request(request_id=name, prompt=PROMPTS[0].token_ids, params=params, records_choices=True)
