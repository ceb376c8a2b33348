"""The file of one cached blob: a checked header, then the payload (docs/kv-disk-format.md)."""

import hashlib
import struct
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from bittrue.kv.identity import DIGEST_BYTES, BlobName

MAGIC = b"\x89BTKV\r\n\x1a"  # not text, and damaged by a transfer that changes line ends
FORMAT_VERSION = 1
CHECKSUM_BYTES = 16
_KINDS: dict[Literal["page", "state"], int] = {"page": 1, "state": 2}
# magic, format version, kind, reserved, header length, offset, payload length, namespace, layout, parent,
# digest, payload checksum; the header checksum follows.
_FIELDS = struct.Struct(
    f"<8sHBBHHQ{DIGEST_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s{DIGEST_BYTES}s{CHECKSUM_BYTES}s"
)
_VERSION = struct.Struct("<8sH")
HEADER_BYTES = _FIELDS.size + CHECKSUM_BYTES


class Fault(StrEnum):
    """Why bytes are not the blob that was asked for."""

    TRUNCATED = "truncated"  # shorter than it says
    CORRUPT = "corrupt"  # not what was written
    WRONG_NAME = "wrong-name"  # a sound blob, of another name
    STALE = "stale"  # of another format version
    FOREIGN = "foreign"  # of another namespace or layout


@dataclass(frozen=True, slots=True)
class BlobFormat:
    """What is written and read here: blobs of one ``layout`` [20 bytes], the meaning of payloads' bytes (row
    formats, widths, layers)."""

    layout: bytes

    def header(self, namespace: bytes, name: BlobName, payload: bytes) -> bytes:
        """The HEADER_BYTES bytes before ``payload`` in its file."""
        fields = _FIELDS.pack(
            MAGIC,
            FORMAT_VERSION,
            _KINDS[name.kind],
            0,
            HEADER_BYTES,
            name.offset,
            len(payload),
            namespace,
            self.layout,
            name.parent,
            name.digest,
            _checksum(payload),
        )
        return fields + _checksum(fields)

    def encode(self, namespace: bytes, name: BlobName, payload: bytes) -> bytes:
        """The whole file."""
        return self.header(namespace, name, payload) + payload

    def decode(self, namespace: bytes, name: BlobName, file: bytes) -> bytes | Fault:
        """The payload of a whole file, or why there is none."""
        header = file[:HEADER_BYTES]
        length = self.payload_bytes(namespace, name, header, len(file))
        if isinstance(length, Fault):
            return length
        payload = file[HEADER_BYTES:]
        return payload if self.is_sound(header, payload) else Fault.CORRUPT

    def payload_bytes(self, namespace: bytes, name: BlobName, header: bytes, file_bytes: int) -> int | Fault:
        """Bytes of the payload behind ``header``, the first HEADER_BYTES bytes (or all there are) of a file
        of ``file_bytes`` bytes; or why the file is not the blob ``name``."""
        if len(header) < _VERSION.size:
            return Fault.TRUNCATED
        magic, version = _VERSION.unpack_from(header)
        if magic != MAGIC:
            return Fault.CORRUPT
        if version != FORMAT_VERSION:
            return Fault.STALE  # before anything else is believed: the rest may mean something else
        if len(header) < HEADER_BYTES:
            return Fault.TRUNCATED
        if _checksum(header[: _FIELDS.size]) != header[_FIELDS.size :]:
            return Fault.CORRUPT
        _, _, kind, reserved, header_bytes, offset, length, *names, _ = _FIELDS.unpack_from(header)
        if reserved != 0 or header_bytes != HEADER_BYTES:
            return Fault.CORRUPT
        if names[:2] != [namespace, self.layout]:
            return Fault.FOREIGN
        if (kind, offset, *names[2:]) != (_KINDS[name.kind], name.offset, name.parent, name.digest):
            return Fault.WRONG_NAME
        if file_bytes != HEADER_BYTES + length:
            return Fault.TRUNCATED if file_bytes < HEADER_BYTES + length else Fault.CORRUPT
        return int(length)

    def is_sound(self, header: bytes, payload: bytes) -> bool:
        """Whether ``payload`` is what the (checked) header was written for."""
        return header[_FIELDS.size - CHECKSUM_BYTES : _FIELDS.size] == _checksum(payload)


def _checksum(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=CHECKSUM_BYTES, person=b"bittrue-blob").digest()
