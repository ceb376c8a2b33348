import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_run import SmallRun, Steps, Watched, final_bytes, settings, untimed_metrics

from bittrue.train.config import SpikeSection
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.run import Gradients
from bittrue.train.spike import Anticipation, Routes, SpikeDetector
from bittrue.train.trainer import StepStats

SPIKE, BACK_TO, DELAY, LENGTH, STEPS = 7, 4, 2, 3, 11  # the run below
STEEP = 40.0


def detector(**changes: Any) -> SpikeDetector:
    values = {"is_watched": True, "least": 3, "window": 4, "loss_factor": 2.0, "loss_rise": 0.5, **changes}
    return SpikeDetector(SpikeSection.model_validate(values))


def test_a_loss_far_above_the_median_is_a_spike() -> None:
    found = detector()
    for loss in (1.0, 1.2, 0.9):
        assert found.reason(loss, 1.0) is None
        found.note(loss, 1.0)
    assert found.reason(2.0, 1.0) is None
    assert found.reason(2.1, 1.0) == "loss 2.1, median 1"


def test_nothing_is_a_spike_before_there_is_a_history() -> None:
    found = detector()
    found.note(1.0, 1.0)
    found.note(1.0, 1.0)
    assert found.reason(100.0, 100.0) is None


def test_a_small_loss_may_double() -> None:
    found = detector()
    for _ in range(3):
        found.note(0.05, 1.0)
    assert found.reason(0.3, 1.0) is None
    assert found.reason(0.6, 1.0) is not None


def test_a_gradient_norm_can_be_a_spike_of_its_own() -> None:
    found, blind = detector(grad_factor=5.0), detector()
    for one in (found, blind):
        for _ in range(3):
            one.note(1.0, 2.0)
    assert found.reason(1.0, 10.1) == "gradient norm 10.1, median 2"
    assert found.reason(1.0, 9.9) is None
    assert blind.reason(1.0, 1e9) is None


def test_the_history_is_of_the_window_and_survives_a_checkpoint() -> None:
    found = detector()
    for loss in (9.0, 9.0, 9.0, 1.0, 1.0, 1.0, 1.0):
        found.note(loss, loss)
    assert found.losses == [1.0] * 4
    other = detector()
    other.load(found.state())
    assert (other.losses, other.norms) == (found.losses, found.norms)


def test_who_does_not_watch_sees_nothing() -> None:
    found = detector(is_watched=False)
    for _ in range(10):
        found.note(1.0, 1.0)
    assert found.reason(1e9, 1e9) is None and found.losses == []


def test_the_choice_for_a_step_is_made_delay_steps_before() -> None:
    """After a rollback to step 4, until step 10, with delay 2."""
    now, asked = 4, []
    anticipation = Anticipation(delay=2)
    anticipation.switch_on(10)

    def choose(step: int) -> Routes:
        asked.append((now, step))
        return {"r": torch.tensor([step])}

    used = []
    for now in range(4, 12):
        routes = anticipation.routes(now, choose)
        used.append(None if routes is None else int(routes["r"]))
    assert asked == [(4, 4), (4, 5), (4, 6), (5, 7), (6, 8), (7, 9)]
    assert used == [4, 5, 6, 7, 8, 9, None, None]


def test_choices_that_wait_survive_a_checkpoint() -> None:
    first = Anticipation(delay=2)
    first.switch_on(20)
    first.routes(5, lambda step: {"layers.2.ffn.gate.bias": torch.tensor([step], dtype=torch.int16)})
    second = Anticipation(delay=2)
    second.load(first.until, first.tensors())
    assert {step: r["layers.2.ffn.gate.bias"].tolist() for step, r in second.waiting.items()} == {
        6: [6],
        7: [7],
    }
    assert second.until == 20


# ---- a planted spike -------------------------------------------------------------------------------------


