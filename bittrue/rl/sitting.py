"""One sitting of a run: from the files in its directory to the files it leaves there."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bittrue.errors import ParityBroken, TrainingFailed
from bittrue.obs.log import Log
from bittrue.rl.assembly import Policy, open_policy
from bittrue.rl.certificate import write_certificate
from bittrue.rl.config import RlConfig
from bittrue.rl.environment import begin_sitting
from bittrue.rl.report import write_report
from bittrue.rl.run_files import CONFIG_FILE, SourceFacts, write_source
from bittrue.rl.tensorboard import TensorBoardWriter
from bittrue.train.checkpoint import write_file
from bittrue.train.metrics import METRICS_FILE, MetricsFile

Tell = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True)
class Ended:
    """How a sitting ended: after ``step`` steps of the run."""

    step: int
    is_finished: bool


def train_policy(
    config: RlConfig,
    out: Path,
    log: Log,
    *,
    export: Path | None = None,
    tensorboard: Path | None = None,
    controls: Sequence[Path] = (),
    should_stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda step, values: None,
) -> Ended:
    """Takes the run in ``out``, which exists and is held, to its last step or until ``should_stop``; ``tell``
    hears of every step, first of the one it goes on from. Certificate and report, with the curves of
    ``controls``, are written at the end of either, and where a step was refused; ``export``, the policy as a
    published checkpoint, at the end of the run."""
    with open_policy(config, out, log) as policy, MetricsFile(out / METRICS_FILE) as metrics:
        run = policy.run
        run.begin(metrics)  # settings of another run are refused before they are written
        write_file(out / CONFIG_FILE, config.model_dump_json(indent=1) + "\n")
        is_finished = run.step >= config.run.steps
        write_source(out, _source_of(policy, config))
        if not is_finished:
            begin_sitting(out, policy.trainer.ops, step=run.step)
        tell(run.step, {})
        try:
            with _told(out, tensorboard, tell, run.step) as told:
                is_finished = run.go(metrics, should_stop=should_stop, tell=told)
        except (ParityBroken, TrainingFailed):
            _write_pages(out, controls)
            raise
        if is_finished and export is not None:
            policy.export(export)
    _write_pages(out, controls)
    return Ended(run.step, is_finished)


def _write_pages(out: Path, controls: Sequence[Path]) -> None:
    write_certificate(out)
    write_report(out, controls)


@contextlib.contextmanager
def _told(
    out: Path, tensorboard: Path | None, tell: Tell, step: int
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Hears of every step; passes it on."""
    done = step

    def both(values: Mapping[str, float]) -> None:
        nonlocal done
        if writer is not None:
            writer.append(done, values)
        done += 1
        tell(done, values)

    with contextlib.ExitStack() as held:
        writer = None
        if tensorboard is not None:
            writer = held.enter_context(TensorBoardWriter(tensorboard, metrics=out / METRICS_FILE))
        yield both


def _source_of(policy: Policy, config: RlConfig) -> SourceFacts:
    parts = policy.parts
    return SourceFacts(
        digest=parts.source.digest(),
        seed=config.data.seed,
        isolation=parts.source.isolation(),
        held_out={name: source.digest() for name, source in parts.held_out.items()},
    )
