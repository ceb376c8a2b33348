from bittrue.engine.journal import Journal
from bittrue.engine.types import Request, SamplingParams, TokenEvent, TokenLogprob


def a_request(name: str, **fields: tuple[int, ...]) -> Request:
    return Request(request_id=name, prompt=(1, 2), params=SamplingParams(seed=3), **fields)  # type: ignore[arg-type]


def tokens(name: str, *ids: int, finish: bool = False) -> TokenEvent:
    return TokenEvent(request_id=name, token_ids=ids, finish_reason="stop" if finish else None)


def resumed(journal: Journal) -> list[Request]:
    return [entry.resumed() for entry in journal]


def test_unfinished_sequences_go_on_with_their_tokens_oldest_first() -> None:
    journal = Journal()
    for name in ("a", "b", "c"):
        journal.open([a_request(name)])
    for event in (tokens("b", 7), tokens("a", 5, 6), tokens("b", 8), tokens("c", 9, finish=True)):
        journal.record(event)
    assert [(request.request_id, request.resume) for request in resumed(journal)] == [
        ("a", (5, 6)),
        ("b", (7, 8)),
    ]
    assert all(request.params.seed == 3 and request.prompt == (1, 2) for request in resumed(journal))
    assert len(journal) == 2


def test_tokens_a_request_came_with_stay_in_its_resume() -> None:
    journal = Journal()
    journal.open([a_request("a", resume=(4,))])
    journal.record(tokens("a", 5))
    assert resumed(journal)[0].resume == (4, 5)


def test_events_of_closed_or_finished_requests_are_dropped() -> None:
    journal = Journal()
    journal.open([a_request("a")])
    journal.open([a_request("b")])
    assert journal.close("a")
    assert not journal.close("a")
    assert journal.record(tokens("a", 5)) is None
    assert journal.record(tokens("b", 5, finish=True)) is not None
    assert journal.record(tokens("b", 6)) is None
    assert resumed(journal) == []


def test_prompt_log_probabilities_are_told_once() -> None:
    journal = Journal()
    journal.open([a_request("a")])
    event = TokenEvent(request_id="a", token_ids=(5,), prompt_logprobs=(None, TokenLogprob(2, -1.0)))
    first, second = journal.record(event), journal.record(event)
    assert first is not None and first.prompt_logprobs is not None
    assert second is not None and second.prompt_logprobs is None
    assert second.token_ids == (5,)
