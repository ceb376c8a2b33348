"""The run file: every setting of a training run, read from TOML and checked, as one frozen value."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bittrue.model.presets import Precision
from bittrue.train.run_file import Section, checked, load_run_file


class ModelSection(Section):
    """[model]: what is trained. ``config`` replaces fields of the preset's config.json by their own names."""

    preset: str = Field("tiny", description="Sizes of a model that starts at random.")
    config: dict[str, Any] = Field(
        default_factory=dict, description="Fields of config.json that replace the preset's."
    )
    precision: Precision | None = Field(
        None, description="Format of the published matrices; left out: fp4, or that of the start."
    )
    draft: Literal["none", "mtp"] = Field("mtp", description="Train a draft head beside it, or none.")
    seed: int = Field(0, ge=0, description="Seed of the first weights.")
    start: str = Field(
        "", description="Start from a checkpoint (published, or of a run) in place of random weights."
    )


class DataSection(Section):
    """[data]: where documents come from: generators, by weight, or lines of JSON."""

    seed: int = Field(0, ge=0, description="Seed of the stream of documents.")
    jsonl: str = Field("", description="File of documents, one JSON object a line, in place of tasks.")
    tasks: dict[str, float] = Field(default_factory=dict, description="Weight of each task.")
    lengths: dict[str, list[int]] = Field(
        default_factory=dict, description="Least and most tokens of a document, by task that has a choice."
    )
    max_tokens: int = Field(8192, ge=2, description="Longest document, in tokens.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if bool(self.jsonl) == bool(self.tasks):
            fact = "both are given" if self.jsonl else "neither is given"
            raise ValueError(f"documents come from jsonl or from tasks; {fact}")
        if any(weight <= 0 for weight in self.tasks.values()):
            name = next(name for name, weight in self.tasks.items() if weight <= 0)
            raise ValueError(f"the weight of the task {name} is {self.tasks[name]}; it must be above 0")
        return self


class OptimSection(Section):
    """[optim]: Muon for matrices and AdamW for the rest, at one learning rate."""

    matrices: Literal["muon", "adamw"] = Field("muon", description="Rule of matrices.")
    lr: float = Field(2.7e-4, gt=0, le=1, description="Peak learning rate.")
    momentum: float = Field(0.95, ge=0, lt=1, description="Muon's.")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's, of the gradient.")
    beta2: float = Field(0.95, ge=0, lt=1, description="AdamW's, of its square.")
    eps: float = Field(1e-20, gt=0, description="AdamW's, added to the root.")
    weight_decay: float = Field(0.1, ge=0, description="Share of a weight taken off per unit of rate.")
    clip: float = Field(1.0, ge=0, description="Largest norm of all gradients together; 0 = no limit.")
    products: Literal["f32", "bf16"] = Field("f32", description="Format of Newton-Schulz' products.")


class ScheduleSection(Section):
    """[schedule]: steps at which something begins or ends, counted from 0."""

    warmup_steps: int = Field(100, ge=0, description="Steps until the peak learning rate.")
    decay: Literal["linear", "cosine"] = Field("cosine", description="Form of the decay.")
    decay_start: int = Field(0, ge=0, description="First step of the decay.")
    decay_steps: int = Field(0, ge=0, description="Steps of the decay; 0 = constant after the warm-up.")
    end_factor: float = Field(0.1, ge=0, le=1, description="Learning rate at the end, of the peak.")
    dense_steps: int = Field(
        0, ge=0, description="Steps in which attention reads every entry and the index only learns."
    )
    mtp_late_step: int = Field(0, ge=0, description="From here loss.mtp_late in place of loss.mtp.")
    qat_step: int = Field(
        0, ge=0, description="From here matrices are read in their published format; before, in bf16."
    )

    @model_validator(mode="after")
    def _decay_after_warmup(self) -> Self:
        if self.decay_steps and self.decay_start < self.warmup_steps:
            raise ValueError(
                f"decay_start is {self.decay_start}, within the {self.warmup_steps} warmup_steps; "
                "start the decay later"
            )
        return self


class LossSection(Section):
    """[loss]: weights of what is added to the loss of the next token."""

    mtp: float = Field(0.3, ge=0, description="Draft head, at first.")
    mtp_late: float = Field(0.1, ge=0, description="Draft head, from schedule.mtp_late_step.")
    mtp_depth: int = Field(
        1, ge=1, le=8, description="Drafts in a row the head is trained for, each from its own streams."
    )
    index: float = Field(1.0, ge=0, description="Index against the attention it chooses for.")
    balance: float = Field(1e-4, ge=0, description="Even use of the experts within a document.")
    bias_speed: float = Field(1e-3, ge=0, description="Change of an expert's selection bias per step.")


class SpikeSection(Section):
    """[spike]: anticipatory routing, switched on by a loss spike and off again (spec 5.5)."""

    is_watched: bool = Field(False, description="Look for spikes, and answer them.")
    loss_factor: float = Field(2.0, gt=1, description="A spike is a loss above this times the median ...")
    loss_rise: float = Field(0.5, ge=0, description="... and above the median by this.")
    grad_factor: float = Field(
        0.0, ge=0, description="Or a gradient norm above this times its median; 0 = no."
    )
    window: int = Field(64, ge=4, le=4096, description="Steps the medians are of.")
    least: int = Field(16, ge=2, description="Steps before a first spike can be told.")
    margin: int = Field(10, ge=0, description="Least steps to go back from a spike.")
    delay: int = Field(4, ge=1, description="Age in steps of the parameters that choose the experts.")
    steps: int = Field(200, ge=1, description="Steps after the spike until experts are chosen as usual.")

    @model_validator(mode="after")
    def _window_holds_a_history(self) -> Self:
        if self.is_watched and self.least > self.window:
            raise ValueError(
                f"least is {self.least}, but window = {self.window} steps are remembered: no spike would "
                "ever be told; lower least or raise window"
            )
        return self


class RunSection(Section):
    """[run]: how long, in which pieces, and what is kept."""

    out: str = Field("", description="Run directory; a flag can give it.")
    steps: int = Field(1000, ge=1, description="Step at which the run ends.")
    tokens_per_step: int = Field(4096, ge=1, description="Tokens of the documents of a step, about.")
    micro_tokens: int = Field(4096, ge=1, description="Most tokens in one batch; longer documents go alone.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between checkpoints.")
    keep: int = Field(3, ge=2, description="Checkpoints kept, the newest.")
    log_every: int = Field(10, ge=1, description="Steps between lines of the log.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 = every core.")
    any_threads: bool = Field(
        False, description="Go on from a checkpoint of a run with other threads: other roundings."
    )
    level: Literal["auto", "maths", "published"] = Field("auto", description="Numeric level of the forward.")
    act: Literal["auto", "f32", "bf16"] = Field("auto", description="Activation dtype.")
    backend: Literal["cpu", "reference"] = Field("cpu", description="Fast kernels, or the slow definition.")
    recompute: bool = Field(True, description="Compute activations again in the backward: less memory.")


class TrainConfig(Section):
    """A whole run file."""

    model: ModelSection = Field(default_factory=lambda: ModelSection.model_validate({}))
    data: DataSection
    optim: OptimSection = Field(default_factory=lambda: OptimSection.model_validate({}))
    schedule: ScheduleSection = Field(default_factory=lambda: ScheduleSection.model_validate({}))
    loss: LossSection = Field(default_factory=lambda: LossSection.model_validate({}))
    spike: SpikeSection = Field(default_factory=lambda: SpikeSection.model_validate({}))
    run: RunSection = Field(default_factory=lambda: RunSection.model_validate({}))

    @model_validator(mode="after")
    def _checkpoints_reach_back(self) -> Self:
        every, margin = self.run.checkpoint_every, self.spike.margin
        needed = 2 + -(-margin // every)
        if self.spike.is_watched and self.run.keep < needed:
            raise ValueError(
                f"run.keep is {self.run.keep}, but going back spike.margin = {margin} steps over checkpoints "
                f"every {every} needs run.keep of at least {needed}"
            )
        return self

    def identity(self) -> dict[str, Any]:
        """What the weights after a number of steps depend on, by dotted name: two runs that agree on it, and
        on machine and threads, agree on the weights."""
        flat = {
            f"{section}.{key}": value
            for section, values in self.model_dump().items()
            for key, value in values.items()
            if f"{section}.{key}" not in _NO_INFLUENCE
        }
        if self.spike.is_watched:  # a rollback goes to a checkpoint
            flat["run.checkpoint_every"] = self.run.checkpoint_every
        else:
            flat = {k: v for k, v in flat.items() if not k.startswith("spike.") or k == "spike.is_watched"}
        return flat

    @property
    def digest(self) -> str:
        """SHA-256 of the identity, in hex."""
        return hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()


# Where a run stops, what it keeps and what it says; threads are compared on their own.
_NO_INFLUENCE = frozenset(
    f"run.{name}"
    for name in (
        "out",
        "steps",
        "checkpoint_every",
        "keep",
        "log_every",
        "threads",
        "any_threads",
        "recompute",
    )
)


def load_train_config(path: Path, overrides: Mapping[str, object] | None = None) -> TrainConfig:
    """The run file at ``path``: see ``load_run_file``."""
    return load_run_file(TrainConfig, path, overrides)


def train_config(values: Mapping[str, Any], *, source: str = "run file") -> TrainConfig:
    """The checked settings. Raises ConfigError naming the place in ``source``."""
    return checked(TrainConfig, values, source=source)
