"""A training run: step after step from the newest checkpoint to the last step, whatever comes between."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from bittrue.errors import CheckpointError, TrainingFailed
from bittrue.obs.log import Log
from bittrue.train.checkpoint import Checkpoints, Snapshot, check_same
from bittrue.train.config import OptimSection, TrainConfig
from bittrue.train.crew import Crew
from bittrue.train.data import DocumentSource
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.metrics import MetricsFile, step_values
from bittrue.train.optim import Optimiser, OptimSettings, clip_gradients, first_bad_gradient
from bittrue.train.schedule import Phase, phase_at
from bittrue.train.spike import Anticipation, SpikeDetector
from bittrue.train.trainer import Routes, StepStats

_TERMS = ("main", "mtp", "index", "balance")
_COMPARED = ("config", "identity", "data", "threads")  # facts of a checkpoint


class Weights(Protocol):
    """What a run reads and writes of ``Masters``."""

    @property
    def named(self) -> Mapping[str, Tensor]: ...
    @property
    def biases(self) -> Mapping[str, Tensor]: ...
    def load(self, named: Mapping[str, Tensor], biases: Mapping[str, Tensor]) -> None: ...


class Gradients(Protocol):
    """What a run asks of ``Trainer``."""

    is_dense: bool

    @property
    def crew(self) -> Crew: ...
    @property
    def masters(self) -> Weights: ...
    def backward(
        self, documents: Sequence[Document], weights: LossWeights, *, routes: Routes | None = None
    ) -> StepStats: ...
    def routes(self, documents: Sequence[Document]) -> Routes: ...
    def update_biases(self, loads: Mapping[str, Tensor], speed: float) -> None: ...
    def publish(self) -> None: ...
    def export(
        self, directory: str | Path, raw_config: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> Path: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of. ``make_trainer`` gives first weights, in the published formats or before that;
    ``model`` is the config.json, ``data`` identifies a file the documents come from, ``threads`` is how many
    the ops use."""

    make_trainer: Callable[[bool], Gradients]
    source: DocumentSource
    model: Mapping[str, Any]
    data: str
    threads: int


@dataclass(frozen=True, slots=True)
class Progress:
    """What is told after every step."""

    step: int
    values: Mapping[str, Any]  # the line of the metrics
    is_anticipating: bool


