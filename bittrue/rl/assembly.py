"""From a run file to what runs: trainer, judges, engine and sources of one policy."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bittrue.config.model import ModelConfig
from bittrue.config.run import RunConfig
from bittrue.engine.engine import Engine
from bittrue.engine.link import Link, ProcessLink
from bittrue.errors import ConfigError
from bittrue.obs.log import Log
from bittrue.ops.dispatch import describe, select
from bittrue.ops.threads import set_threads
from bittrue.rl.config import RlConfig
from bittrue.rl.engine_group import EngineGroup
from bittrue.rl.learner import Judges, Learner
from bittrue.rl.loop import PolicyParts, PolicyRun, checkpoints_of
from bittrue.rl.ray_link import RayLink
from bittrue.rl.remote_engine import RemoteEngine
from bittrue.rl.rollout import RolloutEngine
from bittrue.rl.sources import open_sources
from bittrue.rl.teachers import Teacher
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import Origin, open_origin, origin_of
from bittrue.train.checkpoint import write_file
from bittrue.train.config import ModelSection
from bittrue.train.heap import keep_freed_memory
from bittrue.train.trainer import Trainer

_FIRST_WEIGHTS = "policy-0"
_MAX_ASKED = 1 << 20  # answers under way: the loop bounds them


@dataclass(frozen=True, slots=True)
class Policy:
    """A run with what it trains."""

    run: PolicyRun
    parts: PolicyParts
    origin: Origin

    @property
    def trainer(self) -> Trainer:
        return self.parts.learner.trainer

    @property
    def engine(self) -> RolloutEngine:
        return self.parts.engine

    def export(self, directory: Path) -> Path:
        """Writes the published checkpoint of the policy as it is now."""
        return self.trainer.export(directory, self.origin.raw, self.origin.files)


@dataclass(frozen=True, slots=True)
class Side:
    """The side that trains, with what its step depends on."""

    learner: Learner
    origin: Origin
    threads: int

    def facts(self, config: RlConfig) -> dict[str, object]:
        """What a checkpoint of the run says of it."""
        return {"identity": config.identity(), "config": dict(self.origin.raw), "threads": self.threads}


@contextlib.contextmanager
def open_policy(config: RlConfig, out: Path, log: Log) -> Iterator[Policy]:
    """The run of ``config`` in the directory ``out``, which exists. Trainer and engine have weights of their
    own wherever they are, and the engine's are published to it before every step."""
    side = open_side(config, out, log)
    for name, content in side.origin.files.items():  # so that the run goes on without what it started from
        write_file(out / name, content.decode())
    engine = _engine(config, out / _FIRST_WEIGHTS, side.threads, log)
    try:
        parts = _parts(config, side, engine, log)
        with contextlib.closing(parts.source):
            yield Policy(PolicyRun(config, out, parts, log), parts, side.origin)
    finally:
        engine.close()


def open_side(config: RlConfig, out: Path, log: Log) -> Side:
    """The trainer of the run in ``out``, at its first weights, and the judges of its tokens. What the run
    started from is copied there, so that the reference stays when the start is gone."""
    section = ModelSection.model_validate({"start": config.model.start, "draft": config.model.draft})
    origin = origin_of(section, checkpoints_of(config, out))
    threads = config.run.threads or os.cpu_count() or 1
    trainer = _trainer(config, origin, threads, log)
    first = out / _FIRST_WEIGHTS
    if not first.is_dir():
        trainer.export(first, origin.raw, origin.files)
    reference = None
    if config.policy.reference_kl:
        reference = _judge(config, first, trainer)
    teachers = []
    for name, given in config.distill.teachers.items():
        judge = _judge(config, Path(given.model), trainer)
        if judge.masters.config.vocab_size != trainer.masters.config.vocab_size:
            fact = f"teacher {name}: {given.model} has another vocabulary than {config.model.start}"
            raise ConfigError(f"{fact}; choose a teacher of the same tokens", field="distill.teachers")
        teachers.append(Teacher(name, judge, given.weight, tuple(given.tasks)))
    return Side(Learner(config, trainer, Judges(reference, teachers)), origin, threads)


def _trainer(config: RlConfig, origin: Origin, threads: int, log: Log) -> Trainer:
    keep_freed_memory()
    ops = select("cpu")
    set_threads(ops, threads)
    log.info("training", ops=describe(ops), start=config.model.start, parity=config.policy.parity)
    model = ModelConfig.from_dict(origin.raw)
    return Trainer(
        origin.masters(model),
        ops,
        level=model.default_level,
        act=model.default_act,
        micro_tokens=config.run.micro_tokens,
    )


def _judge(config: RlConfig, checkpoint: Path, trainer: Trainer) -> Trainer:
    """A model that is only read."""
    origin = open_origin(ModelSection.model_validate({"start": str(checkpoint), "draft": "none"}))
    model = ModelConfig.from_dict(origin.raw)
    masters = origin.masters(model)
    for leaf in masters.named.values():
        leaf.requires_grad_(False)
    return Trainer(
        masters,
        trainer.ops,
        level=model.default_level,
        act=model.default_act,
        micro_tokens=config.run.micro_tokens,
    )


def _engine(config: RlConfig, first: Path, threads: int, log: Log) -> RolloutEngine:
    """Its weights are published before every step; what it starts with is only their shape."""
    rollout, loop = config.rollout, config.loop
    knobs = {
        "model": str(first),
        "threads": threads,
        "kv_memory": rollout.kv_memory,
        "max_running": rollout.max_running,
        "max_step_tokens": rollout.max_step_tokens,
        "max_queue": _MAX_ASKED,
        "speculation": rollout.speculation,
        "log_level": "warning",
    }
    run = RunConfig.model_validate(knobs)
    if loop.engine == "inside":
        return Engine(first, run)
    engines: list[RemoteEngine] = []
    try:
        for _ in range(loop.engines):
            engines.append(RemoteEngine(_link(loop.engine, run), log=log))
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return EngineGroup(engines) if len(engines) > 1 else engines[0]


def _link(kind: str, run: RunConfig) -> Link:
    return ProcessLink.start(run) if kind == "process" else RayLink(run)


def _parts(config: RlConfig, side: Side, engine: RolloutEngine, log: Log) -> PolicyParts:
    tokenizer = Tokenizer(side.origin.files["tokenizer.json"], source="tokenizer.json")
    context = int(side.origin.raw["max_position_embeddings"])
    context = engine.max_context if isinstance(engine, Engine) else context
    source, held_out = open_sources(config, tokenizer, log, max_context=context)
    return PolicyParts(side.learner, engine, source, held_out, side.origin.raw, side.threads)
