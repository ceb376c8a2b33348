"""An OpTable that keeps what learned routers and the index choose."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bittrue.ops.contracts import OpTable


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choices of one forward pass over T tokens, in the order of the layers: ``experts`` of the learned
    routers [T, k] i32, ``rows`` of the CSA layers [T, k] i32 ascending, -1 padded."""

    experts: list[Tensor] = field(default_factory=list)
    rows: list[Tensor] = field(default_factory=list)

    def add(self, other: "Chosen") -> None:
        """Appends what another pass chose."""
        self.experts.extend(other.experts)
        self.rows.extend(other.rows)


def recorded(table: OpTable, chosen: Chosen) -> OpTable:
    """``table``, which adds to ``chosen`` what its calls choose; the bits are the same."""

    def route_topk(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        ids, weights = table.route_topk(*args, **kwargs)
        chosen.experts.append(ids)
        return ids, weights

    def index_topk(*args: Any, **kwargs: Any) -> Tensor:
        ids = table.index_topk(*args, **kwargs)
        chosen.rows.append(ids)
        return ids

    return table.with_ops(route_topk=route_topk, index_topk=index_topk)
