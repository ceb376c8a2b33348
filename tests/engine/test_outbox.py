"""The step thread never waits for the server, and nothing is lost or out of order."""

import socket
import threading
from collections.abc import Iterator

import pytest

from bittrue.engine.outbox import Outbox, merged
from bittrue.engine.types import EngineStats, TokenEvent
from bittrue.engine.wire import HEADER_BYTES, FromEngine, Pong, StepDone, body_bytes, decode_from_engine


def step(number: int, *, num_tokens: int = 1) -> StepDone:
    event = TokenEvent(request_id="r", token_ids=(number,) * num_tokens)
    return StepDone(events=[event], stats=EngineStats(num_steps_total=number))


def read_frames(link: socket.socket) -> Iterator[FromEngine]:
    """Until the other end is closed."""
    with link.makefile("rb") as file:
        while header := file.read(HEADER_BYTES):
            yield decode_from_engine(file.read(body_bytes(header)))


def never() -> None:
    raise AssertionError("the reader has not gone")


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def test_a_reader_that_keeps_up_gets_every_step_by_itself(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours, never)
    frames = read_frames(theirs)
    for number in range(20):
        outbox.send(step(number))
        assert next(frames) == step(number)
    outbox.close(5)


def test_sending_to_a_reader_that_sleeps_returns_and_loses_nothing(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    outbox = Outbox(ours, never)
    # 40 MB: no socket buffer holds that, so a blocking send would never come back to this thread.
    count, size = 200, 40_000
    for number in range(count):
        outbox.send(step(number, num_tokens=size))
    outbox.send(Pong(ping_id=1, stats=EngineStats()))
    outbox.send(step(count))

    got: list[FromEngine] = []
    reader = threading.Thread(target=lambda: got.extend(read_frames(theirs)))
    reader.start()
    outbox.close(30)
    ours.close()
    reader.join(30)
    is_pong = [isinstance(message, Pong) for message in got]
    assert is_pong.count(True) == 1 and not is_pong[-1]
    steps = [message for message in got if isinstance(message, StepDone)]
    tokens = [event.token_ids[0] for message in steps for event in message.events]
    assert tokens == list(range(count + 1))
    assert len(steps) < count  # what piled up went out together
    assert steps[-1].stats.num_steps_total == count


def test_a_reader_that_has_gone_is_noticed(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    gone = threading.Event()
    outbox = Outbox(ours, gone.set)
    theirs.close()
    outbox.send(step(1))
    assert gone.is_set()
    outbox.close(5)


@pytest.mark.parametrize("cut", [0, 1, 4])
def test_merging_keeps_order_and_the_last_numbers(cut: int) -> None:
    steps: list[FromEngine | bytes] = [step(number) for number in range(5)]
    pong = Pong(ping_id=1, stats=EngineStats())
    out = merged([b"rest", *steps[:cut], pong, *steps[cut:]])
    events = [event for m in out if isinstance(m, StepDone) for event in m.events]
    assert [event.token_ids for event in events] == [(number,) for number in range(5)]
    assert out[0] == b"rest" and out.index(pong) == (2 if cut else 1)
    last = out[-1]
    assert isinstance(last, StepDone) and last.stats.num_steps_total == 4
