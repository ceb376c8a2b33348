"""Load over HTTP against an OpenAI-compatible server: time to first token, inter-token latency, throughput.

While a request runs, the client only notes when bytes came; they are read as events after the last answer has
ended. What the client itself costs is measured too: its share of a core, and how late it sent.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import msgspec
import uvloop

from bittrue.bench.result import Label, Measurement, measured, percentile
from bittrue.bench.trace import Arrival, Load, make_trace
from bittrue.errors import UsageError

_ERROR_BYTES = 300  # of a refusal's body are kept


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server, and how to ask it: token ids to /v1/completions, or ``chat``, text to
    /v1/chat/completions."""

    url: str  # with or without the final /v1
    model: str = ""  # empty: the first one the server lists
    api_key: str = ""
    chat: bool = False
    ignore_eos: bool = True  # not in OpenAI's protocol; other servers for local models know it
    timeout_s: float = 600.0  # of one request, from sending to the last byte

    @property
    def base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def path(self) -> str:
        return "/v1/chat/completions" if self.chat else "/v1/completions"

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.api_key}"} if self.api_key else {}


@dataclass(slots=True)
class Recording:
    """What came back for one request: bytes with their time, nothing read yet. Times are perf_counter's."""

    arrival: Arrival
    due_s: float
    sent_s: float = 0.0
    ended_s: float = 0.0
    status: int = 0
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    error: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request, read. ``error`` is empty when the answer is whole; then the times and counts are set."""

    recording: Recording
    error: str = ""
    token_times: tuple[float, ...] = ()  # of the events that carry text
    num_prompt: int = 0
    num_output: int = 0

    @property
    def ttft_s(self) -> float:
        return self.token_times[0] - self.recording.sent_s

    @property
    def end_to_end_s(self) -> float:
        return self.recording.ended_s - self.recording.sent_s

    @property
    def gaps_s(self) -> list[float]:
        """Seconds between events that carry text."""
        times = self.token_times
        return [b - a for a, b in zip(times, times[1:], strict=False)]

    @property
    def per_token_s(self) -> float | None:
        """Mean seconds from token to token after the first; None for an answer of one token."""
        if self.num_output < 2:
            return None
        return (self.token_times[-1] - self.token_times[0]) / (self.num_output - 1)


@dataclass(frozen=True, slots=True)
class Served:
    """One load, answered. ``wall_s``: from the first request sent to the last byte."""

    outcomes: tuple[Outcome, ...]
    wall_s: float
    client_cpu_s: float

    @property
    def whole(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if not outcome.error]

    @property
    def errors(self) -> Counter[str]:
        return Counter(outcome.error for outcome in self.outcomes if outcome.error)

    def measurements(self, **labels: Label) -> Iterator[Measurement]:
        """Percentiles over requests (or tokens), rates over the whole, and the count of failed requests."""
        whole = self.whole
        num_failed, num_sent = len(self.outcomes) - len(whole), len(self.outcomes)
        yield measured("errors", "count", [num_failed], {"requests": num_sent, **labels})
        lags = [o.recording.sent_s - o.recording.due_s for o in self.outcomes]
        yield _seconds("client lag", lags, labels)
        yield measured("client share of a core", "ratio", [self.client_cpu_s / self.wall_s], labels)
        if not whole:
            return
        yield _seconds("time to first token", [o.ttft_s for o in whole], labels)
        yield _seconds("end to end", [o.end_to_end_s for o in whole], labels)
        gaps = [gap for outcome in whole for gap in outcome.gaps_s]
        if gaps:
            yield _seconds("inter-token latency", gaps, labels)
        per_token = [o.per_token_s for o in whole if o.per_token_s is not None]
        if per_token:
            yield _seconds("time per output token", per_token, labels)
        counts = {
            "prompt_tokens": sum(o.num_prompt for o in whole),
            "output_tokens": sum(o.num_output for o in whole),
        }
        speed = counts["output_tokens"] / self.wall_s
        yield measured("output", "tokens/s", [speed], {**counts, **labels})
        yield measured("answered", "requests/s", [len(whole) / self.wall_s], labels)


def _seconds(name: str, values: Sequence[float], labels: dict[str, Label]) -> Measurement:
    ordered = sorted(values)
    tails = {"p90": percentile(ordered, 0.9), "p99": percentile(ordered, 0.99)}
    return measured(name, "s", ordered, {**tails, **labels})


def serve_load(endpoint: Endpoint, load: Load) -> Served:
    """Sends a load and waits for every answer. Raises UsageError when the server cannot be asked at all."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(endpoint, load))


