"""The journal tells events as one engine would have told them that never died."""

import pytest

from bittrue.engine.types import Abort, Choices, Request, SamplingParams, TokenEvent, TokenLogprob
from bittrue.errors import InvalidRequest
from bittrue.rl.token_journal import TokenJournal


def request(name: str, *, resume: tuple[int, ...] = ()) -> Request:
    return Request(request_id=name, prompt=(1, 2), params=SamplingParams(logprobs=0), resume=resume)


def event(name: str, *tokens: int, **facts: object) -> TokenEvent:
    scores = tuple(TokenLogprob(token, -token / 8) for token in tokens)
    return TokenEvent(request_id=name, token_ids=tokens, logprobs=scores, **facts)  # type: ignore[arg-type]


def choices(*versions: tuple[int, str]) -> Choices:
    shape = (0, 1, 1, 1)
    return Choices(
        first=0, experts=b"", expert_shape=shape, first_row=0, rows=b"", row_shape=shape, versions=versions
    )


def test_an_undisturbed_request_is_told_as_the_engine_tells_it() -> None:
    journal = TokenJournal("v1")
    journal.open(request("a"))
    told = event("a", 3, prompt_logprobs=(None, TokenLogprob(2, -1.0)), queued_s=0.5, num_cached_tokens=1)
    assert journal.record(told) is told
    last = event("a", 4, finish_reason="length", choices=choices((0, "v1")))
    assert journal.record(last) is last
    assert len(journal) == 0 and journal.record(last) is None


def test_what_a_second_engine_tells_anew_is_told_once() -> None:
    journal = TokenJournal("v1")
    journal.open(request("a", resume=(9,)))
    scores = (None, TokenLogprob(2, -1.0))
    first = event(
        "a", 3, prompt_logprobs=scores, queued_s=0.5, num_cached_tokens=1, num_drafted=4, num_accepted=1
    )
    journal.record(first)
    journal.note_update("v2", "retract")
    (entry,) = journal
    assert (entry.token_ids, entry.logprobs) == ([9, 3], [-3 / 8])
    assert journal.give_back() == [request("a", resume=(9, 3))]
    again = event(
        "a", 5, prompt_logprobs=scores, queued_s=0.1, num_cached_tokens=7, num_drafted=2, num_accepted=2
    )
    told = journal.record(again)
    assert told is not None and (told.token_ids, told.logprobs) == ((5,), again.logprobs)
    assert (told.prompt_logprobs, told.queued_s, told.num_cached_tokens) == (None, None, 1)
    assert (told.num_drafted, told.num_accepted) == (6, 3)
    journal.give_back()
    last = event("a", 6, finish_reason="length", num_drafted=1, choices=choices((0, "v2")))
    told = journal.record(last)
    assert told is not None and told.choices is not None
    assert (told.num_drafted, told.num_accepted) == (7, 3)
    assert told.choices.versions == ((0, "v1"), (2, "v2"))


def test_versions_of_which_nothing_is_left_are_forgotten() -> None:
    journal = TokenJournal("v1")
    for name in "ab":
        journal.open(request(name))
    journal.record(event("b", 3))
    journal.note_update("v2", "in_place")  # rows of the first may still be read
    (a, b) = journal
    assert (a.versions, b.versions) == ([(0, "v1"), (0, "v2")], [(0, "v1"), (1, "v2")])
    journal.give_back()  # the engine that had them is gone
    assert (a.versions, b.versions) == ([(0, "v2")], [(0, "v1"), (1, "v2")])
    journal.note_update("v3", "retract")
    assert (a.versions, b.versions) == ([(0, "v3")], [(0, "v1"), (1, "v3")])


def test_a_request_that_was_not_served_yet_is_told_as_new() -> None:
    journal = TokenJournal("v1")
    journal.open(request("a"))
    journal.give_back()
    told = journal.record(event("a", 3, queued_s=0.5, num_cached_tokens=2))
    assert told is not None and (told.queued_s, told.num_cached_tokens) == (0.5, 2)


def test_what_was_to_end_is_ended_in_the_next_engine_too() -> None:
    journal = TokenJournal("v1")
    for name in "abc":
        journal.open(request(name))
    assert journal.abort("b") and not journal.abort("z")
    journal.close("c")
    assert journal.give_back() == [request("a"), request("b"), Abort(request_id="b")]
    journal.note_update("v2", "abort")
    journal.open(request("d"))
    ended = [Abort(request_id="a"), Abort(request_id="b")]
    assert [message for message in journal.give_back() if isinstance(message, Abort)] == ended
    told = journal.record(event("b", finish_reason="abort", choices=choices((0, "v2"))))
    assert told is not None and told.choices is not None and told.choices.versions == ((0, "v1"),)
    with pytest.raises(InvalidRequest, match="already runs; give another id"):
        journal.open(request("d"))
