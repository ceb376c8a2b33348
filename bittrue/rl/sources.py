"""From a run file to its sources: what is trained on, and what is held out, by task."""

import math
from functools import partial
from pathlib import Path

from bittrue.config.run import parse_bytes
from bittrue.errors import ConfigError
from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig, VerifierSection
from bittrue.rl.problems import Problems
from bittrue.rl.prompt_file import PromptReader, Row, read_files
from bittrue.rl.prompts import Prompts
from bittrue.rl.ray_link import RayPool
from bittrue.rl.rewards import Control
from bittrue.rl.source import Source
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Judging, Pool
from bittrue.text.tokenizer import Tokenizer


def open_sources(
    config: RlConfig, tokenizer: Tokenizer, log: Log, *, max_context: int
) -> tuple[Source, dict[str, Source]]:
    """The source of training and those held out, by task; closing the first ends the verifiers of all.
    Controls change the scores of training alone. ``max_context``: tokens of a prompt and its answer.

    Raises ConfigError, UsageError that names a line of a file, VerifierUnavailable.
    """
    open_ = _prompts if config.data.prompts else _problems
    source, held_out = open_(config, tokenizer, log, max_context)
    if config.data.reward != "verifier":
        source = Control(source, config.data.reward, seed=config.data.seed)
    return source, held_out


def _problems(
    config: RlConfig, tokenizer: Tokenizer, log: Log, max_context: int
) -> tuple[Source, dict[str, Source]]:
    data = config.data
    held_out: dict[str, Source] = {
        name: Problems(tokenizer, {name: 1.0}, seed=data.seed, split="validation") for name in data.tasks
    }
    return Problems(tokenizer, data.tasks, seed=data.seed), held_out


def _prompts(
    config: RlConfig, tokenizer: Tokenizer, log: Log, max_context: int
) -> tuple[Source, dict[str, Source]]:
    data = config.data
    longest = max_context - config.rollout.max_tokens
    reader = PromptReader(tokenizer, thinking=data.thinking, verifier=data.verifier, max_tokens=longest)
    files = read_files(reader, Path(data.prompts), Path(data.held_out) if data.held_out else None)
    if config.run.eval_every and not files.held_out:
        raise ConfigError(
            f"none of the {len(files.train)} prompts of {data.prompts} is held out by its hash; give more, "
            "name data.held_out, or set run.eval_every = 0",
            field="data.held_out",
        )
    by_task: dict[str, list[Row]] = {}
    for row in files.held_out:
        by_task.setdefault(row.task, []).append(row)
    pool = _pool_of(config, log)
    try:
        source = Prompts(files.train, pool, tokenizer, seed=data.seed, repeats=True)
        held_out = {
            task: Prompts(rows, pool, tokenizer, seed=data.seed, repeats=False)
            for task, rows in sorted(by_task.items())
        }
        for each in (source, *held_out.values()):
            each.check_verifiers()
    except BaseException:
        pool.close()
        raise
    log.info(
        "verifiers",
        workers=config.verifiers.workers,
        isolation=pool.isolation.describe(),
        prompts=len(files.train),
        held_out=len(files.held_out),
    )
    return source, dict(held_out)


def _pool_of(config: RlConfig, log: Log) -> Judging:
    """Of this process, or an actor of Ray where the engines are."""
    if config.loop.engine == "ray":
        return RayPool(partial(open_pool, config.verifiers), log=log)
    return open_pool(config.verifiers)


def open_pool(section: VerifierSection) -> Pool:
    """The workers of a run. Raises ConfigError, VerifierUnavailable."""
    folders = [Path(folder).resolve() for folder in section.python_path]
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise ConfigError(
            f"verifiers.python_path names {missing}, which is no folder", field="verifiers.python_path"
        )
    limits = Limits(
        seconds=section.seconds,
        cpu_seconds=math.ceil(section.seconds),
        memory_bytes=parse_bytes(section.memory),
    )
    return Pool(
        num_workers=section.workers,
        limits=limits,
        require_sandbox=section.require_sandbox,
        python_path=[str(folder) for folder in folders],
    )
