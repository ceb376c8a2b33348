"""One update, whatever its advantages come from: a function of weights and batch, and what it says."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.training import VOCAB, export, tiny_trainer

from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import ConfigError, ParityBroken
from bittrue.model.publication import Publisher
from bittrue.rl.config import RlConfig
from bittrue.rl.learner import Judges, Learner
from bittrue.rl.records import Records, StepBatch
from bittrue.rl.replay import document_of
from bittrue.rl.rollout import Inbox, Prompt, Sampler
from bittrue.rl.teachers import Teacher
from bittrue.rl.types import Scored
from bittrue.train.run_file import checked

GROUP = 3


def settings(**sections: dict[str, Any]) -> RlConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"start": "tiny"},
        "data": {"tasks": {"sort": 1.0}},
        "rollout": {"group": GROUP, "max_tokens": 12},
        "optim": {"lr": 3e-3},
        "run": {"steps": 1000},
    }
    names = base.keys() | sections.keys()
    return checked(RlConfig, {name: {**base.get(name, {}), **sections.get(name, {})} for name in names})


def learner(judges: Judges | None = None, **sections: Any) -> Learner:
    return Learner(settings(**sections), tiny_trainer("fp4"), judges or Judges())


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[StepBatch, StepBatch]]:
    """A batch of the first weights, with scores of their own, and one of which a group is all right."""
    trainer = tiny_trainer("fp4")
    model = export(trainer, tmp_path_factory.mktemp("learner") / "model")
    engine = Engine(model, kv_memory="32MiB", threads=1, log_level="error", max_context=256)
    update = Publisher().update(dict(trainer.masters.tensors()))
    engine.update_weights(update)
    sampler = Sampler(
        Inbox(engine),
        SamplingParams(max_tokens=12),
        group_size=GROUP,
        policy_versions={update.version: 0},
    )
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{n}", tuple(rng.integers(2, VOCAB, n).tolist())) for n in (5, 60)]
    groups = sampler.groups(prompts, seed=1)
    scores = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0)), ((1.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    yield tuple(  # type: ignore[misc]
        StepBatch(
            0,
            ("a", "b"),
            tuple(
                tuple(
                    Scored(rollout, score, "right" if score else "wrong")
                    for rollout, score in zip(group.rollouts, own, strict=True)
                )
                for group, own in zip(groups, of_batch, strict=True)
            ),
        )
        for of_batch in scores
    )
    engine.close()


@pytest.mark.parametrize("advantage", ["grpo", "mean_only", "leave_one_out", "reinforce_pp", "gae"])
def test_a_step_is_a_function_of_weights_and_batch(
    sampled: tuple[StepBatch, StepBatch], tmp_path: Path, advantage: str
) -> None:
    records = Records(tmp_path)
    records.write(sampled[0])
    digests = []
    for batch in (sampled[0], records.read(0)):
        own = learner(policy={"advantage": advantage})
        before = own.digest()
        values = own.gradient(batch) | own.step(0)
        assert values["parity/differing"] == 0 == values["parity/logprob_abs_diff/max"]
        assert values["train/grad_norm"] > 0 and own.digest() != before
        digests.append(own.digest())
    assert digests[0] == digests[1]


def test_groups_of_equal_scores_teach_only_where_the_baseline_is_the_batch(
    sampled: tuple[StepBatch, StepBatch],
) -> None:
    batch = sampled[1]
    tokens = [sum(len(each.rollout.answer_ids) for each in group) for group in batch.groups]
    values = learner().gradient(batch)
    assert values["parity/num_tokens"] == tokens[0] and values["rollout/dropped/all_one"] == 1
    for advantage in ("reinforce_pp", "reinforce_pp_baseline", "gae"):
        assert learner(policy={"advantage": advantage}).gradient(batch)["parity/num_tokens"] == sum(tokens)


def test_nothing_to_learn_moves_nothing(sampled: tuple[StepBatch, StepBatch]) -> None:
    batch = sampled[1]
    only = StepBatch(0, ("b",), batch.groups[1:])
    own = learner()
    before = own.digest()
    values = own.gradient(only) | own.step(0)
    assert own.digest() == before and "parity/num_tokens" not in values and "train/grad_norm" not in values


def test_the_value_head_learns_the_returns(sampled: tuple[StepBatch, StepBatch]) -> None:
    own = learner(policy={"advantage": "gae", "value_lr": 0.05, "discount": 1.0, "gae_decay": 1.0})
    own._config = own._config.model_copy(update={"optim": own._config.optim.model_copy(update={"lr": 1e-12})})
    losses = []
    for _ in range(12):
        losses.append(own.gradient(sampled[0])["train/value_loss"])
        own.step(0)
    scored = sampled[0].scored
    returns = np.repeat([each.score for each in scored], [len(each.rollout.answer_ids) for each in scored])
    assert losses[0] == pytest.approx(0.5 * np.mean(returns**2), rel=1e-6)  # it starts at zero
    assert losses[-1] < 0.5 * losses[0]


def test_a_value_head_goes_on_where_it_was_saved(sampled: tuple[StepBatch, StepBatch]) -> None:
    def made() -> Learner:
        stale = {"kind": "pipelined", "staleness": 1}  # the same answers again are off policy
        return learner(policy={"advantage": "gae", "value_lr": 0.05, "correction": "tis"}, loop=stale)

    own, other = made(), made()
    own.gradient(sampled[0])
    own.step(0)
    other.load_state({name: tensor.clone() for name, tensor in own.state().items()})
    for each in (own, other):
        each.gradient(sampled[0])
        each.step(1)
    assert own.digest() == other.digest()


def test_the_reference_is_no_distance_away_at_first(sampled: tuple[StepBatch, StepBatch]) -> None:
    own = learner(Judges(reference=tiny_trainer("fp4")), policy={"reference_kl": 0.1})
    assert own.gradient(sampled[0])["train/kl"] == 0.0
    own.step(0)
    own = learner(Judges(reference=tiny_trainer("fp4", seed=1)), policy={"reference_kl": 0.1})
    assert own.gradient(sampled[0])["train/kl"] > 0.0


def test_a_penalty_in_the_reward_needs_rewards_of_tokens(sampled: tuple[StepBatch, StepBatch]) -> None:
    far = Judges(reference=tiny_trainer("fp4", seed=1))
    plain = learner(policy={"advantage": "reinforce_pp"})
    plain.gradient(sampled[0])
    own = learner(far, policy={"advantage": "reinforce_pp", "reference_kl": 0.5, "kl_in": "reward"})
    assert "train/kl" not in own.gradient(sampled[0])
    named, others = own.trainer.masters.named, plain.trainer.masters.named
    assert any(not torch.equal(a.grad, b.grad) for a, b in zip(named.values(), others.values(), strict=True))
    with pytest.raises(ConfigError, match="kl_in = reward needs a reward for every token"):
        settings(policy={"reference_kl": 0.5, "kl_in": "reward"})


# ---- off policy --------------------------------------------------------------------------------------


def test_an_off_policy_loop_without_a_correction_is_refused() -> None:
    for kind in ("pipelined", "async"):
        with pytest.raises(ConfigError, match=f"{kind} loop learns from answers of older weights"):
            settings(loop={"kind": kind, "staleness": 1})
        settings(loop={"kind": kind, "staleness": 1}, policy={"correction": "tis"})
        with pytest.raises(ConfigError, match=f"{kind} loop has a staleness of 0"):
            settings(loop={"kind": kind}, policy={"correction": "tis"})
    with pytest.raises(ConfigError, match="sync loop has a staleness of 2"):
        settings(loop={"staleness": 2}, policy={"correction": "tis"})


def test_answers_of_older_weights_are_weighted_and_those_of_todays_compared(
    sampled: tuple[StepBatch, StepBatch],
) -> None:
    own = learner(policy={"correction": "tis"}, loop={"kind": "pipelined", "staleness": 1})
    rollouts = sampled[0].rollouts
    parity = own.compare(rollouts, 0)
    assert parity is not None and parity.differing == 0 and parity.num_tokens > 0
    assert own.compare(rollouts, 1) is None  # none is of that version
    own.gradient(sampled[0])
    own.step(0)
    with pytest.raises(ParityBroken):
        own.compare(rollouts, 0)
    values = own.gradient(sampled[0])  # off policy by a step now
    assert "parity/differing" not in values
    assert values["is/ratio/min"] < 1.0 < values["is/ratio/max"]
    assert values["train/ratio/min"] == values["train/ratio/max"] == 1.0 and values["train/ppo_kl"] != 0.0


def test_what_would_do_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="in a pipelined loop nothing is under way"):
        settings(
            loop={"kind": "pipelined", "staleness": 1, "running": "in_place"}, policy={"correction": "tis"}
        )
    for name, value in (("reference_kl", 0.1), ("entropy", 0.1), ("correction", "tis"), ("replay", "both")):
        with pytest.raises(ConfigError, match=f"with teachers the loss is theirs, and policy.{name} does"):
            with_teacher(["sort"], policy={name: value})
    with_teacher(["sort"], policy={"reduction": "sequence_mean", "parity": "fp8"})
    with_teacher([], loop={"kind": "async", "staleness": 1})
    with pytest.raises(ConfigError, match="teacher one teaches sums, which is not asked; choose among sort"):
        with_teacher(["sort", "sums"])
    with pytest.raises(ConfigError, match="rollout.refill: with gae groups of equal scores teach too"):
        settings(policy={"advantage": "gae"}, rollout={"refill": 1})


def with_teacher(tasks: list[str], **sections: Any) -> RlConfig:
    return settings(distill={"teachers": {"one": {"model": "tiny", "tasks": tasks}}}, **sections)


# ---- distillation ------------------------------------------------------------------------------------


def test_a_student_that_is_its_teacher_has_nothing_to_learn(sampled: tuple[StepBatch, StepBatch]) -> None:
    own = learner(Judges(teachers=[Teacher("same", tiny_trainer("fp4"), 1.0)]))
    values = own.gradient(sampled[0])
    assert values["train/teacher_kl"] == 0.0 == values["parity/differing"]
    gradients = [leaf.grad for leaf in own.trainer.masters.named.values() if leaf.grad is not None]
    assert all(float(gradient.abs().max()) < 1e-9 for gradient in gradients)


def test_the_divergence_is_that_of_whole_vocabularies_by_task_and_weight(
    sampled: tuple[StepBatch, StepBatch],
) -> None:
    teachers = [
        Teacher("one", tiny_trainer("fp4", seed=1), 0.5, ("a",)),
        Teacher("two", tiny_trainer("fp4", seed=2), 2.0, ("b",)),
    ]
    own = learner(Judges(teachers=teachers))
    values = own.gradient(sampled[0])
    total, number = 0.0, 0
    for teacher, group in zip(teachers, sampled[0].groups, strict=True):
        documents = [document_of(each.rollout) for each in group]
        logits = own.trainer.project(own.trainer.hidden(documents)).double()
        taught = teacher.trainer.project(teacher.trainer.hidden(documents)).double()
        p, q = logits.log_softmax(-1), taught.log_softmax(-1)
        apart = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        total, number = total + teacher.weight * float(apart.sum()), number + len(apart)
    assert values["train/teacher_kl"] == pytest.approx(total / number, rel=1e-9)


def test_a_student_comes_nearer_to_its_teacher(sampled: tuple[StepBatch, StepBatch]) -> None:
    own = learner(
        Judges(teachers=[Teacher("other", tiny_trainer("fp4", seed=1), 1.0)]),
        policy={"correction": "tis"},
        loop={"kind": "pipelined", "staleness": 1},  # the same answers again are off policy
    )
    apart = []
    for _ in range(8):
        apart.append(own.gradient(sampled[0])["train/teacher_kl"])
        own.step(0)
    assert apart[-1] < 0.8 * apart[0]