class Run:
    """One run in one directory. ``begin`` finds where it stands, ``go`` takes it on."""

    def __init__(self, config: TrainConfig, directory: Path, parts: Parts, log: Log) -> None:
        self._config, self._parts, self._log = config, parts, log
        self._checkpoints = Checkpoints(directory, every=config.run.checkpoint_every, keep=config.run.keep)
        self._detector = SpikeDetector(config.spike)
        self._anticipation = Anticipation(config.spike.delay)
        self._spikes: list[dict[str, Any]] = []
        self.step = 0  # steps done
        self._saved = -1  # the step whose checkpoint this process wrote or read
        self._is_quantised = self._phase(0).is_quantised
        self.trainer = parts.make_trainer(self._is_quantised)
        self._optimiser = self._new_optimiser()

    # ---- what a run does ---------------------------------------------------------------------------------

    def begin(self, metrics: MetricsFile) -> None:
        """Goes on from the newest good checkpoint, or writes the first. Raises CheckpointError where the
        checkpoints are another run's."""
        self._checkpoints.clean()
        found = self._checkpoints.newest(warn=lambda fact: self._log.warning("checkpoint", problem=fact))
        if found is None:
            if not metrics.is_empty:
                fact = "there are metrics of a run, but no checkpoint; choose another run directory"
                raise CheckpointError(f"{metrics.path.parent}: {fact}", file=str(metrics.path))
            self.save(metrics)
            return
        self._check(found)
        self._restore(found)
        metrics.cut(self.step)
        self._log.info("resumed", step=self.step, checkpoint=found.path)

    def go(
        self,
        steps: int,
        metrics: MetricsFile,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        tell: Callable[[Progress], None] = lambda progress: None,
    ) -> bool:
        """Trains until ``steps`` steps are done, or ``should_stop``; a checkpoint is written at the end of
        either. Whether the last step was reached. Raises TrainingFailed."""
        while self.step < steps and not should_stop():
            self._one_step(metrics, tell)
            if self.step % self._config.run.checkpoint_every == 0:
                self.save(metrics)
        if self.step != self._saved:  # a directory of that name may be one that could not be read
            self.save(metrics)
        return self.step >= steps

    def save(self, metrics: MetricsFile) -> Path:
        """Writes a checkpoint of this moment."""
        metrics.sync()
        parts = {
            "master": self.trainer.masters.named,
            "bias": self.trainer.masters.biases,
            "optim": self._optimiser.state(),
            "route": self._anticipation.tensors(),
        }
        tensors = {f"{part}.{name}": t for part, named in parts.items() for name, t in named.items()}
        facts = {
            "identity": self._config.identity(),
            "digest": self._config.digest,
            "config": dict(self._parts.model),
            "data": self._parts.data,
            "threads": self._parts.threads,
            "detector": self._detector.state(),
            "anticipate_until": self._anticipation.until,
            "spikes": self._spikes,
        }
        path = self._checkpoints.save(self.step, tensors, facts)
        self._saved = self.step
        return path

    def export(self, directory: Path, files: Mapping[str, bytes]) -> Path:
        """Writes the published checkpoint, with ``files`` beside it. Raises CheckpointError where that cannot
        be done; the run's own checkpoints are kept."""
        self._read_formats(is_quantised=True)
        try:
            return self.trainer.export(directory, self._parts.model, files)
        except OSError as error:
            fact = f"cannot write {directory}: {error.strerror or error}; the run is kept"
            remedy = "make room, or choose another directory, and run the same command again"
            raise CheckpointError(f"{fact}; {remedy}", file=str(directory)) from error

    @property
    def spikes(self) -> Sequence[Mapping[str, Any]]:
        """Every rollback so far: its step, its reason and the step gone back to."""
        return self._spikes

    # ---- one step ----------------------------------------------------------------------------------------

    def _one_step(self, metrics: MetricsFile, tell: Callable[[Progress], None]) -> None:
        began_s = time.perf_counter()
        step, phase = self.step, self._phase(self.step)
        self._enter(phase)
        routes = self._anticipation.routes(step, self._choose)
        named = self.trainer.masters.named
        for parameter in named.values():
            parameter.grad = None
        weights = LossWeights(
            phase.mtp_weight, self._config.loss.mtp_depth, phase.index_weight, phase.balance_weight
        )
        stats = self.trainer.backward(self._parts.source.documents(step), weights, routes=routes)
        self._check_losses(stats)
        norm = clip_gradients(named, self._config.optim.clip)
        self._check_gradients(norm)
        is_anticipating = self._anticipation.is_on(step)
        if not is_anticipating and (reason := self._detector.reason(stats.main, norm)) is not None:
            self._roll_back(reason, metrics)
            return
        self._detector.note(stats.main, norm)
        self._optimiser.step(phase.lr)
        self.trainer.update_biases(stats.loads, phase.bias_speed)
        self.trainer.publish()
        self.step += 1
        values = step_values(step, stats, phase, norm, time.perf_counter() - began_s)
        metrics.append({**values, "anticipating": is_anticipating})
        tell(Progress(self.step, values, is_anticipating))

    def _choose(self, step: int) -> Routes:
        return self.trainer.routes(self._parts.source.documents(step))

    def _phase(self, step: int) -> Phase:
        return phase_at(step, self._config.optim, self._config.schedule, self._config.loss)

    def _enter(self, phase: Phase) -> None:
        """Has the trainer read what the phase says. Formats change only between trainers: the weights and
        the optimiser move over to another."""
        self._read_formats(is_quantised=phase.is_quantised)
        if phase.is_dense != self.trainer.is_dense:
            self.trainer.is_dense = phase.is_dense
            self._log.info("attention", step=self.step, dense=phase.is_dense)

    def _read_formats(self, *, is_quantised: bool) -> None:
        if is_quantised == self._is_quantised:
            return
        masters, state = self.trainer.masters, self._optimiser.state()
        self._new_trainer(is_quantised)
        self.trainer.masters.load(masters.named, masters.biases)
        self._optimiser.load_state(state)
        self._log.info("formats", step=self.step, published=is_quantised)

    def _check_losses(self, stats: StepStats) -> None:
        for term in _TERMS:
            value = getattr(stats, term)
            if not math.isfinite(value):
                raise self._failed(f"the {term} loss is {value}", term)

    def _check_gradients(self, norm: float) -> None:
        if not math.isfinite(norm):
            name = first_bad_gradient(self.trainer.masters.named)
            what = f"the gradient of {name}" if name else "the sum of squares of the gradients"
            raise self._failed(f"{what} is not finite", name or "norm")

    def _failed(self, fact: str, term: str) -> TrainingFailed:
        steps = self._checkpoints.steps()
        last = self._checkpoints.path(steps[-1]) if steps else "none"
        return TrainingFailed(
            f"step {self.step}: {fact}; the last good checkpoint is {last}; lower optim.lr or optim.clip, or "
            "watch for spikes, in a new run",
            step=self.step,
            term=term,
        )

    # ---- going back --------------------------------------------------------------------------------------

    def _roll_back(self, reason: str, metrics: MetricsFile) -> None:
        """Goes back to the newest checkpoint that was due at least ``margin`` steps ago, and anticipates.

        Which one that is depends on the step alone, not on checkpoints that a signal left: a run that was
        stopped and resumed goes back to the same.
        """
        spike, settings = self.step, self._config.spike
        every = self._config.run.checkpoint_every
        target = max(0, spike - settings.margin) // every * every
        spikes = [*self._spikes, {"step": spike, "reason": reason, "back_to": target}]
        self._log.warning("spike", step=spike, reason=reason, back_to=target, delay=settings.delay)
        self._restore(self._checkpoints.load(target))
        self._spikes = spikes
        self._anticipation.switch_on(spike + settings.steps)
        self._checkpoints.drop_after(target)
        metrics.cut(target)

    def _check(self, found: Snapshot) -> None:
        other = "choose another directory, or the run file it was begun with"
        saved = found.facts
        absent = next((name for name in _COMPARED if name not in saved), None)
        if absent is not None:
            raise CheckpointError(f"{found.path} lacks {absent!r}; {other}", file=str(found.path))
        check_same(found.path, saved["config"], self._parts.model, what="model", remedy=other)
        identity = self._config.identity()
        check_same(found.path, saved["identity"], identity, what="run file", remedy=other)
        data = ({"sha256": saved["data"]}, {"sha256": self._parts.data})
        check_same(found.path, *data, what="data file", remedy="restore the file that data.jsonl names")
        if not self._config.run.any_threads:
            threads = "sums may be rounded otherwise; set run.threads to that, or run.any_threads = true"
            before, now = {"threads": saved["threads"]}, {"threads": self._parts.threads}
            check_same(found.path, before, now, what="number of threads", remedy=threads)

    def _restore(self, found: Snapshot) -> None:
        quantised = self._phase(found.step).is_quantised
        if quantised != self._is_quantised:
            self._new_trainer(quantised)
        masters = self.trainer.masters
        for part, own in (("master", masters.named), ("bias", masters.biases)):
            saved = {name: list(t.shape) for name, t in found.part(part).items()}
            present = {name: list(t.shape) for name, t in own.items()}
            check_same(found.path, saved, present, what="model", remedy="choose another directory")
        masters.load(found.part("master"), found.part("bias"))
        self._optimiser.load_state(found.part("optim"))
        try:
            self._detector.load(found.facts["detector"])
            self._anticipation.load(found.facts["anticipate_until"], found.part("route"))
            self._spikes = list(found.facts["spikes"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"{found.path} lacks {error}", file=str(found.path)) from error
        self.step = self._saved = found.step

    def _new_trainer(self, is_quantised: bool) -> None:
        self._is_quantised = is_quantised
        self.trainer = self._parts.make_trainer(is_quantised)
        self._optimiser = self._new_optimiser()

    def _new_optimiser(self) -> Optimiser:
        settings = optim_settings(self._config.optim)
        return Optimiser(self.trainer.masters.named, settings, spread=self.trainer.crew.map)


def optim_settings(section: OptimSection) -> OptimSettings:
    """The section's numbers, without schedule and clipping."""
    return OptimSettings(
        momentum=section.momentum,
        beta1=section.beta1,
        beta2=section.beta2,
        eps=section.eps,
        weight_decay=section.weight_decay,
        is_coarse=section.products == "bf16",
        matrices=section.matrices,
    )
