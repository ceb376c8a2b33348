"""What a training step runs with, as a pure function of its number: learning rate, loss weights, phases."""

import math
from dataclasses import dataclass

from bittrue.train.config import LossSection, OptimSection, ScheduleSection


@dataclass(frozen=True, slots=True)
class Phase:
    """The settings of one step."""

    lr: float
    mtp_weight: float
    index_weight: float
    balance_weight: float
    bias_speed: float
    is_dense: bool  # attention reads every entry while the index learns to choose
    is_quantised: bool  # matrices are read as they are deployed


def phase_at(step: int, optim: OptimSection, schedule: ScheduleSection, loss: LossSection) -> Phase:
    """The settings of step ``step``, counted from 0."""
    return Phase(
        lr=optim.lr * lr_factor(step, schedule),
        mtp_weight=loss.mtp if step < schedule.mtp_late_step else loss.mtp_late,
        index_weight=loss.index,
        balance_weight=loss.balance,
        bias_speed=loss.bias_speed,
        is_dense=step < schedule.dense_steps,
        is_quantised=step >= schedule.qat_step,
    )


def lr_factor(step: int, schedule: ScheduleSection) -> float:
    """The share of the peak learning rate at a step: up in a line, constant, then down to ``end_factor``.

    Step 0 of n warm-up steps has 1/n. The decay begins with step ``decay_start`` and has reached the end
    ``decay_steps`` later.
    """
    if step < schedule.warmup_steps:
        return (step + 1) / schedule.warmup_steps
    if not schedule.decay_steps or step < schedule.decay_start:
        return 1.0
    done = min(1.0, (step - schedule.decay_start) / schedule.decay_steps)
    left = 1 - done if schedule.decay == "linear" else (1 + math.cos(math.pi * done)) / 2
    return schedule.end_factor + (1 - schedule.end_factor) * left
