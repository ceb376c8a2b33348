"""Names of cached content: a hash chain over the tokens, begun with everything else the bits depend on."""

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

DIGEST_BYTES = 20
STATE_HEAD = struct.Struct("<II")  # a state blob begins with its position and its fold


def namespace_digest(facts: Mapping[str, str], salt: str) -> bytes:
    """Start of the chain of one namespace: ``facts`` (weight version, numeric level, kernels, encoder, row
    formats) and the tenant's salt."""
    document = msgspec.json.encode({"facts": dict(sorted(facts.items())), "salt": salt})
    return hashlib.blake2b(document, digest_size=DIGEST_BYTES, person=b"bittrue-space").digest()


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Chain digest after the 128 ``tokens`` of one more page."""
    return hashlib.blake2b(
        parent + _packed(tokens), digest_size=DIGEST_BYTES, person=b"bittrue-page"
    ).digest()


def state_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of the state after the pages of ``parent`` and the 0 to 127 ``tokens`` of the open page."""
    return hashlib.blake2b(
        parent + _packed(tokens), digest_size=DIGEST_BYTES, person=b"bittrue-state"
    ).digest()


def _packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


@dataclass(frozen=True, slots=True)
class BlobName:
    """Where a blob belongs: below the chain digest of the full pages before it.

    A page's ``digest`` is the chain digest after it, its ``offset`` 128; a state's offset is the number of
    tokens of the open page it covers, 0 to 127.
    """

    kind: Literal["page", "state"]
    parent: bytes
    offset: int
    digest: bytes
