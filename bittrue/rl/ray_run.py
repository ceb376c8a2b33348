"""A run whose trainer is a Ray actor, as its engines and verifiers are: any of them may die."""

import os
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.engine.wire import Refused, error_of, refusal
from bittrue.errors import BittrueError, TrainingFailed
from bittrue.obs.log import Log
from bittrue.rl.config import RlConfig
from bittrue.rl.ray_link import import_ray
from bittrue.rl.sitting import Ended, Tell, train_policy

_LOOK_S = 0.25  # how often the trainer is asked how far it is
_GROUPS = {"run": 1, "look": 1}
_BESIDE_ENGINES = 2  # actors: trainer and verifiers
_STORE_BYTES = 256 << 20  # of a Ray that is started here: weights go by messages, not through its store


@dataclass(frozen=True, slots=True)
class Sitting:
    """What the trainer's actor is to do: ``train_policy``'s arguments, as far as they travel."""

    config: str  # RlConfig as JSON
    out: Path  # seen by all machines, as every path here
    export: Path | None = None
    tensorboard: Path | None = None
    controls: tuple[Path, ...] = ()


def train_on_ray(
    sitting: Sitting,
    log: Log,
    *,
    address: str = "",
    max_restarts: int = 5,
    should_stop: Callable[[], bool] = lambda: False,
    tell: Tell = lambda step, values: None,
    on_actor: Callable[[Any], None] = lambda actor: None,
) -> Ended:
    """``train_policy`` in an actor of the cluster at ``address``, or of one started here that ends with this
    call; the run directory is one that all machines see. A trainer that dies is started again and goes
    on from its newest checkpoint. ``on_actor`` hears of each actor.

    Raises what the run raises; TrainingFailed where the actor dies ``max_restarts`` times without a step."""
    ray = import_ray()
    is_own = not ray.is_initialized()
    if is_own:
        _init(ray, address, RlConfig.model_validate_json(sitting.config).loop.engines)
    try:
        host = ray.remote(num_cpus=1, max_restarts=0, concurrency_groups=_GROUPS)(_TrainerHost)
        fruitless = 0
        while True:
            actor = host.remote(sitting)
            on_actor(actor)
            watched = _Watched(ray, actor, should_stop, tell)
            try:
                return watched.wait()
            except ray.exceptions.RayActorError as error:
                fruitless = 0 if watched.has_stepped else fruitless + 1
                log.error("trainer_died", error=str(error).splitlines()[0], goes_on=fruitless <= max_restarts)
                if fruitless > max_restarts:
                    raise TrainingFailed(
                        f"the trainer's actor died {fruitless} times in a row without a step; the output of "
                        "its worker says why; checkpoints are kept",
                        step=watched.step,
                        term="actor",
                    ) from error
    finally:
        if is_own:
            ray.shutdown()


def _init(ray: Any, address: str, engines: int) -> None:
    if address:
        ray.init(address=address, log_to_driver=True)
        return
    cpus = max(os.cpu_count() or 1, engines + _BESIDE_ENGINES)
    ray.init(num_cpus=cpus, include_dashboard=False, object_store_memory=_STORE_BYTES)


class _Watched:
    """One actor of the trainer, until it has ended or died."""

    def __init__(self, ray: Any, actor: Any, should_stop: Callable[[], bool], tell: Tell) -> None:
        self._ray, self._actor, self._should_stop, self._tell = ray, actor, should_stop, tell
        self.step = 0
        self.has_stepped = False

    def wait(self) -> Ended:
        ended = self._actor.run.options(concurrency_group="run").remote()
        is_told = False
        while True:
            ready, _ = self._ray.wait([ended], timeout=_LOOK_S)
            self._look()
            if ready:
                break
            if self._should_stop() and not is_told:
                self._ray.get(self._actor.stop.options(concurrency_group="look").remote())
                is_told = True
        found = self._ray.get(ended)
        if isinstance(found, Refused):
            raise error_of(found)
        assert isinstance(found, Ended)
        return found

    def _look(self) -> None:
        for step, values in self._ray.get(self._actor.news.options(concurrency_group="look").remote()):
            self.step, self.has_stepped = step, self.has_stepped or bool(values)
            self._tell(step, values)


class _TrainerHost:
    """The actor: one sitting of a run, and news of it. Errors made on purpose are answers: Ray would wrap
    them."""

    def __init__(self, sitting: Sitting) -> None:
        self._sitting = sitting
        self._news: list[tuple[int, dict[str, float]]] = []
        self._lock = threading.Lock()
        self._is_stopping = threading.Event()

    def pid(self) -> int:
        return os.getpid()

    def stop(self) -> None:
        """Ends the run after the step that is under way."""
        self._is_stopping.set()

    def news(self) -> list[tuple[int, dict[str, float]]]:
        """The steps since this was last asked, with their metrics."""
        with self._lock:
            found, self._news = self._news, []
        return found

    def run(self) -> Ended | Refused:
        sitting = self._sitting
        try:
            return train_policy(
                RlConfig.model_validate_json(sitting.config),
                sitting.out,
                Log(sys.stderr),
                export=sitting.export,
                tensorboard=sitting.tensorboard,
                controls=sitting.controls,
                should_stop=self._is_stopping.is_set,
                tell=self._tell,
            )
        except BittrueError as error:
            return refusal(None, error)

    def _tell(self, step: int, values: Mapping[str, float]) -> None:
        with self._lock:
            self._news.append((step, dict(values)))
