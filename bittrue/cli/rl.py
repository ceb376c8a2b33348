"""`bittrue rl RUN.toml`: trains a policy by verified rewards, or goes on with a run."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bittrue.cli.stop import EXIT_STOPPED, stop_on_signal
from bittrue.errors import ConfigError, UsageError
from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig
from bittrue.rl.ray_run import Sitting, train_on_ray
from bittrue.rl.report import REPORT_FILE
from bittrue.rl.sitting import Tell, train_policy
from bittrue.train.checkpoint import run_directory
from bittrue.train.progress import step_bar
from bittrue.train.run_file import load_run_file


def rl(
    run: Path,
    /,
    *,
    out: Annotated[Path | None, Parameter(help="Run directory, in place of run.out.")] = None,
    export: Annotated[Path | None, Parameter(help="Write the published checkpoint there at the end.")] = None,
    tensorboard: Annotated[Path | None, Parameter(help="Write the metrics there too.")] = None,
    control: Annotated[
        Sequence[Path],
        Parameter(help="Directories of runs whose curves the report shows beside.", negative=""),
    ] = (),
    ray: Annotated[
        str, Parameter(help="Address of a Ray cluster for loop.engine = ray; empty = one started here.")
    ] = "",
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
    _check_flags(config, run, export, ray)
    log = Log(sys.stderr)
    directory = Path(config.run.out)
    with (
        run_directory(directory),
        stop_on_signal(log) as should_stop,
        progress(log, config.run.steps) as tell,
    ):
        if config.loop.engine == "ray":
            sitting = Sitting(config.model_dump_json(), directory, export, tensorboard, tuple(control))
            ended = train_on_ray(sitting, log, address=ray, should_stop=should_stop, tell=tell)
        else:
            ended = train_policy(
                config,
                directory,
                log,
                export=export,
                tensorboard=tensorboard,
                controls=control,
                should_stop=should_stop,
                tell=tell,
            )
    if not ended.is_finished:
        log.info("stopped", step=ended.step, of=config.run.steps)
        return EXIT_STOPPED
    print(directory / REPORT_FILE if export is None else export)
    return 0


def _check_flags(config: RlConfig, run: Path, export: Path | None, ray: str) -> None:
    """Raises ConfigError, UsageError for what could not be done in the end."""
    if not config.run.out:
        fact = f"{run}: run.out is missing"
        raise ConfigError(f"{fact}; name the run directory, or give --out", field="run.out")
    if export is not None and export.exists() and (not export.is_dir() or any(export.iterdir())):
        raise UsageError(f"{export} exists and is not empty; choose another directory to export to")
    if ray and config.loop.engine != "ray":
        fact = f"--ray is the address of a cluster, and loop.engine is {config.loop.engine}"
        raise UsageError(f"{fact}; choose loop.engine = ray, or leave it out")


@contextlib.contextmanager
def progress(log: Log, steps: int) -> Iterator[Tell]:
    """A bar on a terminal, elsewhere a line of the log for every step."""
    bar = step_bar(log)
    task = bar.add_task("rl", total=steps, completed=0, shown="")

    def tell(step: int, values: Mapping[str, float]) -> None:
        if not values:  # the step it goes on from
            bar.update(task, completed=step)
            return
        parity, reward = values.get("parity/logprob_abs_diff/max"), values.get("reward/mean")
        shown = "no scores" if reward is None else f"reward {reward:.3f}"
        shown += "" if parity is None else f"  parity {parity:g}"
        bar.update(task, completed=step, shown=shown)
        evals = {name: round(value, 4) for name, value in values.items() if name.startswith("eval/")}
        if bar.disable:
            facts = {"reward": reward if reward is None else round(reward, 4), "parity": parity, **evals}
            log.info("step", n=f"{step}/{steps}", **facts)

    with bar:
        yield tell
