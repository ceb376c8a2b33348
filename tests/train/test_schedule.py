import math
from typing import Any

import pytest

from bittrue.train.config import TrainConfig, train_config
from bittrue.train.schedule import lr_factor, phase_at


def settings(**schedule: Any) -> TrainConfig:
    return train_config({"data": {"tasks": {"sort": 1.0}}, "optim": {"lr": 0.01}, "schedule": schedule})


def factors(config: TrainConfig, *steps: int) -> list[float]:
    return [lr_factor(step, config.schedule) for step in steps]


def test_warm_up_is_a_line_that_ends_at_the_peak() -> None:
    config = settings(warmup_steps=4)
    assert factors(config, 0, 1, 2, 3, 4, 1000) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert factors(settings(warmup_steps=0), 0) == [1.0]


def test_linear_decay_ends_at_its_share_and_stays() -> None:
    config = settings(warmup_steps=2, decay="linear", decay_start=10, decay_steps=10, end_factor=0.2)
    assert factors(config, 9, 10, 15, 20, 500) == pytest.approx([1.0, 1.0, 0.6, 0.2, 0.2])


def test_cosine_decay_is_flat_at_both_ends() -> None:
    config = settings(warmup_steps=2, decay="cosine", decay_start=10, decay_steps=8, end_factor=0.1)
    quarter = 0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2
    assert factors(config, 10, 12, 14, 18, 19) == pytest.approx([1.0, quarter, 0.55, 0.1, 0.1])


def test_a_phase_is_told_by_the_step_alone() -> None:
    config = settings(warmup_steps=2, dense_steps=5, mtp_late_step=7, qat_step=9)
    phases = [phase_at(step, config.optim, config.schedule, config.loss) for step in range(12)]
    assert [p.is_dense for p in phases] == [True] * 5 + [False] * 7
    assert [p.mtp_weight for p in phases] == [0.3] * 7 + [0.1] * 5
    assert [p.is_quantised for p in phases] == [False] * 9 + [True] * 3
    assert phases[0].lr == pytest.approx(0.005)
    assert phases[11].lr == pytest.approx(0.01)
    assert phases[3] == phase_at(3, config.optim, config.schedule, config.loss)
