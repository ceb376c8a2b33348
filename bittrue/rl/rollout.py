"""Samples from an engine: a group of rollouts for every prompt."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from bittrue.engine.record import expert_ids, row_ids
from bittrue.engine.types import Choices, EngineStats, Request, Running, SamplingParams, TokenEvent
from bittrue.errors import RolloutInvalid
from bittrue.model.weight_update import WeightUpdate
from bittrue.rl.types import Group, Rollout, Span


class RolloutEngine(Protocol):
    """What sampling asks of an engine, wherever it runs. ``step`` gets on, or waits until something has come;
    ``poll`` gives what has come already."""

    def add(self, request: Request) -> None: ...
    def abort(self, request_id: str) -> None: ...
    def has_work(self) -> bool: ...
    def step(self) -> list[TokenEvent]: ...
    def poll(self) -> list[TokenEvent]: ...
    def update_weights(self, update: WeightUpdate, *, running: Running = "retract") -> bool: ...
    def stats(self) -> EngineStats: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Prompt:
    """What is asked, under the name its group has."""

    key: str
    token_ids: tuple[int, ...]


@dataclass(slots=True)
class Answer:
    """What has come of one request. ``last``: its last event, once there is one."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    last: TokenEvent | None = None


class Inbox:
    """Hands requests to an engine and gathers what each has become, whoever asked."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine
        self._answers: dict[str, Answer] = {}

    def add(self, request: Request) -> None:
        self._answers[request.request_id] = Answer()
        self.engine.add(request)

    def is_done(self, names: Sequence[str]) -> bool:
        return all(self._answers[name].last is not None for name in names)

    def poll(self) -> None:
        """Takes in what has come, without waiting."""
        self._take_in(self.engine.poll())

    def step(self) -> None:
        """Lets the engine get on, or waits until it has."""
        self._take_in(self.engine.step())

    def take(self, names: Sequence[str]) -> list[Answer]:
        """The whole answers of these requests, which are forgotten here."""
        while not self.is_done(names):
            self.step()
        return [self._answers.pop(name) for name in names]

    def _take_in(self, events: Sequence[TokenEvent]) -> None:
        for event in events:
            answer = self._answers[event.request_id]
            answer.token_ids += event.token_ids
            answer.logprobs += [entry.logprob for entry in event.logprobs]
            if event.finish_reason is not None:
                answer.last = event


class Sampler:
    """Asks for ``group_size`` answers to each prompt, all at once: the engine batches them, shares their
    prompts and drafts as it is set to. ``policy_versions``: number of each weight version it may have."""

    def __init__(
        self, inbox: Inbox, params: SamplingParams, *, group_size: int, policy_versions: Mapping[str, int]
    ) -> None:
        """``params``: of every answer but for the seed, at temperature 1: the log-probabilities the engine
        reports are those the tokens were drawn with. At temperature 0 nothing is drawn: such rollouts are
        for measuring."""
        shaped = params.temperature not in (0.0, 1.0) or params.top_p != 1.0 or params.top_k or params.min_p
        if shaped or not _is_plain(params):
            raise RolloutInvalid(
                "tokens would be drawn from another distribution than the log-probabilities that are "
                "recorded; sample at temperature 1 without top_p, top_k, min_p, penalties, biases or grammars"
            )
        self._inbox = inbox
        self._params = msgspec.structs.replace(params, logprobs=0)
        self._group_size = group_size
        self._policy_versions = policy_versions

    def ask(self, prompts: Sequence[Prompt], *, seed: int) -> None:
        """Begins a group for each prompt; their keys are unique among all that are under way. The same seed
        and weights give the same rollouts, however they are computed."""
        for prompt in prompts:
            for i, name in enumerate(self._names(prompt)):
                params = msgspec.structs.replace(self._params, seed=_seed(seed, prompt.key, i))
                self._inbox.add(
                    Request(request_id=name, prompt=prompt.token_ids, params=params, records_choices=True)
                )

    def is_done(self, prompt: Prompt) -> bool:
        return self._inbox.is_done(self._names(prompt))

    def take(self, prompt: Prompt) -> Group:
        """The group of a prompt that was asked, waiting for it. Raises RolloutInvalid where an answer ended
        in an error."""
        answers = self._inbox.take(self._names(prompt))
        return Group(prompt.key, _shared([self._rollout(prompt, answer) for answer in answers]))

    def groups(self, prompts: Sequence[Prompt], *, seed: int) -> list[Group]:
        """A group for each prompt, in order: asks and waits."""
        self.ask(prompts, seed=seed)
        return [self.take(prompt) for prompt in prompts]

    def _names(self, prompt: Prompt) -> list[str]:
        return [f"{prompt.key}/{i}" for i in range(self._group_size)]

    def _rollout(self, prompt: Prompt, answer: Answer) -> Rollout:
        event = answer.last
        assert event is not None and event.finish_reason is not None
        if event.finish_reason in ("error", "abort") or event.choices is None:
            fact = f"rollout of prompt {prompt.key} ended with {event.finish_reason}: {event.error}"
            raise RolloutInvalid(fact, prompt_key=prompt.key)
        return Rollout(
            prompt_key=prompt.key,
            prompt_ids=np.array(prompt.token_ids, np.int32),
            answer_ids=np.array(answer.token_ids, np.int32),
            logprobs=np.array(answer.logprobs, np.float32),
            spans=self._spans(event.choices, len(answer.token_ids)),
            finish_reason=event.finish_reason,
            experts=expert_ids(event.choices),
            index_rows=row_ids(event.choices),
        )

    def _spans(self, choices: Choices, num_tokens: int) -> tuple[Span, ...]:
        begins = [min(begin, num_tokens) for begin, _ in choices.versions] + [num_tokens]
        spans = [
            Span(self._policy_versions[version], end - begin)
            for (_, version), begin, end in zip(choices.versions, begins, begins[1:], strict=False)
        ]
        return tuple(span for i, span in enumerate(spans) if span.num_tokens or (i == 0 and num_tokens))


def _shared(rollouts: Sequence[Rollout]) -> tuple[Rollout, ...]:
    """Records that begin behind a cached prompt begin where that of a sibling does, which computed it: the
    same tokens, by the same weights."""
    longest = min(rollouts, key=lambda rollout: _unrecorded(rollout, rollout.experts))
    return tuple(_completed(rollout, longest) for rollout in rollouts)


def _unrecorded(rollout: Rollout, record: NDArray[np.unsignedinteger] | None) -> int:
    """Computed tokens before the first of ``record``."""
    return rollout.num_tokens - 1 - (0 if record is None else len(record))


def _completed(rollout: Rollout, source: Rollout) -> Rollout:
    is_same = rollout.spans[:1] and source.spans[:1]
    if not is_same or rollout.spans[0].policy_version != source.spans[0].policy_version:
        return rollout
    joined = []
    for own, other in ((rollout.experts, source.experts), (rollout.index_rows, source.index_rows)):
        assert own is not None and other is not None
        begin, end = _unrecorded(source, other), min(_unrecorded(rollout, own), len(rollout.prompt_ids))
        is_gap = begin < end == _unrecorded(rollout, own)
        joined.append(np.concatenate([other[: end - begin], own]) if is_gap else own)
    return replace(rollout, experts=joined[0], index_rows=joined[1])


def _seed(seed: int, key: str, index: int) -> int:
    """Below 2^63, a function of what it is for."""
    digest = hashlib.blake2b(f"{seed}\n{key}\n{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _is_plain(params: SamplingParams) -> bool:
    return (
        params.repetition_penalty == 1.0
        and not params.presence_penalty
        and not params.frequency_penalty
        and not params.logit_bias
        and not params.min_tokens
        and params.grammar is None
    )
