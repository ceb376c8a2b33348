"""The evaluation: intervals, held-out problems, and shares that follow the answers a model gives."""

import json
from collections.abc import Callable, Sequence
from statistics import NormalDist

import pytest

from bittrue.bench.engines import Model
from bittrue.bench.result import decode_result
from bittrue.bench.tasks import (
    Dialogue,
    Outcome,
    TaskBench,
    Voice,
    converse,
    held_out,
    held_out_files,
    read_file,
    share,
    wilson,
)
from bittrue.cli.bench_tasks import parse_lengths
from bittrue.cli.main import run
from bittrue.engine.types import Request, SamplingParams, TokenEvent
from bittrue.errors import UsageError
from bittrue.model.presets import make_checkpoint
from bittrue.text.codec import ChatOptions, Codec
from bittrue.text.messages import ChatMessage
from bittrue.text.small_tokenizer import small_tokenizer_json
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.catalogue import TASK_NAMES, all_tasks
from bittrue.train.tasks.task import Problem

TOKENIZER = Tokenizer(small_tokenizer_json(322).encode(), source="small")
CODEC = Codec(TOKENIZER)
VOICE = Voice(TOKENIZER)
GREEDY = SamplingParams(temperature=0.0, max_tokens=256)


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals(right: int, total: int, low: float, high: float) -> None:
    """The published examples: Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    assert wilson(right, total) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (1, 10), (950, 1000), (999, 1000), (1000, 1000)])
def test_the_bounds_are_as_far_from_the_share_as_the_interval_says(right: int, total: int) -> None:
    """They solve (share - p)^2 = z^2 p (1 - p) / n, which is how the interval is defined."""
    for p in wilson(right, total):
        assert (right / total - p) ** 2 == pytest.approx(
            NormalDist().inv_cdf(0.975) ** 2 * p * (1 - p) / total, abs=1e-12
        )


def test_without_trials_nothing_is_known() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize("total", [1, 7, 1000])
def test_intervals_are_shares_and_mirror(total: int) -> None:
    for right in range(total + 1):
        low, high = wilson(right, total)
        assert 0 <= low <= right / total <= high <= 1
        assert wilson(total - right, total) == pytest.approx((1 - high, 1 - low), abs=1e-12)


# ---- held-out problems -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK_NAMES)
def test_held_out_problems_are_different_and_of_the_split(name: str) -> None:
    task = all_tasks()[name]
    test = held_out(task, 30, split="test", seed=0)
    assert len({problem.canonical for problem in test}) == len(test) == 30
    assert {problem.split for problem in test} == {"test"}
    assert test == held_out(task, 30, split="test", seed=0)
    other = held_out(task, 30, split="validation", seed=0)
    assert not {p.canonical for p in test} & {p.canonical for p in other}


def test_questions_about_files() -> None:
    files = held_out_files(4096, 300, split="test", seed=0)
    assert sum(map(len, files)) == 300 and 30 < len(files) <= 64
    for problems in files:
        beginnings = {problem.questions[0].prompt[:-5] for problem in problems}
        assert len(beginnings) == 1 and {problem.split for problem in problems} == {"test"}
        assert len(next(iter(beginnings))) + 17 in range(4096 - 8, 4097)
    (long,) = held_out_files(900_000, 50, split="test", seed=0)
    assert len({problem.questions[0].prompt[-5:] for problem in long}) == 50


# ---- the way of an answer ----------------------------------------------------------------------------------


class Oracle:
    """In the engine's place: answers every prompt with what ``say`` makes of the reference, in two pieces."""

    def __init__(
        self, problems: Sequence[Problem], say: Callable[[ChatMessage, Problem], ChatMessage]
    ) -> None:
        self._known: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._live: list[Request] = []
        self.most_together = 0
        for problem in problems:
            messages = problem.messages()
            for place, message in enumerate(messages):
                if message.role == "assistant":
                    prompt = CODEC.encode_chat(messages[:place], problem.options()).token_ids
                    options = ChatOptions(
                        tools=problem.tools, thinking=problem.thinking, ends_with_answer=True
                    )
                    said = [*messages[:place], say(message, problem)]
                    self._known[prompt] = CODEC.encode_chat(said, options).token_ids[len(prompt) :]

    def add(self, request: Request) -> None:
        self._live.append(request)

    def has_work(self) -> bool:
        return bool(self._live)

    def step(self) -> list[TokenEvent]:
        self.most_together = max(self.most_together, len(self._live))
        live, self._live = self._live, []
        events = []
        for request in live:
            tokens = self._known[request.prompt]
            half, name = len(tokens) // 2, request.request_id
            events.append(TokenEvent(request_id=name, token_ids=tokens[:half], num_cached_tokens=7))
            ended = "stop" if len(tokens) <= request.params.max_tokens else "length"
            events.append(
                TokenEvent(request_id=name, token_ids=tokens[half:], finish_reason=ended, num_cached_tokens=7)
            )
        return events


def outcomes_of(
    name: str,
    say: Callable[[ChatMessage, Problem], ChatMessage],
    *,
    count: int = 40,
    params: SamplingParams = GREEDY,
) -> list[Outcome]:
    problems = held_out(all_tasks()[name], count, split="test", seed=0)
    if name == "recall":  # one question each, as it is asked
        problems = [problem for file in held_out_files(512, count, split="test", seed=0) for problem in file]
    oracle = Oracle(problems, say)
    found = converse(oracle, [Dialogue(problem, params, VOICE) for problem in problems])
    assert oracle.most_together == count
    return found


