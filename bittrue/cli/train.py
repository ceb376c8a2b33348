"""`bittrue train RUN.toml`: trains a model, or goes on where a run in the same directory stopped."""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bittrue.cli.stop import EXIT_STOPPED, stop_on_signal
from bittrue.errors import ConfigError, TrainingFailed, UsageError
from bittrue.obs.log import Log
from bittrue.ops.contracts import OpTable
from bittrue.ops.dispatch import describe, select
from bittrue.ops.threads import set_threads
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import Origin, make_trainer, open_source_of, origin_of
from bittrue.train.checkpoint import Checkpoints, run_directory, write_file
from bittrue.train.config import TrainConfig, load_train_config
from bittrue.train.heap import keep_freed_memory
from bittrue.train.metrics import METRICS_FILE, MetricsFile
from bittrue.train.progress import TrainProgress
from bittrue.train.report import write_report
from bittrue.train.run import Parts, Progress, Run

CONFIG_FILE = "run.json"
_REPORT_S = 120.0  # between reports of a run that goes on


def train(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Run directory, in place of run.out.")] = None,
    steps: Annotated[int | None, Parameter(help="Step at which the run ends, in place of run.steps.")] = None,
    export: Annotated[Path | None, Parameter(help="Write the published checkpoint there at the end.")] = None,
) -> int:
    """Train as the run file RUN says. A run directory that has checkpoints is gone on with.

    SIGTERM or Ctrl-C ends after the running step with a checkpoint, exit code 130; the same command goes on.

    Parameters
    ----------
    run:
        TOML file: model, data, optimiser, schedule, losses (docs/training.md).
    """
    given = {"run.out": None if out is None else str(out), "run.steps": steps}
    config = load_train_config(run, {name: value for name, value in given.items() if value is not None})
    if not config.run.out:
        raise ConfigError(
            f"{run}: run.out is missing; name the run directory, or give --out", field="run.out"
        )
    if export is not None and export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UsageError(f"{export} exists and is not empty; choose another directory to export to")
    log = Log(sys.stderr)
    with run_directory(Path(config.run.out)), stop_on_signal(log) as should_stop:
        return _train(config, Path(config.run.out), export, log, should_stop)


def _train(
    config: TrainConfig, out: Path, export: Path | None, log: Log, should_stop: Callable[[], bool]
) -> int:
    checkpoints = Checkpoints(out, every=config.run.checkpoint_every, keep=config.run.keep)
    origin = origin_of(config.model, checkpoints)
    keep_freed_memory()
    ops = select(config.run.backend)
    threads = config.run.threads or os.cpu_count() or 1
    set_threads(ops, threads)
    log.info("training", ops=describe(ops), out=out, digest=config.digest[:12])
    run = Run(config, out, _parts(config, origin, ops, threads), log)
    with MetricsFile(out / METRICS_FILE) as metrics:
        run.begin(metrics)
        write_file(out / CONFIG_FILE, config.model_dump_json(indent=1) + "\n")
        for name, content in origin.files.items():
            write_file(out / name, content.decode())
        steps = config.run.steps
        progress = TrainProgress(log, step=run.step, steps=steps, every=config.run.log_every)
        written_s = time.monotonic()

        def tell(now: Progress) -> None:
            nonlocal written_s
            progress(now)
            if time.monotonic() - written_s > _REPORT_S:
                write_report(out, config, origin.raw, run.spikes, threads=threads)
                written_s = time.monotonic()

        try:
            with progress:
                is_finished = run.go(steps, metrics, should_stop=should_stop, tell=tell)
        except TrainingFailed:
            write_report(out, config, origin.raw, run.spikes, threads=threads)
            raise
        write_report(out, config, origin.raw, run.spikes, threads=threads)
    if not is_finished:
        log.info("stopped", step=run.step, of=steps)
        return EXIT_STOPPED
    print(out if export is None else run.export(export, origin.files))
    return 0


def _parts(config: TrainConfig, origin: Origin, ops: OpTable, threads: int) -> Parts:
    tokenizer = Tokenizer(origin.files["tokenizer.json"], source="tokenizer.json")
    source = open_source_of(config.data, tokenizer, tokens_per_step=config.run.tokens_per_step)
    return Parts(
        make_trainer=lambda quantised: make_trainer(origin, ops, config.run, is_quantised=quantised),
        source=source,
        model=origin.raw,
        data=_digest(config.data.jsonl),
        threads=threads,
    )


def _digest(jsonl: str) -> str:
    return hashlib.sha256(Path(jsonl).read_bytes()).hexdigest() if jsonl else ""
