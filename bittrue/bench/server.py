"""What the server itself costs: start to first token, and the time it adds to every streamed token."""

import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from bittrue.bench.result import Label, Measurement, measured
from bittrue.bench.serving import Endpoint, Outcome, Served, serve_load
from bittrue.bench.trace import Arrival, Load, make_trace
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import EngineDied

_START_TIMEOUT_S = 600.0
_END_TIMEOUT_S = 60.0


@dataclass(slots=True)
class Serving:
    """A server that runs as its own process, and what it says."""

    url: str
    lines: SimpleQueue[str]
    said: list[str]

    def engine_pid(self) -> int:
        """The engine process of now, by the server's log (at level info). Raises EngineDied."""
        with suppress(Empty):
            while True:
                self.said.append(self.lines.get_nowait())
        for line in reversed(self.said):
            found = re.search(r" engine_ready .*?pid=(\d+)", line)
            if found:
                return int(found[1])
        raise EngineDied("the server did not say which process its engine is")


@contextmanager
def running_server(model: Path, *flags: str) -> Iterator[str]:
    """`bittrue serve MODEL` on a free port, as its own process; gives its URL. Raises EngineDied."""
    with started_server(model, *flags) as serving:
        yield serving.url


@contextmanager
def started_server(model: Path, *flags: str) -> Iterator[Serving]:
    """The same, with what it says. Raises EngineDied."""
    command = [sys.executable, "-m", "bittrue.cli.main", "serve", str(model), "--port=0", *flags]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: SimpleQueue[str] = SimpleQueue()
    reader = threading.Thread(target=_forward, args=(process.stderr, lines), daemon=True)
    reader.start()
    try:
        yield _serving(process, lines)
    finally:
        process.terminate()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stderr.close()


def _forward(stream: IO[str], lines: SimpleQueue[str]) -> None:
    for line in stream:
        lines.put(line)


def _serving(process: "subprocess.Popen[str]", lines: SimpleQueue[str]) -> Serving:
    seen: list[str] = []
    deadline_s = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline_s:
        try:
            line = lines.get(timeout=0.1)
        except Empty:
            if process.poll() is not None:
                break
            continue
        seen.append(line)
        found = re.search(r" serving url=(\S+)", line)
        if found:
            return Serving(found[1], lines, seen)
    raise EngineDied("the server did not start; it said: " + "".join(seen[-20:]).strip())


def bench_start(model: Path, flags: Sequence[str], *, repeats: int) -> Iterator[Measurement]:
    """Seconds from starting the program to the first token over HTTP. One start is dropped: it warms the
    disk."""
    load = Load(requests=1, concurrency=1, prompt_tokens=16, output_tokens=1, vocab=256)
    to_url, to_token = [], []
    for _ in range(repeats + 1):
        start_s = time.perf_counter()
        with running_server(model, *flags) as url:
            to_url.append(time.perf_counter() - start_s)
            (outcome,) = _whole(serve_load(Endpoint(url), load))
            to_token.append(outcome.token_times[0] - start_s)
    yield measured("start to serving", "s", to_url[1:], {})
    yield measured("start to first token", "s", to_token[1:], {})


@dataclass(frozen=True, slots=True)
class _Pace:
    """How a set of streams went: mean seconds from token to token of a stream, the whole, and what of it the
    client of an HTTP server took."""

    per_token_s: float
    wall_s: float
    client_cpu_s: float = 0.0


def bench_added(engine: Engine, url: str, load: Load, *, rounds: int) -> Iterator[Measurement]:
    """The same streams by ``engine``, in this process, and over HTTP by the server at ``url``, in turn.

    Added to a token: the difference in time from token to token within a stream. Added per streamed token:
    the difference of the whole, over all tokens of all streams. Both hold the work of this client, which is
    told beside them. One round is dropped.
    """
    trace = make_trace(load)
    here, there = [], []
    for _ in range(rounds + 1):
        here.append(_in_process(engine, trace))
        there.append(_over_http(url, load))
    pairs = list(zip(here, there, strict=True))[1:]
    num_tokens = sum(arrival.output_tokens for arrival in trace)
    labels: dict[str, Label] = {"streams": load.concurrency, "output_tokens": load.output_tokens}
    yield measured("token to token, in process", "s", [h.per_token_s for h, _ in pairs], labels)
    yield measured("token to token, over HTTP", "s", [t.per_token_s for _, t in pairs], labels)
    yield measured("added to a token", "s", [t.per_token_s - h.per_token_s for h, t in pairs], labels)
    added = [(t.wall_s - h.wall_s) / num_tokens for h, t in pairs]
    yield measured("added per streamed token", "s", added, labels)
    client = [t.client_cpu_s / num_tokens for _, t in pairs]
    yield measured("client per streamed token", "s", client, labels)


def _in_process(engine: Engine, trace: Sequence[Arrival]) -> _Pace:
    for i, arrival in enumerate(trace):
        params = SamplingParams(temperature=0.0, max_tokens=arrival.output_tokens, ignore_eos=True)
        engine.add(Request(request_id=f"added-{i}", prompt=arrival.prompt, params=params))
    times: dict[str, list[float]] = {}
    start_s = time.perf_counter()
    while engine.has_work():
        events = engine.step()
        now_s = time.perf_counter()
        for event in events:
            times.setdefault(event.request_id, []).extend([now_s] * len(event.token_ids))
    wall_s = time.perf_counter() - start_s
    paces = [(t[-1] - t[0]) / (len(t) - 1) for t in times.values()]
    return _Pace(sum(paces) / len(paces), wall_s)


def _over_http(url: str, load: Load) -> _Pace:
    served = serve_load(Endpoint(url), load)
    paces = [outcome.per_token_s for outcome in _whole(served)]
    known = [pace for pace in paces if pace is not None]
    return _Pace(sum(known) / len(known), served.wall_s, served.client_cpu_s)


def _whole(served: Served) -> Sequence[Outcome]:
    if served.errors:
        raise EngineDied(f"the server failed a request: {', '.join(served.errors)}")
    return served.whole
