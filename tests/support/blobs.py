"""Names of pages and states as the engine makes them, for tests of the tiers."""

from bittrue.kv.identity import BlobName, namespace_digest, page_digest, state_digest

SPACE = namespace_digest({"weights": "test"}, "")
OTHER_SPACE = namespace_digest({"weights": "other"}, "")


def chain(length: int, *, first_token: int = 1, parent: bytes = SPACE) -> list[BlobName]:
    """``length`` pages, one after the other, behind ``parent``."""
    pages = []
    for index in range(length):
        digest = page_digest(parent, [first_token] * 128 if index == 0 else [index] * 128)
        pages.append(BlobName("page", parent, 128, digest))
        parent = digest
    return pages


def state(parent: bytes, offset: int) -> BlobName:
    """The state ``offset`` tokens after ``parent``."""
    return BlobName("state", parent, offset, state_digest(parent, [7] * offset))
