"""How one vector is stored as bytes: the arithmetic shared by the ledger, the pools and the kernels (no
torch)."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["maths", "published"]
ActDtype = Literal["f32", "bf16"]

# Group sizes of the published quantisation rules (spec 2.9).
ACT_GROUP = 128
KV_GROUP = 64
FP4_GROUP = 32


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class RowFormat:
    """One stored vector of ``dim`` features.

    kind f32 / bf16: plain little-endian values.
    kind fp8: a KV row (spec 3.1): ``dim - rope_dim`` E4M3 bytes, then ``rope_dim`` bf16 values, then one
    ue8m0 scale byte per group of 64 of the first part, zero-padded to a multiple of 8 bytes (512/64 -> 584
    B). kind fp4: an index key: ``dim / 2`` bytes of E2M1 pairs (low nibble first), then one ue8m0 scale
    byte per group of 32 (128 -> 68 B). ``rope_dim`` is 0.
    """

    kind: Literal["f32", "bf16", "fp8", "fp4"]
    dim: int
    rope_dim: int = 0

    @property
    def num_scales(self) -> int:
        if self.kind == "fp8":
            return ceil_div(self.dim - self.rope_dim, KV_GROUP)
        return ceil_div(self.dim, FP4_GROUP) if self.kind == "fp4" else 0

    @property
    def bytes(self) -> int:
        if self.kind == "f32":
            return 4 * self.dim
        if self.kind == "bf16":
            return 2 * self.dim
        if self.kind == "fp8":
            return ceil_div(self.dim - self.rope_dim + 2 * self.rope_dim + self.num_scales, 8) * 8
        return self.dim // 2 + self.num_scales


def kv_row_format(level: Level, act: ActDtype, head_dim: int, rope_dim: int) -> RowFormat:
    """Format of window and compressed rows: FP8 at the published level, the activation dtype otherwise."""
    return RowFormat("fp8", head_dim, rope_dim) if level == "published" else RowFormat(act, head_dim)


def index_key_format(level: Level, act: ActDtype, index_head_dim: int) -> RowFormat:
    """Format of index keys: FP4 at the published level, the activation dtype otherwise."""
    return RowFormat("fp4", index_head_dim) if level == "published" else RowFormat(act, index_head_dim)