async def _serve(endpoint: Endpoint, load: Load) -> Served:
    trace = make_trace(load)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    timeout = httpx.Timeout(endpoint.timeout_s)
    async with httpx.AsyncClient(
        base_url=endpoint.base, headers=endpoint.headers, limits=limits, timeout=timeout
    ) as client:
        model = endpoint.model or await first_model(client)
        bodies = [msgspec.json.encode(body_of(endpoint, model, arrival)) for arrival in trace]
        cpu_s, start_s = time.process_time(), time.perf_counter()
        recordings = [Recording(arrival, start_s + arrival.at_s) for arrival in trace]
        if load.kind == "closed":
            todo = iter(zip(recordings, bodies, strict=True))
            await asyncio.gather(*(_worker(client, endpoint, todo) for _ in range(load.concurrency)))
        else:
            await asyncio.gather(
                *(_send_when_due(client, endpoint, r, b) for r, b in zip(recordings, bodies, strict=True))
            )
        wall_s = max(r.ended_s for r in recordings) - start_s
        cpu_s = time.process_time() - cpu_s
    return Served(tuple(read_recording(r, endpoint.chat) for r in recordings), wall_s, cpu_s)


async def first_model(client: httpx.AsyncClient) -> str:
    """The first model the server lists. Raises UsageError."""
    try:
        response = await client.get("/v1/models")
        response.raise_for_status()
        return str(response.json()["data"][0]["id"])
    except (httpx.HTTPError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{client.base_url} lists no model ({error}); name one with --model") from error


def body_of(endpoint: Endpoint, model: str, arrival: Arrival) -> dict[str, Any]:
    """What is posted for a request."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": arrival.output_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if endpoint.ignore_eos:
        body["ignore_eos"] = True
    if endpoint.chat:
        text = " ".join(str(token) for token in arrival.prompt)
        return {**body, "messages": [{"role": "user", "content": text}]}
    return {**body, "prompt": list(arrival.prompt)}


async def _worker(
    client: httpx.AsyncClient, endpoint: Endpoint, todo: Iterator[tuple[Recording, bytes]]
) -> None:
    for recording, body in todo:
        recording.due_s = time.perf_counter()
        await send(client, endpoint, recording, body)


async def _send_when_due(
    client: httpx.AsyncClient, endpoint: Endpoint, recording: Recording, body: bytes
) -> None:
    await asyncio.sleep(max(0.0, recording.due_s - time.perf_counter()))
    await send(client, endpoint, recording, body)


async def send(client: httpx.AsyncClient, endpoint: Endpoint, recording: Recording, body: bytes) -> None:
    """One request. A failure is part of the recording: every request is counted once."""
    headers = {"content-type": "application/json"}
    recording.sent_s = time.perf_counter()
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            async with client.stream("POST", endpoint.path, content=body, headers=headers) as response:
                recording.status = response.status_code
                async for piece in response.aiter_raw():
                    recording.pieces.append((time.perf_counter(), piece))
    except TimeoutError:
        recording.error = f"no end within {endpoint.timeout_s:g} s"
    except httpx.HTTPError as error:
        recording.error = type(error).__name__
    recording.ended_s = time.perf_counter()


# ---- reading what came ----


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        return bool(self.text or (self.delta and (self.delta.content or self.delta.reasoning_content)))


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_EVENT = msgspec.json.Decoder(_Event)


def read_recording(recording: Recording, chat: bool = False) -> Outcome:
    """The events of one answer. Anything but a whole, well-formed stream is an error with its reason."""
    if recording.error:
        return Outcome(recording, recording.error)
    if recording.status != httpx.codes.OK:
        said = b"".join(piece for _, piece in recording.pieces)[:_ERROR_BYTES]
        return Outcome(recording, f"HTTP {recording.status}: {said.decode(errors='replace')}")
    times: list[float] = []
    usage: _Usage | None = None
    is_finished = False
    for at_s, data in _events(recording.pieces):
        if data == b"[DONE]":
            break
        try:
            event = _EVENT.decode(data)
        except msgspec.DecodeError as error:
            return Outcome(recording, f"an event is not what the protocol says: {error}")
        if event.error is not None:
            return Outcome(recording, "the stream carries an error")
        usage = event.usage or usage
        is_finished = is_finished or any(choice.finish_reason for choice in event.choices)
        if any(choice.has_text for choice in event.choices):
            times.append(at_s)
    if not is_finished:
        return Outcome(recording, "the stream ended without a finish reason")
    if usage is None:
        return Outcome(recording, "the stream carries no usage")
    if not times:
        return Outcome(recording, "the answer has no text")
    return Outcome(recording, "", tuple(times), usage.prompt_tokens, usage.completion_tokens)


def _events(pieces: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """(time, data) of every event, however the network cut the stream: the time of its last byte."""
    rest = b""
    for at_s, piece in pieces:
        rest = (rest + piece).replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        for event in whole:
            lines = [line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")]
            if lines:
                yield at_s, b"\n".join(lines)
