"""How far two engines agree on the next tokens of one text."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bittrue.bench.result import Label, Measurement, measured

Scores = Mapping[str, Sequence[float]]

# Two float32 implementations differ by rounding alone: no likeliest token may differ where it leads by more.
EXACT_NATS = 2e-3
# Once the index leaves rows out, a rounding may choose another row, which moves single positions by much.
PRUNED_SHARE = 0.97
# bf16 arithmetic or cached rows in f16: single positions differ by much (another expert, another row), the
# rest by noise. Ours in bf16 against ours in float32 has a share of 0.92 and an error of 0.012.
ROUNDED_SHARE = 0.85
ROUNDED_NATS = 0.03


@dataclass(frozen=True, slots=True)
class Agreement:
    """Over all positions: where the likeliest token is the same, and how far the text's log-probabilities
    are."""

    num_positions: int
    num_same: int
    largest_lost_margin: float  # nats by which the expected token led, where another was found
    errors: tuple[float, ...]  # |difference| of the log-probability of the text's own token

    @property
    def share(self) -> float:
        return self.num_same / self.num_positions

    @property
    def median_error(self) -> float:
        return sorted(self.errors)[len(self.errors) // 2]

    def agrees(self, *, is_exact: bool, is_pruned: bool) -> bool:
        """Whether the other computes the same model. ``is_exact``: in float32. ``is_pruned``: the index left
        rows out."""
        if not is_exact:
            return self.share >= ROUNDED_SHARE and self.median_error <= ROUNDED_NATS
        return self.share >= PRUNED_SHARE if is_pruned else self.largest_lost_margin <= EXACT_NATS

    def describe(self) -> str:
        return (
            f"likeliest token the same at {self.num_same} of {self.num_positions} positions, "
            f"log-probability off by {self.median_error:.1e} (median), {max(self.errors):.1e} (most), "
            f"lost margin {self.largest_lost_margin:.1e}"
        )

    def measurements(self, labels: Mapping[str, Label]) -> Iterator[Measurement]:
        yield measured(
            "same likeliest token", "ratio", [self.share], {**labels, "positions": self.num_positions}
        )
        worst = {"most": max(self.errors), "lost_margin": self.largest_lost_margin}
        yield measured("log-probability error", "ratio", self.errors, {**labels, **worst})


def compare(expected: Scores, found: Scores) -> Agreement:
    """``expected`` has margins."""
    pairs = list(zip(expected["argmax"], found["argmax"], expected["margin"], strict=True))
    return Agreement(
        num_positions=len(pairs),
        num_same=sum(a == b for a, b, _ in pairs),
        largest_lost_margin=max((margin for a, b, margin in pairs if a != b), default=0.0),
        errors=tuple(abs(a - b) for a, b in zip(expected["logprob"], found["logprob"], strict=True)),
    )