def reference(message: ChatMessage, problem: Problem) -> ChatMessage:
    return message


def corrupted(message: ChatMessage, problem: Problem) -> ChatMessage:
    if message.tool_calls:
        return message
    return ChatMessage("assistant", message.content + "?", reasoning_content=message.reasoning_content)


def silent(message: ChatMessage, problem: Problem) -> ChatMessage:
    return ChatMessage("assistant", "")


@pytest.mark.parametrize("name", TASK_NAMES)
def test_reference_answers_score_one(name: str) -> None:
    outcomes = outcomes_of(name, reference)
    assert all(outcome.is_right and not outcome.is_cut for outcome in outcomes)
    assert all(outcome.is_called == (name == "calc") for outcome in outcomes)
    assert {outcome.num_cached for outcome in outcomes} == {7}


@pytest.mark.parametrize("say", [corrupted, silent])
@pytest.mark.parametrize("name", TASK_NAMES)
def test_wrong_answers_score_zero(name: str, say: Callable[[ChatMessage, Problem], ChatMessage]) -> None:
    outcomes = outcomes_of(name, say)
    assert not any(outcome.is_right for outcome in outcomes)
    assert all(outcome.is_called == (name == "calc" and say is corrupted) for outcome in outcomes)


@pytest.mark.parametrize("name", TASK_NAMES)
def test_an_answer_that_is_cut_off_is_wrong(name: str) -> None:
    outcomes = outcomes_of(name, reference, params=SamplingParams(temperature=0.0, max_tokens=1))
    assert all(outcome.is_cut and not outcome.is_right for outcome in outcomes)


def test_a_share_carries_its_interval() -> None:
    found = share("right answers", [True] * 3 + [False], {"task": "sort"})
    assert (found.median, found.low, found.high) == (0.75, *wilson(3, 4))
    assert found.repeats == 4 and found.labels["right"] == 3 and found.labels["task"] == "sort"


# ---- with a model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("tasks") / "tiny"
    return Model.of(make_checkpoint("tiny", 0, "bf16", place, vocab_size=322, draft="mtp"))


def test_a_random_model_answers_nothing(model: Model) -> None:
    bench = TaskBench(
        model,
        lambda line: None,
        tasks=("countdown", "recall"),
        recall_tokens=(1024,),
        count=12,
        samples=2,
        speculation="mtp",
        threads=1,
    )
    found = list(bench.run())
    rights = [m for m in found if m.name == "right answers"]
    assert [(m.labels["task"], m.labels["temperature"], m.repeats) for m in rights] == [
        ("countdown", 0.0, 12),
        ("countdown", 1.0, 24),
        ("recall", 0.0, 12),
    ]
    assert all(m.median < 0.5 and m.low == 0.0 for m in rights)
    among = next(m for m in found if m.name == "a right answer among the samples")
    assert among.repeats == 12
    assert all(0 <= m.median <= 1 and m.repeats > 0 for m in found if m.name == "accepted drafts")
    assert any(m.name == "accepted drafts" for m in found)


def test_questions_about_a_file_share_its_prefix(model: Model) -> None:
    """Only the key and what opens the answer is computed for each."""
    problems = held_out_files(4096, 1024, split="test", seed=0)[0]
    params = SamplingParams(temperature=0.0, max_tokens=2)
    with model.engine(max_context=4112, max_running=4, max_step_tokens=2048, threads=1) as engine:
        read_file(engine, VOICE, problems)
        outcomes = converse(engine, [Dialogue(problem, params, VOICE) for problem in problems])
    prompts = [VOICE.renderer.prompt(problem) for problem in problems]
    assert len(prompts) == 16
    for outcome, prompt in zip(outcomes, prompts, strict=True):
        assert len(prompt) - 10 <= outcome.num_cached <= len(prompt) - 6


def test_the_verb_prints_one_document(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "tasks", str(model.directory), "--tasks", "add,calc", "--n", "3", "--threads", "1"]
    assert run([*arguments, "--json"]) == 0
    text = capsys.readouterr().out
    result = decode_result(text, source="stdout")
    assert result.benchmark == "tasks" and json.loads(text)["config"]["split"] == "test"
    calls = result.find("well-formed calls", task="calc")
    assert calls is not None and calls.repeats == 3 and calls.median == 0.0
    assert run(arguments) == 0
    assert "well-formed calls" in capsys.readouterr().out


def test_bad_arguments_are_refused(model: Model, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, fact in (
        (["--tasks", "adding"], "there is no task 'adding'"),
        (["--n", "0"], "--n is 0; it must be at least 1"),
        (["--temperature", "-1"], "--temperature is -1.0"),
        (["--recall-tokens", "4K"], "--recall-tokens is '4K'"),
        (["--recall-tokens", "4096,200000000"], "write numbers from 64 to 95051015 by comma"),
        (["--threads", "-1"], "--threads is -1; it must be at least 0"),
    ):
        assert run(["bench", "tasks", str(model.directory), *arguments]) == 2
        assert fact in capsys.readouterr().err
    with pytest.raises(UsageError, match="numbers from 64"):
        parse_lengths("32")
