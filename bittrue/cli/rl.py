"""`bittrue rl RUN.toml`: trains a policy by verified rewards, or goes on with a run."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bittrue.cli.stop import EXIT_STOPPED, stop_on_signal
from bittrue.errors import ConfigError, UsageError
from bittrue.obs.log import Log
from bittrue.rl.assembly import open_policy
from bittrue.rl.config import RlConfig
from bittrue.rl.run_files import CONFIG_FILE
from bittrue.train.checkpoint import run_directory, write_file
from bittrue.train.metrics import METRICS_FILE, MetricsFile
from bittrue.train.progress import step_bar
from bittrue.train.run_file import load_run_file


def rl(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Run directory, in place of run.out.")] = None,
    export: Annotated[Path | None, Parameter(help="Write the published checkpoint there at the end.")] = None,
    require_sandbox: Annotated[
        bool, Parameter(help="Refuse to run verifiers that only limits hold.", negative="")
    ] = False,
) -> int:
    """Train a policy as the run file RUN says: sample, score by checkers, compare what the trainer computes
    with what was sampled, step, publish. A run directory that has checkpoints is gone on with.

    SIGTERM or Ctrl-C ends after the running step with a checkpoint, exit code 130; the same command goes on.

    Parameters
    ----------
    run:
        TOML file: model, tasks, rollouts, policy, optimiser (docs/rl.md).
    """
    overrides: dict[str, object] = {} if out is None else {"run.out": str(out)}
    if require_sandbox:
        overrides["verifiers.require_sandbox"] = True
    config = load_run_file(RlConfig, run, overrides)
    if not config.run.out:
        raise ConfigError(
            f"{run}: run.out is missing; name the run directory, or give --out", field="run.out"
        )
    if export is not None and export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UsageError(f"{export} exists and is not empty; choose another directory to export to")
    log = Log(sys.stderr)
    with run_directory(Path(config.run.out)), stop_on_signal(log) as should_stop:
        return _rl(config, Path(config.run.out), export, log, should_stop)


def _rl(config: RlConfig, out: Path, export: Path | None, log: Log, should_stop: Callable[[], bool]) -> int:
    write_file(out / CONFIG_FILE, config.model_dump_json(indent=1) + "\n")
    with open_policy(config, out, log) as policy, MetricsFile(out / METRICS_FILE) as metrics:
        policy.run.begin(metrics)
        with _bar(log, policy.run.step, config.run.steps) as tell:
            is_finished = policy.run.go(metrics, should_stop=should_stop, tell=tell)
        if is_finished:
            print(out if export is None else policy.export(export))
            return 0
    log.info("stopped", step=policy.run.step, of=config.run.steps)
    return EXIT_STOPPED


@contextlib.contextmanager
def _bar(log: Log, step: int, steps: int) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """A bar on a terminal, elsewhere a line of the log for every step."""
    bar = step_bar(log)
    task = bar.add_task("rl", total=steps, completed=step, shown="")
    done = step

    def tell(values: Mapping[str, float]) -> None:
        nonlocal done
        done += 1
        parity = values.get("parity/logprob_abs_diff/max")
        shown = f"reward {values['reward/mean']:.3f}"
        shown += "" if parity is None else f"  parity {parity:g}"
        bar.update(task, completed=done, shown=shown)
        evals = {name: round(value, 4) for name, value in values.items() if name.startswith("eval/")}
        if bar.disable:
            facts = {"reward": round(values["reward/mean"], 4), "parity": parity, **evals}
            log.info("step", n=f"{done}/{steps}", **facts)

    with bar:
        yield tell
