"""What the KV manager wants done to the cache tensors, as integers: executed in order, before the next step.

Order is all the safety there is: a page may be copied from, given to somebody else and written again in one
list, because every move sees what the moves before it left.
"""

from dataclasses import dataclass

from bittrue.kv.identity import BlobName


@dataclass(frozen=True, slots=True)
class CopyPage:
    """All layers' rows of page ``source`` into page ``target``."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class CopySlot:
    """The whole state of slot ``source`` into slot ``target``."""

    source: int
    target: int


@dataclass(frozen=True, slots=True)
class ClearSlot:
    """Zeros in slot ``slot``: the finite nothing from which a replay starts."""

    slot: int


@dataclass(frozen=True, slots=True)
class SavePage:
    """A full page to the tiers, as a blob of the namespace ``space``."""

    page: int
    space: bytes
    name: BlobName


@dataclass(frozen=True, slots=True)
class SaveState:
    """The state in ``slot`` at ``position`` to the tiers, with the rows of the open page ``page`` (None where
    ``position`` is a multiple of 128)."""

    slot: int
    page: int | None
    position: int
    fold: int
    space: bytes
    name: BlobName


@dataclass(frozen=True, slots=True)
class LoadPage:
    """A full page out of a blob that has been fetched and verified."""

    name: BlobName
    data: bytes
    page: int


@dataclass(frozen=True, slots=True)
class LoadState:
    """The state at ``position`` into ``slot``, and the rows of the open page into ``page``."""

    name: BlobName
    data: bytes
    slot: int
    page: int | None
    position: int


Move = CopyPage | CopySlot | ClearSlot | SavePage | SaveState | LoadPage | LoadState
