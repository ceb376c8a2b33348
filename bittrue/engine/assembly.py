"""Builds what an engine runs on from a checkpoint directory and a RunConfig: everything that is chosen
once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.config.run import RunConfig
from bittrue.engine.runner import Runner
from bittrue.engine.types import SamplingParams
from bittrue.errors import BackendUnavailable, ConfigError
from bittrue.kv.layout import KVLayout
from bittrue.kv.ledger import Ledger, StepBounds, memory_ledger
from bittrue.kv.pool import allocate
from bittrue.model.build import TensorSource, build_parameters
from bittrue.model.deepseek_v4 import DeepseekV4
from bittrue.model.weights import Checkpoint, load_checkpoint, weight, weight_version
from bittrue.ops.contracts import OpTable
from bittrue.ops.dispatch import select
from bittrue.ops.threads import threads_of
from bittrue.text.grammar import DelayedGrammar, GrammarCompiler, GrammarState
from bittrue.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts of one engine, and the choices that were resolved while building them."""

    config: ModelConfig
    level: Level
    act: ActDtype
    runner: Runner
    layout: KVLayout
    num_pages: int
    num_slots: int
    max_context: int
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    weight_version: str
    ledger: Ledger
    verified: str  # the checkpoint's stamp: its values were found sound

    def new_grammar(self, params: SamplingParams) -> DelayedGrammar | None:
        """The grammar state of a new sequence, or None when it is free."""
        if params.grammar is None:
            return None
        return DelayedGrammar(GrammarState(self.compiler, params.grammar), params.grammar_after)


def assemble(run: RunConfig, *, progress: Progress | None = None, verified: str = "") -> Assembly:
    """Loads the checkpoint, selects the ops, sizes and allocates the KV memory. A checkpoint whose stamp is
    ``verified`` is not searched for NaN again.

    Raises ConfigError, CheckpointError, BackendUnavailable.
    """
    if run.device != "cpu":
        raise BackendUnavailable(
            f"device {run.device!r} is not available: this build runs on the CPU; use --device cpu"
        )
    directory = Path(run.model)
    checkpoint = load_checkpoint(directory, verified=verified, progress=progress)
    config = checkpoint.config
    level, act = numerics(run, config)
    ops = select(run.backend, isa=None if run.isa == "auto" else run.isa, threads=run.threads or None)
    max_context = context_limit(run, config)
    layout = KVLayout.of(config, level=level, act=act)
    num_pages, num_slots = layout.fit(run.kv_memory, max_sequences=run.max_running, max_context=max_context)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    return Assembly(
        config=config,
        level=level,
        act=act,
        runner=build_runner(
            config, checkpoint_source(checkpoint), ops, level=level, act=act, pages=num_pages, slots=num_slots
        ),
        layout=layout,
        num_pages=num_pages,
        num_slots=num_slots,
        max_context=max_context,
        tokenizer=tokenizer,
        compiler=GrammarCompiler(tokenizer, config.vocab_size),
        weight_version=weight_version(checkpoint),
        ledger=memory_ledger(
            layout,
            config,
            act=act,
            pages=num_pages,
            slots=num_slots,
            weight_bytes=checkpoint.num_bytes,
            bounds=StepBounds(
                max_step_tokens=run.max_step_tokens,
                max_running=run.max_running,
                max_context=max_context,
                threads=threads_of(ops),
            ),
        ),
        verified=checkpoint.stamp,
    )


def numerics(run: RunConfig, config: ModelConfig) -> tuple[Level, ActDtype]:
    """The numeric level and activation dtype: what the run says, else what the checkpoint is made for."""
    level: Level = config.default_level if run.level == "auto" else run.level
    if level == "published":
        if run.act == "f32":
            raise ConfigError(
                "level published is defined on bf16 activations; use --act bf16 or --level maths", field="act"
            )
        return level, "bf16"
    return level, config.default_act if run.act == "auto" else run.act


def context_limit(run: RunConfig, config: ModelConfig) -> int:
    """Tokens of prompt plus output that one sequence may have."""
    if run.max_context > config.max_positions:
        raise ConfigError(
            f"max_context is {run.max_context}, but the model has {config.max_positions} positions",
            field="max_context",
        )
    return run.max_context or config.max_positions


def checkpoint_source(checkpoint: Checkpoint) -> TensorSource:
    return TensorSource(lambda name: checkpoint.tensors[name], lambda name: weight(checkpoint, name))


def build_runner(
    config: ModelConfig,
    source: TensorSource,
    ops: OpTable,
    *,
    level: Level,
    act: ActDtype,
    pages: int,
    slots: int,
    max_draft: int = 0,
) -> Runner:
    """A model with a KV memory of ``pages`` pages and ``slots`` state slots."""
    model = DeepseekV4(config, build_parameters(config, source), ops, level=level, act=act)
    layout = KVLayout.of(config, level=level, act=act, max_draft=max_draft)
    return Runner(model, allocate(layout, pages=pages, slots=slots))
