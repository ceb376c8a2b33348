"""Time to the first token of a long prompt: cold, and from each tier of the prefix cache."""

import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bittrue.bench.engines import Answer, Model, ask, at_least, drain, greedy
from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.server import running_server
from bittrue.bench.serving import Endpoint, serve_load
from bittrue.bench.trace import Load
from bittrue.engine.engine import Engine
from bittrue.errors import BittrueError, EngineDied

NEW_TOKENS = 64  # another question behind the same text
_HITS = 3  # of each kind in a round: they take little
_MARGIN = 256  # tokens a sequence may have beyond the prompt
_BLOCK = 4096
_DROPS, _DROP_S = 5, 0.05

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class FirstTokens:
    """``tokens`` of the prompt; every round has another one. Files go to ``folder``."""

    model: Model
    folder: Path
    tell: Tell
    tokens: int = 32768
    rounds: int = 3
    threads: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        at_least(tokens=(self.tokens, 4 * NEW_TOKENS), rounds=(self.rounds, 1))

    def run(self) -> Iterator[Measurement]:
        """Per way to the first token: the seconds, and their share of a cold start in the same round."""
        seconds: dict[str, list[list[float]]] = defaultdict(list)
        cached: dict[str, int] = {}
        resident: dict[str, list[float]] = defaultdict(list)
        with self._engine(prefix_cache=False) as off, self._engine(**self._tiers(1 << 30)) as on:
            for engine in (off, on):
                warm(engine, self.model)
            for number in range(self.rounds):
                self.tell(f"first tokens, round {number + 1} of {self.rounds}")
                for way, answer in self._round(off, on, number, resident):
                    if len(seconds[way]) <= number:
                        seconds[way].append([])
                    seconds[way][number].append(answer.first_s)
                    cached[way] = answer.num_cached
        cold = [each[0] for each in seconds["cold"]]
        for way, rounds in seconds.items():
            labels: dict[str, Label] = {"from": way, "tokens": self.tokens, "cached": cached[way]}
            yield measured("time to first token", "s", [s for each in rounds for s in each], labels)
            if way != "cold":
                shares = [s / base for each, base in zip(rounds, cold, strict=True) for s in each]
                yield measured("first token over cold", "ratio", shares, labels)
        for way, values in resident.items():
            yield measured("disk cache in the page cache", "ratio", values, {"from": way})

    def over_http(self) -> Iterator[Measurement]:
        """The same prompt three times through a server: the first is cold."""
        self.tell("first tokens over HTTP")
        context = self.tokens + _MARGIN
        flags = [f"--threads={self.threads}", f"--max-context={context}", "--kv-memory=1GiB"]
        vocab = self.model.vocab_size
        load = Load(requests=1, concurrency=1, prompt_tokens=self.tokens, output_tokens=2, vocab=vocab)
        small = Load(requests=1, concurrency=1, prompt_tokens=16, output_tokens=4, vocab=vocab, seed=1)
        times = []
        with running_server(self.model.directory, *flags) as url:
            for each in (small, load, load, load):
                served = serve_load(Endpoint(url), each)
                if served.errors:
                    raise EngineDied(f"the server failed a request: {', '.join(served.errors)}")
                times.append(served.whole[0].ttft_s)
        cold, *again = times[1:]
        for way, values in (("cold, over HTTP", [cold]), ("device, over HTTP", again)):
            labels: dict[str, Label] = {"from": way, "tokens": self.tokens}
            yield measured("time to first token", "s", values, labels)
        yield measured("first token over cold", "ratio", [s / cold for s in again], labels)

    def _round(
        self, off: Engine, on: Engine, number: int, resident: dict[str, list[float]]
    ) -> Iterator[tuple[str, Answer]]:
        """(way, answer) of every way to the first token of one prompt."""
        prompt = self.model.prompt(self.tokens, self.seed, number)
        kept = prompt[:-NEW_TOKENS]
        yield "cold", self._first(off, prompt, None)
        on.evict()
        yield "cold, cache on", self._first(on, prompt, None)
        for i in range(_HITS):
            yield "device", self._first(on, prompt, "device")
            # Where the question begins there is no state: that is computed again from the stored rows.
            question = self.model.prompt(NEW_TOKENS, self.seed, number, i + 1)
            yield "replay, another question", self._first(on, kept + question, "replay")
        for _ in range(_HITS):
            on.evict()
            yield "host", self._first(on, prompt, "host")
        tiers = on.parts.tiers
        assert tiers is not None
        drain(tiers)
        for way, is_warm in (("disk, read lately", True), ("disk, not in memory", False)) * _HITS:
            with self._engine(**self._tiers(0)) as fresh:
                warm(fresh, self.model)
                resident[way].append(page_cache_share(self.folder, drop=not is_warm))
                yield way, self._first(fresh, prompt, "disk")

    def _engine(self, **knobs: Any) -> AbstractContextManager[Engine]:
        return self.model.engine(max_context=self.tokens + _MARGIN, threads=self.threads, **knobs)

    def _tiers(self, host_bytes: int) -> dict[str, Any]:
        return {"host_cache": host_bytes, "cache_dir": str(self.folder), "log_level": "warning"}

    def _first(self, engine: Engine, prompt: tuple[int, ...], tier: str | None) -> Answer:
        """Asks for one token. Raises BittrueError where it did not come the way that is measured."""
        before = engine.stats().cache.hit_tokens
        (answer,) = ask(engine, [prompt], greedy(1))
        after = engine.stats().cache.hit_tokens
        ways = [name for name, count in after.items() if count > before.get(name, 0)]
        if ways != ([] if tier is None else [tier]):
            raise BittrueError(f"the prompt was to come from {tier or 'nothing'}, and came from {ways}")
        return answer


def warm(engine: Engine, model: Model) -> None:
    """What an engine does once: steps are captured, threads started."""
    ask(engine, [model.prompt(16, 1)], greedy(4))


def page_cache_share(folder: Path, *, drop: bool) -> float:
    """The share of the files' blocks that main memory holds, after ``drop`` asked the system to forget them,
    more than once where it keeps some: pages just written are not let go at once."""
    files = list(folder.rglob("*.kv"))
    for _ in range(_DROPS if drop else 0):
        for path in files:
            with _opened(path) as fd:
                os.fsync(fd)  # only clean pages are dropped
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        if _share_in_memory(files) == 0:
            break
        time.sleep(_DROP_S)
    return _share_in_memory(files)


def _share_in_memory(files: Sequence[Path]) -> float:
    held = total = 0
    for path in files:
        with _opened(path) as fd:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # looking must not read ahead
            for start in range(0, os.fstat(fd).st_size, _BLOCK):
                total += 1
                with suppress(BlockingIOError):
                    held += os.preadv(fd, [bytearray(1)], start, os.RWF_NOWAIT)
    return held / max(1, total)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
