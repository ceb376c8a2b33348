"""A run of the tiny model: what it trusts of the records it finds, and what it keeps."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.training import VOCAB, export, tiny_trainer

from bittrue.engine.engine import Engine
from bittrue.errors import CheckpointError, ParityBroken
from bittrue.model.publication import Publisher
from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig
from bittrue.rl.learner import Judges, Learner
from bittrue.rl.loop import PolicyParts, PolicyRun
from bittrue.rl.pipeline import Pipeline
from bittrue.rl.records import Records, StepBatch
from bittrue.rl.rollout import Prompt
from bittrue.rl.source import Asked
from bittrue.rl.types import Rollout, Scored
from bittrue.rl.verifiers.health import Health
from bittrue.train.metrics import MetricsFile
from bittrue.train.run_file import checked

STEPS = 4
SYNC: dict[str, Any] = {}
IN_PLACE = {
    "loop": {"kind": "async", "staleness": 2, "running": "in_place"},
    "policy": {"correction": "tis"},
}
ONE_OFF = {"loop": {"kind": "pipelined", "staleness": 1}, "policy": {"correction": "tis"}}


class Parity:
    """Random prompts; an answer is right where the sum of its ids is odd."""

    def of_step(self, step: int, count: int) -> list[Asked]:
        rng = np.random.default_rng(step)
        prompts = [Prompt(f"{step}-{i}", tuple(rng.integers(2, VOCAB, 20).tolist())) for i in range(count)]
        return [Asked(prompt, "odd", None) for prompt in prompts]

    def score(self, pairs: Sequence[tuple[Asked, Sequence[Rollout]]]) -> list[list[Scored]]:
        return [[self._scored(rollout) for rollout in rollouts] for _, rollouts in pairs]

    def _scored(self, rollout: Rollout) -> Scored:
        is_odd = bool(rollout.answer_ids.sum() % 2)
        return Scored(rollout, float(is_odd), "right" if is_odd else "wrong")

    def digest(self) -> str:
        return "odd sums"

    def health(self) -> Health | None:
        return None

    def isolation(self) -> str:
        return "none"

    def close(self) -> None:
        return


def settings(**sections: Any) -> RlConfig:
    base: dict[str, Any] = {
        "model": {"start": "tiny"},
        "data": {"tasks": {"sort": 1.0}},
        "rollout": {"prompts": 2, "group": 4, "max_tokens": 8},
        "optim": {"lr": 3e-3},
        "run": {"steps": STEPS, "checkpoint_every": 1, "eval_every": 0},
    }
    return checked(RlConfig, base | sections)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = export(tiny_trainer("fp4"), tmp_path_factory.mktemp("policy-run") / "model")
    knobs: dict[str, Any] = {"kv_memory": "32MiB", "threads": 1, "log_level": "error", "max_context": 256}
    engine = Engine(model, max_step_tokens=16, max_running=10, **knobs)  # less than a prompt
    yield engine
    engine.close()


Go = Callable[..., None]


@pytest.fixture(scope="module")
def go(engine: Engine) -> Go:
    """Takes the run in a directory on, by a number of steps at most."""

    def go(out: Path, sections: dict[str, Any], steps: int = STEPS) -> None:
        out.mkdir(exist_ok=True)
        engine.flush()  # as a process that has just begun
        config, done = settings(**sections), 0
        learner = Learner(config, tiny_trainer("fp4"), Judges())
        parts = PolicyParts(learner, engine, Parity(), {"odd": Parity()}, {}, 1)

        def tell(values: object) -> None:
            nonlocal done
            done += 1

        with MetricsFile(out / "metrics.jsonl") as metrics:
            run = PolicyRun(config, out, parts, Log(sys.stderr, "error"))
            run.begin(metrics)
            try:
                run.go(metrics, should_stop=lambda: done >= steps, tell=tell)
            finally:
                while engine.has_work():  # of a run that was refused
                    engine.step()

    return go


@pytest.fixture(scope="module")
def whole(go: Go, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, one step off policy."""
    out = tmp_path_factory.mktemp("policy-run") / "whole"
    go(out, ONE_OFF)
    return out


@pytest.fixture
def killed(go: Go, tmp_path: Path) -> Path:
    """The same run, killed in its second step: the batch of the third is on record."""
    out = tmp_path / "run"
    go(out, ONE_OFF, 2)
    shutil.rmtree(out / "step-000002")
    assert [Records(out).has(step) for step in range(STEPS)] == [True, True, True, False]
    return out