class Steepening(Watched):
    """Blows the head up where a step chooses its own experts: at SPIKE, so that its loss jumps.

    Keeps, for each choice made in advance and each step, a digest of the weights it was made with.
    """

    def __init__(self, inner: Gradients, source: Steps) -> None:
        super().__init__(inner, source)
        self.chosen: list[tuple[int, str]] = []
        self.stepped: list[tuple[int, str, bool]] = []

    def weights(self) -> str:
        parts = (t.detach().numpy().tobytes() for t in self.masters.named.values())
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def routes(self, documents: Sequence[Document]) -> Routes:
        self.chosen.append((self.source.last, self.weights()))
        return super().routes(documents)

    def backward(
        self, documents: Sequence[Document], weights: LossWeights, *, routes: Routes | None = None
    ) -> StepStats:
        self.stepped.append((self.source.last, self.weights(), routes is not None))
        if self.source.last == SPIKE and routes is None:
            with torch.no_grad():
                self.masters.named["head.weight"].mul_(STEEP)
            self.publish()
        return super().backward(documents, weights, routes=routes)


SPIKY = settings(
    spike={"is_watched": True, "least": 4, "window": 8, "margin": 2, "delay": DELAY, "steps": LENGTH},
    run={"steps": STEPS, "checkpoint_every": 2, "keep": 4},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(SPIKY, tmp_path_factory.mktemp("whole"), plant=Steepening)
    assert run.go()
    return run


def test_a_spike_rolls_back_and_anticipates_for_a_while(whole: SmallRun) -> None:
    assert [(spike["step"], spike["back_to"]) for spike in whole.run.spikes] == [(SPIKE, BACK_TO)]
    assert whole.run.spikes[0]["reason"].startswith("loss ")
    rows = untimed_metrics(whole.directory)
    assert [row["step"] for row in rows] == list(range(STEPS))
    anticipated = [row["step"] for row in rows if row["anticipating"]]
    assert anticipated == list(range(BACK_TO, SPIKE + LENGTH))
    assert rows[SPIKE]["main"] < rows[0]["main"]  # the weights that were blown up are gone


def test_experts_are_chosen_by_the_parameters_of_delay_steps_before(whole: SmallRun) -> None:
    trainer = whole.run.trainer
    assert isinstance(trainer, Steepening)
    began = {step: weights for step, weights, _ in trainer.stepped}  # the last time a step was run
    assert [step for step, _ in trainer.chosen] == list(range(BACK_TO, SPIKE + LENGTH))
    for step, weights in trainer.chosen:
        assert weights == began[max(BACK_TO, step - DELAY)], step


def test_the_first_choices_are_those_of_the_point_gone_back_to(whole: SmallRun) -> None:
    trainer = whole.run.trainer
    assert isinstance(trainer, Steepening)
    first, again = (weights for step, weights, _ in trainer.stepped if step == BACK_TO)
    assert first == again == trainer.chosen[0][1]


@pytest.mark.parametrize("stop_at", [5, 9])
def test_a_stop_around_a_spike_changes_no_bit(whole: SmallRun, tmp_path: Path, stop_at: int) -> None:
    """5: before the spike, with a checkpoint between it and the one gone back to. 9: while choices wait."""
    SmallRun(SPIKY, tmp_path, plant=Steepening).go(stop_at=stop_at)
    resumed = SmallRun(SPIKY, tmp_path, plant=Steepening)
    assert resumed.run.step == stop_at
    assert resumed.go()
    assert final_bytes(tmp_path, STEPS) == final_bytes(whole.directory, STEPS)
    assert untimed_metrics(tmp_path) == untimed_metrics(whole.directory)
    assert resumed.run.spikes == whole.run.spikes


DEATH = 9  # anticipated, one step after a checkpoint with waiting choices


class Dying(Steepening):
    """Dies within a step."""

    def backward(
        self, documents: Sequence[Document], weights: LossWeights, *, routes: Routes | None = None
    ) -> StepStats:
        if self.source.last == DEATH:
            raise KeyboardInterrupt
        return super().backward(documents, weights, routes=routes)


def test_a_death_while_choices_wait_changes_no_bit(whole: SmallRun, tmp_path: Path) -> None:
    dying = SmallRun(SPIKY, tmp_path, plant=Dying)
    with pytest.raises(KeyboardInterrupt):
        dying.go()
    resumed = SmallRun(SPIKY, tmp_path, plant=Steepening)
    assert resumed.run.step == DEATH - 1
    assert resumed.go()
    assert final_bytes(tmp_path, STEPS) == final_bytes(whole.directory, STEPS)
