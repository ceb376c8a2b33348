"""Stop strings are found the same for any split, and nothing of one is shown too early."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bittrue.text.stop import StopMatcher


def run(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopMatcher(stops)
    shown = "".join(matcher.feed(piece).text for piece in pieces)
    shown += matcher.flush().text
    return shown, matcher.matched


@pytest.mark.parametrize(
    ("stops", "text", "shown", "matched"),
    [
        (["END"], "the END.", "the ", "END"),
        (["END"], "the EN", "the EN", None),
        (["ab", "abc"], "xabc", "x", "ab"),  # complete first
        (["abcd", "bc"], "xabcd", "xa", "bc"),
        (["bc", "abc"], "xabc", "x", "abc"),  # complete together: the longer
        (["aab"], "aaab", "a", "aab"),
        ([], "text", "text", None),
        ([""], "text", "text", None),
    ],
)
def test_the_first_complete_stop_string_ends_the_text(
    stops: list[str], text: str, shown: str, matched: str | None
) -> None:
    assert run(stops, [text]) == (shown, matched)
    assert run(stops, list(text)) == (shown, matched)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=4),
    st.text("abc", max_size=20),
    st.randoms(use_true_random=False),
)
def test_any_split_gives_the_same_end(stops: list[str], text: str, rng: random.Random) -> None:
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randint(0, 6)))
    pieces = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    ends = [(i, text[:i]) for i in range(len(text) + 1) if any(text[:i].endswith(s) for s in stops)]
    shown, matched = run(stops, pieces)
    if not ends:
        assert (shown, matched) == (text, None)
    else:
        longest = max((s for s in stops if ends[0][1].endswith(s)), key=len)
        assert (shown, matched) == (ends[0][1].removesuffix(longest), longest)


def test_only_a_possible_beginning_is_held_back() -> None:
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("aS").text == "a"
    assert matcher.feed("TO").text == ""
    assert matcher.feed("Y").text == "STOY"
    assert matcher.feed("STOPmore").matched == "STOP"
    assert matcher.feed("after").text == ""