def lines_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_one_step_off_that_was_killed_says_the_same_of_every_step(
    go: Go, whole: Path, killed: Path
) -> None:
    go(killed, ONE_OFF)
    same = ("masters_after", "weights_before", "weights_after", "record", "versions")
    facts = [
        [{name: line[name] for name in same} for line in lines_of(out / "steps.jsonl")]
        for out in (whole, killed)
    ]
    assert facts[0] == facts[1]
    versions = [list(line["versions"].values()) for line in facts[1]]
    assert versions == [[0], [0], [1], [2]]  # of the batch on record too
    numbers = [
        [line.get("parity/num_tokens") for line in lines_of(out / "metrics.jsonl")] for out in (whole, killed)
    ]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_what_is_measured_changes_no_weight(go: Go, whole: Path, tmp_path: Path) -> None:
    measured = {"run": {"steps": STEPS, "eval_every": 1, "eval_problems": 3, "eval_samples": 2}}
    go(tmp_path / "run", ONE_OFF | measured)
    digests = [
        [line["masters_after"] for line in lines_of(out / "steps.jsonl")] for out in (whole, tmp_path / "run")
    ]
    assert digests[0] == digests[1]
    lines = lines_of(tmp_path / "run" / "metrics.jsonl")
    assert len(lines) == STEPS + 1 and all("eval/odd/pass@2" in line for line in lines)


def test_answers_on_record_are_compared_when_a_run_goes_on(go: Go, killed: Path) -> None:
    records = Records(killed)
    batch = records.read(2)
    first = batch.groups[0][0]
    logprobs = first.rollout.logprobs.copy()
    logprobs[0] = np.nextafter(logprobs[0], np.float32(-100))
    changed = replace(first, rollout=replace(first.rollout, logprobs=logprobs))
    records.write(replace(batch, groups=((changed, *batch.groups[0][1:]), *batch.groups[1:])))
    with pytest.raises(ParityBroken, match="1 of .* tokens differ"):
        go(killed, ONE_OFF)
    assert len(lines_of(killed / "steps.jsonl")) == 1  # the step was not taken


@pytest.mark.parametrize("versions", [{1: "0" * 32}, {}])
def test_a_record_of_weights_the_run_had_not_is_refused(
    go: Go, killed: Path, versions: dict[int, str]
) -> None:
    records = Records(killed)
    records.write(replace(records.read(2), versions=versions))
    with pytest.raises(CheckpointError, match="remove the records of step 2 and later"):
        go(killed, ONE_OFF)


def test_a_record_of_another_step_is_refused(killed: Path) -> None:
    records = Records(killed)
    shutil.copy(records.path(0), records.path(1))
    with pytest.raises(CheckpointError, match="is the record of step 0"):
        records.read(1)


def test_records_without_a_checkpoint_are_not_taken_for_those_of_a_new_run(go: Go, killed: Path) -> None:
    for path in killed.iterdir():
        if path.name.startswith("step"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (killed / "metrics.jsonl").unlink()
    with pytest.raises(CheckpointError, match="records of a run, but no checkpoint"):
        go(killed, SYNC)


def test_answers_that_nobody_compares_later_are_not_kept(engine: Engine, tmp_path: Path) -> None:
    update = Publisher().update(dict(tiny_trainer("fp4").masters.tensors()))
    engine.update_weights(update)
    for sections, is_kept in ((SYNC, False), (ONE_OFF, True)):
        out = tmp_path / str(is_kept)
        out.mkdir()
        pipeline = Pipeline(
            settings(**sections), engine, Parity(), Records(out), {update.version: 0}, first=0
        )
        pipeline.ask(0)
        batch = pipeline.take(0)
        assert isinstance(batch, StepBatch) and batch.versions == {0: update.version}
        assert len(pipeline.arrivals()) == (len(batch.rollouts) if is_kept else 0)


def test_answers_over_a_prompt_of_older_weights_are_of_no_version(go: Go, tmp_path: Path) -> None:
    out = tmp_path / "run"
    go(out, IN_PLACE)
    spans = [r.spans for step in range(STEPS) for r in Records(out).read(step).rollouts]
    assert any(own[0].num_tokens == 0 for own in spans)  # else nothing is tested here
    compared = sum(line.get("parity/num_tokens", 0) for line in lines_of(out / "metrics.jsonl"))
    assert compared > 0
