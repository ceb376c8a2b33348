"""The run file of reinforcement learning, read from TOML and checked, as one frozen value."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bittrue.rl.correction import ICEPOP, MIS, TIS, Correction
from bittrue.rl.packing import Reduction
from bittrue.rl.parity import MODES
from bittrue.rl.policy_loss import Objective, PolicyOptions
from bittrue.rl.update import UpdateOptions
from bittrue.train.config import OptimSection
from bittrue.train.run_file import Section

CORRECTIONS: dict[str, Correction | None] = {"none": None, "tis": TIS, "mis": MIS, "icepop": ICEPOP}
Advantage = Literal["grpo", "mean_only", "leave_one_out"]


class PolicyModelSection(Section):
    """[model]: what is trained."""

    start: str = Field(description="A published checkpoint, or one of a run.")
    draft: Literal["none", "mtp"] = Field("mtp", description="Keep its draft head, which is not trained.")


class TaskSection(Section):
    """[data]: problems and their checkers."""

    seed: int = Field(0, ge=0, description="Seed of the problems and of sampling.")
    tasks: dict[str, float] = Field(description="Weight of each task.")

    @model_validator(mode="after")
    def _has_tasks(self) -> Self:
        if not self.tasks or min(self.tasks.values()) <= 0:
            raise ValueError("tasks needs at least one task, each with a weight above 0")
        return self


class RolloutSection(Section):
    """[rollout]: how answers are sampled."""

    prompts: int = Field(24, ge=1, description="Prompts of a step.")
    group: int = Field(8, ge=2, description="Answers to each prompt.")
    max_tokens: int = Field(64, ge=1, description="Longest answer.")
    speculation: Literal["off", "ngram", "mtp"] = Field("off", description="Drafts; they change no token.")
    kv_memory: str = Field("256MiB", description="Of the engine.")
    max_running: int = Field(64, ge=1, description="Answers computed together.")


class PolicySection(Section):
    """[policy]: the loss of the answers' tokens."""

    advantage: Advantage = Field("grpo", description="grpo, without its division (Dr. GRPO), leave-one-out.")
    objective: Objective = Field("clipped", description="clipped, gspo or reinforce.")
    clip_low: float = Field(0.2, ge=0, le=1, description="The ratio may fall by this.")
    clip_high: float = Field(0.28, ge=0, description="The ratio may rise by this.")
    reduction: Reduction = Field("token_mean", description="What a token's loss is divided by.")
    correction: Literal["none", "tis", "mis", "icepop"] = Field("none", description="Weights of tokens.")
    entropy: float = Field(0.0, ge=0, description="Weight of the mean entropy.")
    parity: str = Field("exact", description="What a step asks for: exact, or the bounds of f32 to fp4.")
    replay: Literal["none", "experts", "rows", "both"] = Field("none", description="Choices repeated.")

    @model_validator(mode="after")
    def _known_parity(self) -> Self:
        if self.parity not in MODES:
            raise ValueError(f"parity is {self.parity!r}; choose one of {', '.join(MODES)}")
        return self

    def options(self, max_tokens: int) -> UpdateOptions:
        return UpdateOptions(
            policy=PolicyOptions(self.objective, self.clip_low, self.clip_high),
            reduction=self.reduction,
            correction=CORRECTIONS[self.correction],
            parity=self.parity,
            replays_experts=self.replay in ("experts", "both"),
            replays_rows=self.replay in ("rows", "both"),
            entropy=self.entropy,
            length=max_tokens,
        )


class PolicyOptimSection(OptimSection):
    """[optim]: Muon for matrices and AdamW for the rest, at a rate that goes down to zero."""

    lr: float = Field(1e-4, gt=0, le=1, description="Learning rate of the first step.")
    weight_decay: float = Field(0.0, ge=0, description="Share of a weight taken off per unit of rate.")


class PolicyRunSection(Section):
    """[run]: how long, and what is kept."""

    out: str = Field("", description="Run directory; a flag can give it.")
    steps: int = Field(100, ge=1, description="Steps of the run; the rate reaches zero behind the last.")
    micro_tokens: int = Field(4096, ge=1, description="Most tokens in one batch of the trainer.")
    checkpoint_every: int = Field(10, ge=1, description="Steps between checkpoints.")
    keep: int = Field(3, ge=2, description="Checkpoints kept, the newest.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads; 0 = every core.")
    eval_every: int = Field(20, ge=0, description="Steps between held-out measurements; 0 = none.")
    eval_problems: int = Field(256, ge=1, description="Held-out problems of each task.")


class RlConfig(Section):
    """A whole run file."""

    model: PolicyModelSection
    data: TaskSection
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection.model_validate({}))
    policy: PolicySection = Field(default_factory=lambda: PolicySection.model_validate({}))
    optim: PolicyOptimSection = Field(default_factory=lambda: PolicyOptimSection.model_validate({}))
    run: PolicyRunSection = Field(default_factory=lambda: PolicyRunSection.model_validate({}))

    def identity(self) -> dict[str, Any]:
        """What the weights after a number of steps depend on, by dotted name; drafts, memory and batches are
        not among it."""
        return {
            f"{section}.{key}": value
            for section, values in self.model_dump().items()
            for key, value in values.items()
            if f"{section}.{key}" not in _NO_INFLUENCE
        }


_NO_INFLUENCE = frozenset(
    ("rollout.speculation", "rollout.kv_memory", "rollout.max_running")
    + ("run.out", "run.checkpoint_every", "run.keep", "run.threads", "run.eval_every", "run.eval_problems")
)
