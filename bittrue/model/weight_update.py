"""New weights as plain data: what a trainer publishes and an engine takes (no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from bittrue.errors import PublicationRefused


@dataclass(frozen=True, slots=True)
class Payload:
    """One tensor of an update. ``data`` holds its bytes or, in a delta, the difference to the bytes before
    (exclusive or), deflated. ``digest`` is of the bytes after."""

    data: bytes
    digest: str
    dtype: str
    shape: tuple[int, ...]
    is_delta: bool


@dataclass(frozen=True, slots=True)
class WeightUpdate:
    """All tensors of a version, or with ``base`` those that differ from that version. ``version`` is the
    digest of every tensor after it, so two updates to the same weights have the same version.

    ``whole``: of a delta, every tensor after it; shared with who made it and not sent along.
    """

    version: str
    base: str | None
    payloads: Mapping[str, Payload]
    whole: Mapping[str, Payload] | None = field(default=None, repr=False, compare=False)

    @property
    def num_bytes(self) -> int:
        return sum(len(payload.data) for payload in self.payloads.values())

    def full(self) -> "WeightUpdate":
        """The update to the same weights from any others; copies nothing. Raises PublicationRefused for a
        delta that came without its whole."""
        if self.base is None:
            return self
        if self.whole is None:
            fact = f"the update to {self.version} is a difference to {self.base} and came without the rest"
            raise PublicationRefused(f"{fact}; publish a full update")
        return WeightUpdate(self.version, None, self.whole)
