"""A training run that takes seconds: the real trainer on three small layers, and what tests do with it."""

import contextlib
import io
import resource
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from bittrue.obs.log import Log
from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_threads
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.assembly import Origin, make_trainer, open_origin, open_source_of
from bittrue.train.checkpoint import TENSORS_FILE, write_file
from bittrue.train.config import TrainConfig, train_config
from bittrue.train.crew import Crew
from bittrue.train.data import DocumentSource
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.metrics import METRICS_FILE, MetricsFile, read_metrics
from bittrue.train.run import Gradients, Parts, Run, Weights
from bittrue.train.trainer import Routes, StepStats

THREADS = 1
MODEL = {
    "preset": "tiny",
    "precision": "fp4",
    "config": {"num_hidden_layers": 3, "num_hash_layers": 1, "vocab_size": 640, "hc_sinkhorn_iters": 2},
}


def settings(**sections: Mapping[str, Any]) -> TrainConfig:
    """The run file of a small run; ``sections`` change single keys."""
    values: dict[str, dict[str, Any]] = {
        "model": dict(MODEL),
        "data": {"tasks": {"sort": 1.0}, "max_tokens": 256},
        "optim": {"lr": 0.01},
        "schedule": {"warmup_steps": 2},
        "run": {"steps": 6, "tokens_per_step": 60, "checkpoint_every": 2, "threads": THREADS},
    }
    for section, changes in sections.items():
        values.setdefault(section, {}).update(changes)
    return train_config(values)


class Steps:
    """Documents of the small run, and the step they were asked for last."""

    def __init__(self, source: DocumentSource) -> None:
        self._source = source
        self.last = -1

    def documents(self, step: int) -> list[Document]:
        self.last = step
        return self._source.documents(step)


class Watched:
    """A trainer that passes everything on; tests override what they plant."""

    def __init__(self, inner: Gradients, source: Steps) -> None:
        self.inner, self.source = inner, source

    @property
    def is_dense(self) -> bool:
        return self.inner.is_dense

    @is_dense.setter
    def is_dense(self, value: bool) -> None:
        self.inner.is_dense = value

    @property
    def crew(self) -> Crew:
        return self.inner.crew

    @property
    def masters(self) -> Weights:
        return self.inner.masters

    def backward(
        self, documents: Sequence[Document], weights: LossWeights, *, routes: Routes | None = None
    ) -> StepStats:
        return self.inner.backward(documents, weights, routes=routes)

    def routes(self, documents: Sequence[Document]) -> Routes:
        return self.inner.routes(documents)

    def update_biases(self, loads: Mapping[str, Tensor], speed: float) -> None:
        self.inner.update_biases(loads, speed)

    def publish(self) -> None:
        self.inner.publish()

    def export(
        self, directory: str | Path, raw_config: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> Path:
        return self.inner.export(directory, raw_config, files)


class SmallRun:
    """One process's part of a run in ``directory``: begun, and taken on by ``go``."""

    def __init__(
        self, config: TrainConfig, directory: Path, *, plant: type[Watched] = Watched, threads: int = THREADS
    ) -> None:
        self.config, self.directory = config, directory
        self.told = io.StringIO()
        self.origin: Origin = open_origin(config.model)
        ops = select(config.run.backend)
        set_threads(ops, THREADS)
        tokenizer = Tokenizer(self.origin.files["tokenizer.json"], source="tokenizer.json")
        self.source = Steps(
            open_source_of(config.data, tokenizer, tokens_per_step=config.run.tokens_per_step)
        )

        def trainer(is_quantised: bool) -> Gradients:
            return plant(make_trainer(self.origin, ops, config.run, is_quantised=is_quantised), self.source)

        parts = Parts(trainer, self.source, self.origin.raw, "", threads)
        self.run = Run(config, directory, parts, Log(self.told))
        with MetricsFile(directory / METRICS_FILE) as metrics:
            self.run.begin(metrics)
        for name, content in self.origin.files.items():
            write_file(directory / name, content.decode())

    def go(self, steps: int | None = None, *, stop_at: int | None = None) -> bool:
        def should_stop() -> bool:
            return stop_at is not None and self.run.step >= stop_at

        with MetricsFile(self.directory / METRICS_FILE) as metrics:
            return self.run.go(steps or self.config.run.steps, metrics, should_stop=should_stop)


def final_bytes(directory: Path, step: int) -> bytes:
    """Every tensor of a checkpoint: weights, optimiser, routes."""
    return (directory / f"step-{step:06d}" / TENSORS_FILE).read_bytes()


def untimed_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics without what a clock measured."""
    return [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in read_metrics(directory / METRICS_FILE)
    ]


@contextlib.contextmanager
def no_room(num_bytes: int) -> Iterator[None]:
    """Files cannot grow beyond ``num_bytes``, as on a disk that is nearly full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
