"""The run file of reinforcement learning, read from TOML and checked, as one frozen value."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from bittrue.config.run import parse_bytes
from bittrue.rl.correction import ICEPOP, MIS, TIS, Correction
from bittrue.rl.packing import Reduction
from bittrue.rl.parity import MODES
from bittrue.rl.policy_loss import KLEstimate, Objective, PolicyOptions
from bittrue.rl.prompt_file import Thinking
from bittrue.rl.rewards import Reward
from bittrue.rl.update import UpdateOptions
from bittrue.train.config import OptimSection
from bittrue.train.run_file import Section

CORRECTIONS: dict[str, Correction | None] = {"none": None, "tis": TIS, "mis": MIS, "icepop": ICEPOP}
LEAST_MEMORY = 256 << 20  # bytes: Python with sympy
Advantage = Literal["grpo", "mean_only", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline", "gae"]


class PolicyModelSection(Section):
    """[model]: what is trained."""

    start: str = Field(description="A published checkpoint, or one of a run.")
    draft: Literal["none", "mtp"] = Field("mtp", description="Keep its draft head, which is not trained.")


class TaskSection(Section):
    """[data]: what is asked, and who judges: tasks of our own with their checkers, or a file of prompts."""

    seed: int = Field(0, ge=0, description="Seed of the problems and of sampling.")
    tasks: dict[str, float] = Field(default_factory=dict, description="Weight of each task of our own.")
    prompts: str = Field("", description="In their place: a JSONL file of prompts.")
    held_out: str = Field("", description="A file of held-out prompts; empty = a tenth of them, by hash.")
    verifier: dict[str, Any] = Field(
        default_factory=dict, description="Judge of rows without one: its kind, and the fields of that kind."
    )
    thinking: Thinking = Field("off", description="How prompts of a file are rendered: off, low, high, max.")
    reward: Reward = Field("verifier", description="verifier, or a control's: random, shuffled.")

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if bool(self.tasks) == bool(self.prompts):
            fact = "both tasks and prompts" if self.tasks else "neither tasks nor prompts"
            raise ValueError(f"{fact} are given; name one of them")
        if self.tasks and min(self.tasks.values()) <= 0:
            raise ValueError("each task needs a weight above 0")
        if self.tasks and (self.held_out or self.verifier or self.thinking != "off"):
            raise ValueError("held_out, verifier and thinking are of prompts; tasks have their own")
        return self


class VerifierSection(Section):
    """[verifiers]: the processes that judge answers to prompts of a file."""

    workers: int = Field(2, ge=1, le=256, description="Answers judged at the same time.")
    seconds: float = Field(10.0, gt=0, le=3600, description="For one answer; also of the processor.")
    memory: str = Field("1GiB", description="Address space of one process.")
    require_sandbox: bool = Field(False, description="Refuse to run where only limits hold.")
    python_path: list[str] = Field(
        default_factory=list, description="Folders of modules that reward functions import."
    )

    @model_validator(mode="after")
    def _has_memory(self) -> Self:
        if parse_bytes(self.memory) < LEAST_MEMORY:
            raise ValueError(f"memory is {self.memory!r}; a worker needs 256MiB")
        return self


class RolloutSection(Section):
    """[rollout]: how answers are sampled."""

    prompts: int = Field(24, ge=1, description="Prompts of a step.")
    group: int = Field(8, ge=2, description="Answers to each prompt.")
    max_tokens: int = Field(64, ge=1, description="Longest answer.")
    speculation: Literal["off", "ngram", "mtp"] = Field("off", description="Drafts; they change no token.")
    kv_memory: str = Field("256MiB", description="Of the engine.")
    max_running: int = Field(192, ge=1, description="Answers computed together.")
    max_step_tokens: int = Field(512, ge=1, description="Tokens of one step of the engine.")
    refill: int = Field(0, ge=0, description="Times more prompts are asked for groups that teach nothing.")


class LoopSection(Section):
    """[loop]: when answers are sampled, by which weights, and where."""

    kind: Literal["sync", "pipelined", "async"] = Field(
        "sync", description="sync; pipelined: a later step is sampled meanwhile; async: sampling never waits."
    )
    staleness: int = Field(0, ge=0, le=64, description="Most versions between sampling and training.")
    running: Literal["retract", "in_place"] = Field(
        "retract", description="Answers under way when weights change: computed again, or on over old rows."
    )
    engine: Literal["inside", "process", "ray"] = Field(
        "inside", description="Of this process, of one of its own, or an actor of Ray."
    )
    engines: int = Field(1, ge=1, le=64, description="Engines that share the prompts; inside: one.")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if (self.kind == "sync") != (self.staleness == 0):
            raise ValueError(
                f"a {self.kind} loop has a staleness of {self.staleness}; 0 is sync's, 1 and more the others'"
            )
        if self.engines > 1 and self.engine == "inside":
            raise ValueError(f"{self.engines} engines do not fit inside one process; choose engine = process")
        if self.running != "retract" and self.kind != "async":
            raise ValueError(
                f"running = {self.running}: in a {self.kind} loop nothing is under way when weights change; "
                "choose async, or leave it out"
            )
        return self


class PolicySection(Section):
    """[policy]: the loss of the answers' tokens."""

    advantage: Advantage = Field(
        "grpo",
        description="grpo, mean_only (Dr. GRPO), leave_one_out, reinforce_pp, its baseline, gae (PPO).",
    )
    objective: Objective = Field("clipped", description="clipped, gspo or reinforce.")
    clip_low: float = Field(0.2, ge=0, le=1, description="The ratio may fall by this.")
    clip_high: float = Field(0.28, ge=0, description="The ratio may rise by this.")
    clip_dual: float = Field(0.0, ge=0, description="Most that counts against a bad answer; 0 = all.")
    reduction: Reduction = Field("token_mean", description="What a token's loss is divided by.")
    correction: Literal["none", "tis", "mis", "icepop"] = Field("none", description="Weights of tokens.")
    max_kl: float = Field(0.0, ge=0, description="Off-policy sequence masking beyond this; 0 = none.")
    entropy: float = Field(0.0, ge=0, description="Weight of the mean entropy.")
    reference_kl: float = Field(0.0, ge=0, description="Weight of the distance to the first policy.")
    kl_estimate: KLEstimate = Field("k3", description="k1, k2 or k3.")
    kl_in: Literal["loss", "reward"] = Field("loss", description="Where that distance counts; reward: as k1.")
    discount: float = Field(1.0, ge=0, le=1, description="Of a reward a token earlier; reinforce_pp, gae.")
    gae_decay: float = Field(0.95, ge=0, le=1, description="GAE's lambda.")
    value: float = Field(1.0, ge=0, description="Weight of the value head's loss; gae.")
    value_lr: float = Field(1e-3, gt=0, le=1, description="Its learning rate.")
    parity: str = Field("exact", description="What a step asks for: exact, or the bounds of f32 to fp4.")
    replay: Literal["none", "experts", "rows", "both"] = Field("none", description="Choices repeated.")

    @model_validator(mode="after")
    def _known_parity(self) -> Self:
        if self.parity not in MODES:
            raise ValueError(f"parity is {self.parity!r}; choose one of {', '.join(MODES)}")
        if self.kl_in == "reward" and self.advantage not in PER_TOKEN:
            raise ValueError(
                f"kl_in = reward needs a reward for every token, and {self.advantage} has one for every "
                f"answer; choose one of {', '.join(PER_TOKEN)}"
            )
        if self.objective == "gspo" and self.advantage in PER_TOKEN:
            raise ValueError(
                f"gspo has one ratio for an answer, and {self.advantage} an advantage for every token; "
                "choose clipped, or a group's advantage"
            )
        return self

    def options(self, max_tokens: int) -> UpdateOptions:
        return UpdateOptions(
            policy=PolicyOptions(self.objective, self.clip_low, self.clip_high, self.clip_dual or None),
            reduction=self.reduction,
            correction=CORRECTIONS[self.correction],
            max_kl=self.max_kl or None,
            parity=self.parity,
            replays_experts=self.replay in ("experts", "both"),
            replays_rows=self.replay in ("rows", "both"),
            entropy=self.entropy,
            reference_kl=self.reference_kl if self.kl_in == "loss" else 0.0,
            kl_estimate=self.kl_estimate,
            value=self.value,
            length=max_tokens,
        )


