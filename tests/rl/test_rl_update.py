"""Rollouts, their gradient, the next weights: on policy the trainer computes the very bits sampled."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.training import VOCAB, export, tiny_trainer

from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import ParityBroken, RolloutInvalid
from bittrue.model.publication import Publisher
from bittrue.rl.advantage import grpo
from bittrue.rl.replay import document_of, routes_of, rows_of
from bittrue.rl.rollout import Inbox, Prompt, Sampler
from bittrue.rl.types import Rollout
from bittrue.rl.update import Lessons, UpdateOptions, backward
from bittrue.train.trainer import Trainer

PARAMS = SamplingParams(max_tokens=24, temperature=1.0)
GROUP = 3


def prompts(seed: int) -> list[Prompt]:
    rng = np.random.default_rng(seed)
    return [Prompt(f"p{n}", tuple(rng.integers(2, VOCAB, n).tolist())) for n in (4, 70, 133)]


@pytest.fixture(params=["f32", "fp4"])
def trainer(request: pytest.FixtureRequest) -> Trainer:
    return tiny_trainer(request.param, draft="mtp")


@pytest.fixture
def engine(trainer: Trainer, tmp_path: Path) -> Iterator[Engine]:
    """With all that must not matter: a prefix cache, drafts, small steps."""
    knobs = {"kv_memory": "32MiB", "threads": 1, "log_level": "error", "max_context": 512}
    model = export(trainer, tmp_path / "model")
    made = Engine(model, speculation="mtp", max_draft=2, max_step_tokens=64, **knobs)  # type: ignore[arg-type]
    yield made
    made.check()
    made.close()


def sampled(engine: Engine, versions: dict[str, int], *, seed: int = 0) -> list[Rollout]:
    sampler = Sampler(Inbox(engine), PARAMS, group_size=GROUP, policy_versions=versions)
    return [rollout for group in sampler.groups(prompts(seed), seed=seed) for rollout in group.rollouts]


def lessons_of(rollouts: list[Rollout]) -> Lessons:
    """Of a score that likes even tokens."""
    scores = np.array([float(np.mean(r.answer_ids % 2 == 0)) for r in rollouts])
    groups = np.repeat(np.arange(len(rollouts) // GROUP), GROUP)
    return Lessons(np.repeat(grpo(scores, groups), [len(r.answer_ids) for r in rollouts]))


def step(trainer: Trainer) -> None:
    with torch.no_grad():
        for leaf in trainer.masters.named.values():
            if leaf.grad is not None:
                leaf.sub_(0.02 * leaf.grad / leaf.grad.norm().clamp(min=1e-6) * leaf.norm())
                leaf.grad = None
    trainer.publish()


def test_every_step_of_a_run_on_policy_has_parity_to_the_bit(trainer: Trainer, engine: Engine) -> None:
    publisher, versions = Publisher(), {}
    options = UpdateOptions()
    answers = set()
    for number in range(4):
        update = publisher.update(dict(trainer.masters.tensors()), is_delta=number > 0)
        engine.update_weights(update)
        versions[update.version] = number
        rollouts = sampled(engine, versions, seed=number % 2)
        answers.add(rollouts[0].answer_ids.tobytes())
        assert {span.policy_version for r in rollouts for span in r.spans} == {number}
        report = backward(trainer, rollouts, lessons_of(rollouts), options)
        assert report.parity.first is None and report.parity.max_abs == 0.0
        assert report.parity.num_tokens == sum(len(r.answer_ids) for r in rollouts)
        assert report.routing is not None and report.routing.flips == 0.0 == report.routing.token_flips
        assert report.index is not None and report.index.flips == 0.0
        assert report.policy.ratio_min == report.policy.ratio_max == 1.0 and report.entropy > 0
        assert any(leaf.grad is not None and leaf.grad.any() for leaf in trainer.masters.named.values())
        step(trainer)
    assert len(answers) == 4  # the weights did change
    stats = engine.stats()
    assert sum(stats.cache.hit_tokens.values()) > 0 and sum(stats.drafts.drafted_at) > 0


def test_a_step_with_other_weights_is_refused(trainer: Trainer, engine: Engine) -> None:
    update = Publisher().update(dict(trainer.masters.tensors()))
    engine.update_weights(update)
    rollouts = sampled(engine, {update.version: 0})
    backward(trainer, rollouts, lessons_of(rollouts), UpdateOptions())
    step(trainer)
    with pytest.raises(ParityBroken, match="parity is not exact"):
        backward(trainer, rollouts, lessons_of(rollouts), UpdateOptions())


def test_records_are_what_the_trainer_chooses(trainer: Trainer, engine: Engine) -> None:
    update = Publisher().update(dict(trainer.masters.tensors()))
    engine.update_weights(update)
    rollouts = sampled(engine, {update.version: 0})
    routes, rows = trainer.chosen([document_of(rollout) for rollout in rollouts])
    config = trainer.masters.config
    known = torch.ones(sum(r.num_tokens for r in rollouts), dtype=torch.bool)
    known[np.cumsum([r.num_tokens for r in rollouts]) - 1] = False  # never computed by the engine
    recorded_routes, recorded_rows = routes_of(config, rollouts), rows_of(config, rollouts)
    assert recorded_routes.keys() == {name for name in routes if not name.startswith("mtp")}
    for name, ids in recorded_routes.items():
        assert torch.equal(ids[known], routes[name][known]), name
    for recorded, own in zip(recorded_rows, rows, strict=True):
        assert torch.equal(recorded[known], own[known])
    assert any((ids[:, 0] > 0).any() for ids in rows)  # the index did choose
    # Repeated, nothing changes.
    options = UpdateOptions(replays_experts=True, replays_rows=True)
    assert backward(trainer, rollouts, lessons_of(rollouts), options).parity.first is None


def test_replay_of_a_shuffled_record_is_no_replay(trainer: Trainer, engine: Engine) -> None:
    update = Publisher().update(dict(trainer.masters.tensors()))
    engine.update_weights(update)
    rollouts = sampled(engine, {update.version: 0})
    shuffled = []
    for rollout in rollouts:
        assert rollout.experts is not None
        order = np.random.default_rng(0).permutation(len(rollout.experts))
        shuffled.append(replace(rollout, experts=rollout.experts[order]))
    with pytest.raises(ParityBroken):
        backward(trainer, shuffled, lessons_of(rollouts), UpdateOptions(replays_experts=True))


def test_sampling_that_shapes_the_distribution_is_refused(trainer: Trainer, engine: Engine) -> None:
    for params in (SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), SamplingParams(min_tokens=3)):
        with pytest.raises(RolloutInvalid, match="temperature 1"):
            Sampler(Inbox(engine), params, group_size=2, policy_versions={})
