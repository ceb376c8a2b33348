"""From a run file to what runs: trainer, engine and problems of one policy."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bittrue.config.model import ModelConfig
from bittrue.engine.engine import Engine
from bittrue.obs.log import Log
from bittrue.ops.dispatch import describe, select
from bittrue.ops.threads import set_threads
from bittrue.rl.config import RlConfig
from bittrue.rl.loop import PolicyParts, PolicyRun
from bittrue.rl.problems import Problems
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import Origin, origin_of
from bittrue.train.checkpoint import Checkpoints, write_file
from bittrue.train.config import ModelSection
from bittrue.train.trainer import Trainer

_FIRST_WEIGHTS = "policy-0"


@dataclass(frozen=True, slots=True)
class Policy:
    """A run with what it trains."""

    run: PolicyRun
    trainer: Trainer
    engine: Engine
    origin: Origin

    def export(self, directory: Path) -> Path:
        """Writes the published checkpoint of the policy as it is now."""
        return self.trainer.export(directory, self.origin.raw, self.origin.files)


@contextlib.contextmanager
def open_policy(config: RlConfig, out: Path, log: Log) -> Iterator[Policy]:
    """The run of ``config`` in the directory ``out``, which exists. Trainer and engine are two sides in one
    process: each has its own weights, and the engine's are published to it before every step."""
    section = ModelSection.model_validate({"start": config.model.start, "draft": config.model.draft})
    checkpoints = Checkpoints(out, every=config.run.checkpoint_every, keep=config.run.keep)
    origin = origin_of(section, checkpoints)
    for name, content in origin.files.items():  # so that the run goes on without what it started from
        write_file(out / name, content.decode())
    threads = config.run.threads or os.cpu_count() or 1
    trainer = _trainer(config, origin, threads, log)
    engine = Engine(
        _first_weights(trainer, origin, out),
        threads=threads,
        kv_memory=config.rollout.kv_memory,
        max_running=config.rollout.max_running,
        speculation=config.rollout.speculation,
        log_level="warning",
    )
    try:
        parts = _parts(config, origin, trainer, engine, threads)
        yield Policy(PolicyRun(config, out, parts, log), trainer, engine, origin)
    finally:
        engine.close()


def _trainer(config: RlConfig, origin: Origin, threads: int, log: Log) -> Trainer:
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


def _first_weights(trainer: Trainer, origin: Origin, out: Path) -> Path:
    """A checkpoint for the engine to begin with: its weights are published before every step."""
    directory = out / _FIRST_WEIGHTS
    if not directory.is_dir():
        trainer.export(directory, origin.raw, origin.files)
    return directory


def _parts(config: RlConfig, origin: Origin, trainer: Trainer, engine: Engine, threads: int) -> PolicyParts:
    tokenizer = Tokenizer(origin.files["tokenizer.json"], source="tokenizer.json")
    data = config.data
    held_out = {
        name: Problems(tokenizer, {name: 1.0}, seed=data.seed, split="validation") for name in data.tasks
    }
    problems = Problems(tokenizer, data.tasks, seed=data.seed)
    return PolicyParts(trainer, engine, problems, held_out, origin.raw, threads)
