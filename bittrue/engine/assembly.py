"""Builds what an engine runs on from a checkpoint directory and a RunConfig: everything that is chosen
once."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bittrue.config.formats import ActDtype, Level
from bittrue.config.model import ModelConfig
from bittrue.config.run import RunConfig
from bittrue.engine.runner import Runner
from bittrue.engine.types import SamplingParams
from bittrue.errors import BackendUnavailable, ConfigError
from bittrue.kv.canary import Canary
from bittrue.kv.disk import DiskTier
from bittrue.kv.layout import KVBudget, KVLayout
from bittrue.kv.ledger import Ledger, StepBounds, memory_ledger
from bittrue.kv.manager import CachePolicy
from bittrue.kv.offload import OffloadFile, RowStore
from bittrue.kv.pool import KVPool, allocate, plain_memory
from bittrue.kv.tiers import TierStore
from bittrue.model.build import TensorSource, build_mtp, build_parameters
from bittrue.model.deepseek_v4 import DeepseekV4, Parameters
from bittrue.model.mtp import Mtp
from bittrue.model.weights import Checkpoint, load_checkpoint, weight, weight_version
from bittrue.obs.log import Log
from bittrue.ops.contracts import OpTable
from bittrue.ops.dispatch import select
from bittrue.ops.threads import threads_of
from bittrue.spec.mtp import MtpProposer
from bittrue.spec.ngram import NgramProposer
from bittrue.spec.proposer import Proposer
from bittrue.text.grammar import DelayedGrammar, GrammarCompiler, GrammarState
from bittrue.text.tokenizer import Tokenizer

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A checkpoint in memory, and what follows from it alone: engines of several runs share one."""

    checkpoint: Checkpoint
    parameters: Parameters
    tokenizer: Tokenizer
    compiler: GrammarCompiler
    weight_version: str


@dataclass(frozen=True, slots=True)
class Assembly:
    """The parts of one engine, and the choices that were resolved while building them."""

    loaded: Loaded
    config: ModelConfig
    level: Level
    act: ActDtype
    runner: Runner
    layout: KVLayout
    budget: KVBudget
    num_pages: int
    num_slots: int
    pool: KVPool
    policy: CachePolicy
    tiers: TierStore | None
    row_store: RowStore | None
    canary: Canary | None
    proposer: Proposer | None
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

    def close(self) -> None:
        """Writes what the tiers still have to and gives their files back."""
        if self.tiers is not None:
            self.tiers.close()
        if self.row_store is not None:
            self.row_store.close()


def assemble(run: RunConfig, *, progress: Progress | None = None, verified: str = "") -> Assembly:
    """Loads the checkpoint, selects the ops, sizes and allocates the KV memory. A checkpoint whose stamp is
    ``verified`` is not searched for NaN again.

    Raises ConfigError, CheckpointError, BackendUnavailable.
    """
    if run.device != "cpu":
        raise BackendUnavailable(
            f"device {run.device!r} is not available: this build runs on the CPU; use --device cpu"
        )
    return assemble_on(load(Path(run.model), progress=progress, verified=verified), run)


def load(directory: Path, *, progress: Progress | None = None, verified: str = "") -> Loaded:
    """What ``assemble`` loads. Raises CheckpointError, ConfigError."""
    checkpoint = load_checkpoint(directory, verified=verified, progress=progress)
    tokenizer = Tokenizer.from_file(directory / "tokenizer.json")
    return Loaded(
        checkpoint=checkpoint,
        parameters=build_parameters(checkpoint.config, checkpoint_source(checkpoint)),
        tokenizer=tokenizer,
        compiler=GrammarCompiler(tokenizer, checkpoint.config.vocab_size),
        weight_version=weight_version(checkpoint),
    )


