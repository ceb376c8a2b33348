"""OpTimes: where the time of the steps goes, op by op."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(slots=True)
class OpTimes:
    """Calls and seconds per op: of a captured step those of its kernels, of a direct one whole calls."""

    calls: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, name: str, seconds: float) -> None:
        self.calls[name] += 1
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())

    def rows(self) -> list[tuple[str, int, float, float]]:
        """(op, calls, seconds, share of the total), the longest first."""
        total = self.total_s or 1.0
        longest = sorted(self.seconds.items(), key=lambda item: (-item[1], item[0]))
        return [(name, self.calls[name], s, s / total) for name, s in longest]
