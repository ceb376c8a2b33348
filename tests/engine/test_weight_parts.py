"""An update cut into parts is the same update again, and no frame is larger than allowed."""

import random
from dataclasses import replace

import msgspec
import pytest

from bittrue.engine.weight_parts import UpdateParts, parts_of
from bittrue.engine.wire import HEADER_BYTES, UpdatePart, decode_to_engine, frame
from bittrue.errors import PublicationRefused
from bittrue.model.weight_update import Payload, WeightUpdate

MAX_BYTES = 8192


def update_of(*sizes: int) -> WeightUpdate:
    noise = random.Random(len(sizes))
    payloads = {
        f"layers.{i}.ffn.experts.w{size}": Payload(
            noise.randbytes(size), f"{i:032x}", "torch.bfloat16", (size, 1), is_delta=i % 2 == 1
        )
        for i, size in enumerate(sizes)
    }
    return WeightUpdate("version", "base", payloads)


def crossed(update: WeightUpdate, update_id: int = 3) -> list[UpdatePart]:
    """The parts behind the wire."""
    found = []
    for part in parts_of(update, update_id=update_id, running="in_place", max_bytes=MAX_BYTES):
        framed = frame(part)
        assert len(framed) <= MAX_BYTES
        message = decode_to_engine(framed[HEADER_BYTES:])
        assert isinstance(message, UpdatePart) and message.running == "in_place"
        found.append(message)
    return found


@pytest.mark.parametrize(
    "sizes",
    [(), (0,), (1,), (100_000,), (5, 0, 50_000, 3, 7000, 6000, 0), tuple(range(6000, 7200, 7)), (9,) * 400],
    ids=lambda sizes: f"{len(sizes)} tensors",
)
def test_an_update_in_parts_is_whole_again(sizes: tuple[int, ...]) -> None:
    update = update_of(*sizes)
    parts = crossed(update)
    assert len(parts) > 1 or sum(sizes) < MAX_BYTES
    joined, found = UpdateParts(), []
    for part in parts:
        assert not found
        found += [done for done in [joined.take(part)] if done is not None]
    assert found == [update]


def test_parts_that_do_not_follow_are_refused_and_the_next_update_is_taken() -> None:
    update = update_of(50_000, 10)
    parts = crossed(update)
    assert len(parts) > 4
    cut = msgspec.structs.replace(parts[-1].pieces[0], num_bytes=70_000)
    faults = [
        (parts[1:], "part 1 of update 3 is not the next one"),
        ([parts[0], parts[2]], "part 2 of update 3 is not the next one"),
        ([parts[0], crossed(update, 4)[1]], "part 1 of update 4 is not the next one"),
        ([parts[0], msgspec.structs.replace(parts[2], index=1)], "tensor layers.0.* where .* were there"),
        ([msgspec.structs.replace(parts[0], is_last=True)], "came in part"),
        (
            [*parts[:-1], msgspec.structs.replace(parts[-1], pieces=[cut, *parts[-1].pieces[1:]])],
            "tensor layers.1.*",
        ),
    ]
    joined = UpdateParts()
    for sequence, text in faults:
        with pytest.raises(PublicationRefused, match=text):
            for part in sequence:
                joined.take(part)
        with pytest.raises(PublicationRefused, match="not the next one"):
            joined.take(parts[-1])
    joined.take(parts[0])  # an update whose sender died
    assert [joined.take(part) for part in parts][-1] == update
    again = replace(update, version="later")
    assert [joined.take(part) for part in crossed(again, 4)][-1] == again