def assemble_on(loaded: Loaded, run: RunConfig) -> Assembly:
    """The parts of an engine for ``run`` over what is loaded already. Raises ConfigError,
    BackendUnavailable."""
    checkpoint = loaded.checkpoint
    config = checkpoint.config
    level, act = numerics(run, config)
    ops = select(run.backend, isa=None if run.isa == "auto" else run.isa, threads=run.threads or None)
    max_context = context_limit(run, config)
    log = Log(sys.stderr, run.log_level)
    layout = cache_layout(run, config)
    budget = layout.budget(run.max_running, max_snapshots(run, max_context))
    num_pages, num_slots = budget.fit(run.kv_memory, max_context=max_context)
    rows = row_store(run, layout, num_pages, log)
    model = DeepseekV4(config, loaded.parameters, ops, level=level, act=act)
    caches = allocate(
        layout,
        pages=num_pages,
        slots=num_slots,
        allocator=plain_memory if rows is None else rows.allocator(),
    )
    runner = Runner(model, caches)
    tiers = tier_store(run, layout, log)
    return Assembly(
        loaded=loaded,
        config=config,
        level=level,
        act=act,
        runner=runner,
        layout=layout,
        budget=budget,
        num_pages=num_pages,
        num_slots=num_slots,
        pool=KVPool(layout, caches) if tiers is None else KVPool(layout, caches, tiers.save),
        policy=CachePolicy(
            is_on=run.prefix_cache,
            snapshot_every=run.snapshot_every,
            num_layers=config.num_layers,
            window=config.window,
            max_draft=layout.max_draft,
        ),
        tiers=tiers,
        row_store=rows,
        canary=None if run.kv_canary == "off" else Canary(layout, caches, run.kv_canary, log),
        proposer=proposer(run, checkpoint, runner),
        max_context=max_context,
        tokenizer=loaded.tokenizer,
        compiler=loaded.compiler,
        weight_version=loaded.weight_version,
        ledger=memory_ledger(
            layout,
            config,
            act=act,
            pages=num_pages,
            slots=num_slots,
            weight_bytes=checkpoint.num_bytes,
            bounds=step_bounds(run, layout, max_context, threads_of(ops)),
            offload_hot=run.offload_hot,
        ),
        verified=checkpoint.stamp,
    )


def cache_layout(run: RunConfig, config: ModelConfig) -> KVLayout:
    """What pages and slots hold in this run."""
    level, act = numerics(run, config)
    return KVLayout.of(
        config,
        level=level,
        act=act,
        max_draft=0 if run.speculation == "off" else run.max_draft,
        num_draft_layers=1 if run.speculation == "mtp" else 0,
        offload=bool(run.offload_dir),
    )


def step_bounds(run: RunConfig, layout: KVLayout, max_context: int, threads: int) -> StepBounds:
    """The largest step this run can come to."""
    return StepBounds(
        max_step_tokens=run.max_step_tokens,
        max_running=run.max_running,
        max_context=max_context,
        threads=threads,
        max_draft=layout.max_draft,
    )


def max_snapshots(run: RunConfig, max_context: int) -> int:
    """State slots of use beside those that run: for ends of prompts and turns, and every ``snapshot_every``
    tokens."""
    if not run.prefix_cache:
        return 0
    grid = run.max_running * max_context // run.snapshot_every if run.snapshot_every else 0
    return 4 * run.max_running + grid


def row_store(run: RunConfig, layout: KVLayout, num_pages: int, log: Log) -> RowStore | None:
    """Where CSA rows live off memory, if they do. Raises ConfigError."""
    if not run.offload_dir:
        return None
    rows = OffloadFile.create(run.offload_dir, layout, pages=num_pages, hot_bytes=run.offload_hot)
    if rows.is_in_memory:
        log.warning(
            "offload_in_memory",
            directory=run.offload_dir,
            reason="its file system keeps files in memory: nothing is saved; give a directory on a disk",
        )
    return rows


def tier_store(run: RunConfig, layout: KVLayout, log: Log) -> TierStore | None:
    """The host and disk tiers, if there are any. Raises ConfigError."""
    if not run.prefix_cache or not (run.host_cache or run.cache_dir):
        return None
    disk = None
    if run.cache_dir:
        disk = DiskTier(run.cache_dir, budget_bytes=run.disk_cache, layout=layout.digest(), log=log)
    return TierStore(host_bytes=run.host_cache, disk=disk, log=log)


def proposer(run: RunConfig, checkpoint: Checkpoint, runner: Runner) -> Proposer | None:
    """What drafts, if anything does. Raises ConfigError for a checkpoint without the draft module."""
    match run.speculation:
        case "off":
            return None
        case "ngram":
            return NgramProposer()
        case "mtp":
            if "mtp.0.e_proj.weight" not in checkpoint.draft_tensors:
                raise ConfigError(
                    f"speculation mtp needs the draft module mtp.0, and {run.model} has none; "
                    "use --speculation ngram or off",
                    field="speculation",
                )
            parameters = build_mtp(checkpoint.config, checkpoint_source(checkpoint))
            return MtpProposer(Mtp(runner.model, parameters), runner.draft_caches[0])


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
    return TensorSource(checkpoint.tensor, lambda name: weight(checkpoint, name))


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