class TeacherSection(Section):
    """One teacher."""

    model: str = Field(description="Its published checkpoint.")
    weight: float = Field(1.0, gt=0, description="Weight of its divergence.")
    tasks: list[str] = Field(default_factory=list, description="Tasks it teaches; none = all.")


class DistillSection(Section):
    """[distill]: teachers in place of rewards."""

    teachers: dict[str, TeacherSection] = Field(
        default_factory=dict, description="Name to model, weight, tasks; rewards are then only measured."
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
    eval_samples: int = Field(0, ge=0, description="Sampled answers to each, beside the greedy one.")


class RlConfig(Section):
    """A whole run file."""

    model: PolicyModelSection
    data: TaskSection
    verifiers: VerifierSection = Field(default_factory=lambda: VerifierSection.model_validate({}))
    rollout: RolloutSection = Field(default_factory=lambda: RolloutSection.model_validate({}))
    policy: PolicySection = Field(default_factory=lambda: PolicySection.model_validate({}))
    loop: LoopSection = Field(default_factory=lambda: LoopSection.model_validate({}))
    distill: DistillSection = Field(default_factory=lambda: DistillSection.model_validate({}))
    optim: PolicyOptimSection = Field(default_factory=lambda: PolicyOptimSection.model_validate({}))
    run: PolicyRunSection = Field(default_factory=lambda: PolicyRunSection.model_validate({}))

    @model_validator(mode="after")
    def _is_sound(self) -> Self:
        is_stale, distills = self.loop.staleness > 0, bool(self.distill.teachers)
        if is_stale and self.policy.correction == "none" and not distills:
            raise ValueError(
                f"the {self.loop.kind} loop learns from answers of older weights, and nothing corrects for "
                "that; choose policy.correction = tis, mis or icepop"
            )
        if is_stale and self.policy.parity != "exact":
            raise ValueError(
                f"policy.parity is {self.policy.parity!r}, and answers of older weights are compared with "
                "exact only, when they come; choose exact, or the sync loop"
            )
        if self.rollout.refill and self.loop.kind != "sync":
            raise ValueError("rollout.refill asks for more prompts at once; choose the sync loop, or 0")
        if self.rollout.refill and (distills or self.policy.advantage in WHOLE_BATCH):
            what = "with teachers" if distills else f"with {self.policy.advantage}"
            raise ValueError(f"rollout.refill: {what} groups of equal scores teach too; choose 0")
        if distills:
            self._check_teachers()
        return self

    def _check_teachers(self) -> None:
        """Raises ValueError for what would do nothing beside teachers."""
        idle = [
            name
            for name, setting in PolicySection.model_fields.items()
            if name not in _DISTILLED and getattr(self.policy, name) != setting.default
        ]
        if idle:
            raise ValueError(
                f"with teachers the loss is theirs, and policy.{idle[0]} does nothing; leave it out, or "
                "distill.teachers"
            )
        for name, teacher in self.distill.teachers.items():
            unknown = sorted(set(teacher.tasks) - self.data.tasks.keys())
            if self.data.tasks and unknown:
                raise ValueError(
                    f"teacher {name} teaches {unknown[0]}, which is not asked; choose among "
                    f"{', '.join(sorted(self.data.tasks))}"
                )

    def identity(self) -> dict[str, Any]:
        """What the weights after a number of steps depend on, by dotted name; drafts, memory and batches are
        not among it."""
        return {
            f"{section}.{key}": value
            for section, values in self.model_dump().items()
            for key, value in values.items()
            if f"{section}.{key}" not in _NO_INFLUENCE
        }


# Advantages of tokens, not of answers.
PER_TOKEN = ("reinforce_pp", "gae")
# Whitened over the batch: a group of equal scores teaches too.
WHOLE_BATCH = (*PER_TOKEN, "reinforce_pp_baseline")
_DISTILLED = frozenset(("reduction", "parity"))  # what teachers leave of the policy's settings
_NO_INFLUENCE = frozenset(
    ("verifiers.workers", "verifiers.require_sandbox", "verifiers.python_path")
    + ("rollout.speculation", "rollout.kv_memory", "rollout.max_running", "rollout.max_step_tokens")
    + ("loop.engine", "loop.engines")
    + ("run.out", "run.checkpoint_every", "run.keep", "run.threads", "run.eval_every", "run.eval_problems")
    + ("run.eval_samples",)
)
