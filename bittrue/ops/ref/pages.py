"""Where the compressed entries of a sequence lie in the pages."""

from torch import Tensor


def entry_rows(pages: Tensor, page_table: Tensor, seq: int, ids: Tensor) -> Tensor:
    """Stored bytes of entries ``ids`` [n] i64 of sequence ``seq`` -> [n, bytes] u8.

    pages [pages, entries per page, bytes]; entry e lies in page ``page_table[seq, e // E]`` at ``e % E``.
    """
    per_page = pages.shape[1]
    return pages[page_table[seq].long()[ids // per_page], ids % per_page]


def write_entry(pages: Tensor, page_table: Tensor, seq: int, entry: int, row: Tensor) -> None:
    """Stores ``row`` [bytes] u8 as entry ``entry`` of sequence ``seq``."""
    per_page = pages.shape[1]
    pages[int(page_table[seq, entry // per_page]), entry % per_page] = row
