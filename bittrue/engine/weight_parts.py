"""New weights in parts that fit a frame, and the whole update out of its parts (no torch)."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from bittrue.engine.types import Running
from bittrue.engine.wire import TensorPiece, UpdatePart
from bittrue.errors import PublicationRefused
from bittrue.model.weight_update import Payload, WeightUpdate

MAX_FRAME_BYTES = 256 << 20
_PART_BYTES = 1024  # at most, of a part beside its pieces
_PIECE_BYTES = 512  # at most, of a piece beside its name and data
_LEAST_BYTES = 1024  # of data, at the end of a part: fewer are not worth a piece


def parts_of(
    update: WeightUpdate, *, update_id: int, running: Running, max_bytes: int = MAX_FRAME_BYTES
) -> Iterator[UpdatePart]:
    """The parts of ``update`` in order, no frame larger than ``max_bytes``: tensors are cut where they must
    be. They share the update's bytes."""
    pieces: list[TensorPiece] = []
    index, room = 0, max_bytes - _PART_BYTES

    def part(*, is_last: bool) -> UpdatePart:
        return UpdatePart(
            update_id=update_id,
            index=index,
            is_last=is_last,
            version=update.version,
            base=update.base,
            running=running,
            pieces=pieces,
        )

    for name, payload in update.payloads.items():
        data, offset, is_begun = memoryview(payload.data), 0, False
        overhead = _PIECE_BYTES + len(name.encode())
        assert overhead + _LEAST_BYTES <= max_bytes - _PART_BYTES, "no room for a piece of a tensor"
        while not is_begun or offset < len(data):
            if room < overhead + min(len(data) - offset, _LEAST_BYTES):
                yield part(is_last=False)
                pieces, index, room = [], index + 1, max_bytes - _PART_BYTES
            end = min(len(data), offset + room - overhead)
            facts = (name, payload.digest, payload.dtype, payload.shape, payload.is_delta)
            pieces.append(TensorPiece(*facts, num_bytes=len(data), offset=offset, data=data[offset:end]))
            room -= overhead + end - offset
            offset, is_begun = end, True
    yield part(is_last=True)


@dataclass(slots=True)
class UpdateParts:
    """Gathers the parts of one update at a time."""

    _update_id: int | None = None
    _next: int = 0
    _payloads: dict[str, Payload] = field(default_factory=dict)
    _data: bytearray = field(default_factory=bytearray)  # of the tensor that is not whole yet

    def take(self, part: UpdatePart) -> WeightUpdate | None:
        """The update, once ``part`` completes it. Part 0 begins another and drops one that stayed
        incomplete. Raises PublicationRefused, and drops the update, where a part or a piece is not the next
        one."""
        if part.index == 0:
            self._begin(part.update_id)
        if (part.update_id, part.index) != (self._update_id, self._next):
            self._drop(f"part {part.index} of update {part.update_id} is not the next one")
        self._next += 1
        for piece in part.pieces:
            self._add(piece)
        if not part.is_last:
            return None
        if self._data:
            self._drop("the last tensor came in part")
        update = WeightUpdate(part.version, part.base, self._payloads)
        self._begin(None)
        return update

    def _begin(self, update_id: int | None) -> None:
        self._update_id, self._next, self._payloads, self._data = update_id, 0, {}, bytearray()

    def _add(self, piece: TensorPiece) -> None:
        num_left = piece.num_bytes - piece.offset - len(piece.data)
        if piece.offset != len(self._data) or num_left < 0 or piece.name in self._payloads:
            fact = f"bytes from {piece.offset} on came where {len(self._data)} were there"
            self._drop(f"tensor {piece.name}: {fact}", tensor=piece.name)
        if num_left:
            self._data += piece.data
            return
        data = bytes(piece.data) if not self._data else bytes(self._data + piece.data)
        facts = (piece.digest, piece.dtype, piece.shape, piece.is_delta)
        self._payloads[piece.name] = Payload(data, *facts)
        self._data = bytearray()

    def _drop(self, fact: str, *, tensor: str = "") -> None:
        self._begin(None)
        raise PublicationRefused(f"{fact}; send the update again", tensor=tensor)
