"""What a model knows: held-out problems of every task, asked of the engine and scored by their checkers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bittrue.bench.engines import Model
from bittrue.bench.result import Label, Measurement
from bittrue.engine.engine import Engine
from bittrue.engine.types import Request, SamplingParams
from bittrue.errors import BittrueError
from bittrue.text.codec import Codec
from bittrue.text.messages import ChatMessage
from bittrue.text.parser import ParsedAnswer, parse_answer
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.calc import ERROR
from bittrue.train.tasks.catalogue import all_tasks
from bittrue.train.tasks.recall import shared_file
from bittrue.train.tasks.render import Renderer
from bittrue.train.tasks.task import Problem, Split, Task, problem_in, seeded

SHORT_TASKS = tuple(name for name in all_tasks() if name != "recall")
SAMPLED_TASKS = ("countdown",)  # many answers are right: measured as they are drawn, too
_Z = 1.959963984540054  # of a two-sided interval that holds 95 %
_SHORT_CONTEXT = 2048
_MAX_ANSWER = 80  # tokens, with neither thinking nor tools: the longest answer a checker takes has 65
_MAX_LONG_ANSWER = 256  # with either: the longest reference, a call of the calculator, has about 140
_MAX_VALUE = 16  # tokens of an answer of recall, whose reference has 8
_DRAWS = 50  # times the problems wanted: a task with fewer than those has them all
_PREFILLED = 2**18  # tokens of the files that questions of one length are asked about, together
_LONG = 32768  # beyond, a question takes long: fewer are asked
_RUNNING, _RUNNING_LONG = 64, 4
_STEP_TOKENS = 2048

Tell = Callable[[str], None]


def wilson(right: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share of which ``right`` of ``total`` independent trials were seen (Wilson's
    score interval); all from 0 to 1 without a trial."""
    if total == 0:
        return 0.0, 1.0
    share, square = right / total, _Z**2 / total
    centre = (share + square / 2) / (1 + square)
    spread = _Z / (1 + square) * math.sqrt(share * (1 - share) / total + square / (4 * total))
    # At the ends the bound is exact; the sum above would round.
    return (0.0 if right == 0 else centre - spread), (1.0 if right == total else centre + spread)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one problem went. ``is_called``: whether a problem with tools got one call of its tool that it
    could compute."""

    is_right: bool
    is_called: bool = False
    is_cut: bool = False  # an answer did not end within its tokens
    num_cached: int = 0  # tokens of the first prompt that were not computed again


class Voice:
    """What all conversations with one tokenizer are rendered by."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.codec = Codec(tokenizer)
        self.renderer = Renderer(tokenizer)


@dataclass(slots=True)
class Dialogue:
    """One question of a problem as it is asked: prompts for the engine, answers read by the parser the server
    uses, results of tools said back."""

    problem: Problem
    params: SamplingParams
    voice: Voice
    answers: list[ParsedAnswer] = field(default_factory=list)
    num_cached: int = 0
    _messages: list[ChatMessage] = field(default_factory=list)
    _generated: list[int] = field(default_factory=list)
    _is_cut: bool = False

    def prompt(self) -> tuple[int, ...]:
        """The tokens to answer next."""
        if not self.answers:
            return tuple(self.voice.renderer.prompt(self.problem))
        asked = ChatMessage("user", self.problem.questions[0].prompt)
        return self.voice.codec.encode_chat([asked, *self._messages], self.problem.options()).token_ids

    def feed(self, token_ids: Sequence[int]) -> None:
        """More of the answer."""
        self._generated += token_ids

    def ended(self, reason: str) -> bool:
        """The answer ended; whether there is more to ask."""
        self._is_cut = reason == "length"
        if self._is_cut:
            return False
        answer = parse_answer(
            self.voice.tokenizer,
            [token_id for token_id in self._generated if token_id != self.voice.tokenizer.eos_id],
            request_id="task",
            starts_in_reasoning=self.problem.thinking.is_enabled,
            parse_tools=bool(self.problem.tools),
        )
        self._generated = []
        self.answers.append(answer)
        follow_up = self.problem.questions[0].follow_up(self.answers)
        if follow_up is None:
            return False
        said = ChatMessage("assistant", answer.content, answer.reasoning, answer.tool_calls)
        self._messages += [said, follow_up]
        return True

    def outcome(self) -> Outcome:
        question = self.problem.questions[0]
        result = question.follow_up(self.answers[:1]) if self.answers else None
        return Outcome(
            is_right=not self._is_cut and question.check(self.answers),
            is_called=result is not None and result.content != ERROR,
            is_cut=self._is_cut,
            num_cached=self.num_cached,
        )


def converse(engine: Engine, dialogues: Sequence[Dialogue]) -> list[Outcome]:
    """Asks everything of an engine that has nothing else to do, as many together as it runs.

    Raises BittrueError where a request ends in an error.
    """
    assert not engine.has_work(), "the engine is busy"
    live = {f"{place}.0": dialogue for place, dialogue in enumerate(dialogues)}

    def ask(name: str, dialogue: Dialogue) -> None:
        engine.add(Request(request_id=name, prompt=dialogue.prompt(), params=dialogue.params))

    for name, dialogue in live.items():
        ask(name, dialogue)
    while engine.has_work():
        for event in engine.step():
            dialogue = live[event.request_id]
            dialogue.feed(event.token_ids)
            if event.finish_reason in ("error", "abort"):
                raise BittrueError(f"a request ended with {event.finish_reason!r}: {event.error}")
            if event.finish_reason is None:
                continue
            if not dialogue.answers:
                dialogue.num_cached = event.num_cached_tokens
            del live[event.request_id]
            if dialogue.ended(event.finish_reason):
                place, turn = event.request_id.split(".")
                name = f"{place}.{int(turn) + 1}"
                live[name] = dialogue
                ask(name, dialogue)
    return [dialogue.outcome() for dialogue in dialogues]


def read_file(engine: Engine, voice: Voice, problems: Sequence[Problem]) -> None:
    """Computes what the prompts of ``problems`` begin with alike, so that each of them starts from there: the
    cache keeps the state at the end of a prompt."""
    first = voice.renderer.prompt(problems[0])
    shared = len(first) - 1
    for problem in problems[1:]:
        other = voice.renderer.prompt(problem)
        while first[:shared] != other[:shared]:
            shared -= 1
    engine.generate([first[:shared]], SamplingParams(temperature=0.0, max_tokens=1))


def answer_limit(problem: Problem) -> int:
    """Tokens an answer may have: more than any that a checker takes."""
    return _MAX_LONG_ANSWER if problem.tools or problem.thinking.is_enabled else _MAX_ANSWER


def held_out(task: Task, count: int, *, split: Split, seed: int) -> list[Problem]:
    """``count`` different problems of a split, or all there are where a task has fewer (as far as drawing
    finds them)."""
    rng = seeded("held out", seed, split, task.name)
    found: dict[str, Problem] = {}
    for _ in range(_DRAWS * count):
        problem = problem_in(task, split, rng)
        found.setdefault(problem.canonical, problem)
        if len(found) == count:
            break
    return list(found.values())


def held_out_files(num_tokens: int, count: int, *, split: Split, seed: int) -> list[list[Problem]]:
    """``count`` questions of a split about files of ``num_tokens`` tokens with their prompts: several about
    each file, the more, the longer the files are."""
    rng = seeded("held out files", seed, split, num_tokens)
    num_files = max(1, min(count, _PREFILLED // num_tokens))
    files: list[list[Problem]] = []
    left = count
    while left > 0:
        wanted = min(left, -(-count // num_files))
        candidates = shared_file(rng, num_tokens, 20 * wanted)
        problems = [problem for problem in candidates if problem.split == split][:wanted]
        if problems:
            files.append(problems)
            left -= len(problems)
    return files


@dataclass(frozen=True, slots=True)
class TaskBench:
    """Right answers of a model, by task.

    ``count`` problems a task, ``long_count`` questions at lengths over 32,768 tokens. ``samples``: answers to
    each problem where they are sampled. ``speculation`` changes no answer; what it drafts is measured.
    """

    model: Model
    tell: Tell
    tasks: tuple[str, ...] = tuple(all_tasks())
    recall_tokens: tuple[int, ...] = (4096, 32768)
    count: int = 1000
    long_count: int = 200
    temperature: float = 0.0
    samples: int = 1
    split: Split = "test"
    seed: int = 0
    speculation: str = "off"
    threads: int = 0

    def run(self) -> Iterator[Measurement]:
        """The measurements, one after the other as they are known."""
        short = [name for name in SHORT_TASKS if name in self.tasks]
        if short:
            yield from self._short(short)
        if "recall" in self.tasks:
            for num_tokens in self.recall_tokens:
                yield from self._recall(num_tokens)

    def _short(self, names: Sequence[str]) -> Iterator[Measurement]:
        tasks = all_tasks()
        knobs = {"threads": self.threads, "speculation": self.speculation, "max_queue": 2**31}
        with self.model.engine(
            max_context=_SHORT_CONTEXT, max_running=_RUNNING, max_step_tokens=_STEP_TOKENS, **knobs
        ) as engine:
            for name in names:
                temperatures = [self.temperature]
                if name in SAMPLED_TASKS and self.temperature == 0:
                    temperatures.append(1.0)
                problems = held_out(tasks[name], self.count, split=self.split, seed=self.seed)
                for temperature in temperatures:
                    self.tell(f"{name}: {len(problems)} problems at temperature {temperature:g}")
                    outcomes = converse(engine, self._dialogues(problems, temperature))
                    labels: dict[str, Label] = {"task": name, "temperature": temperature}
                    yield from self._measured(problems, outcomes, labels)
            yield from accepted(engine, "short tasks")

    def _dialogues(self, problems: Sequence[Problem], temperature: float) -> list[Dialogue]:
        """Every problem as often as it is asked, all its samples in turn."""
        repeats = self.samples if temperature > 0 else 1
        most = answer_limit(problems[0])
        voice, first_seed = Voice(self.model.loaded.tokenizer), self.seed * 2**32
        return [
            Dialogue(
                problem,
                SamplingParams(temperature=temperature, seed=first_seed + number, max_tokens=most),
                voice,
            )
            for number, problem in enumerate(p for p in problems for _ in range(repeats))
        ]

    def _recall(self, num_tokens: int) -> Iterator[Measurement]:
        count = self.count if num_tokens <= _LONG else min(self.count, self.long_count)
        files = held_out_files(num_tokens, count, split=self.split, seed=self.seed)
        knobs = {"threads": self.threads, "speculation": self.speculation, "max_queue": 2**31}
        # Prompts of a million tokens wait outside the engine.
        together = _RUNNING if num_tokens <= _LONG else _RUNNING_LONG
        voice = Voice(self.model.loaded.tokenizer)
        params = SamplingParams(temperature=self.temperature, seed=self.seed, max_tokens=_MAX_VALUE)
        outcomes: list[Outcome] = []
        with self.model.engine(
            max_context=num_tokens + _MAX_VALUE,
            max_running=min(together, len(files[0])),
            max_step_tokens=_STEP_TOKENS,
            **knobs,
        ) as engine:
            for place, problems in enumerate(files):
                self.tell(f"recall at {num_tokens} tokens: file {place + 1} of {len(files)}")
                read_file(engine, voice, problems)
                for at in range(0, len(problems), together):
                    group = problems[at : at + together]
                    outcomes += converse(engine, [Dialogue(p, params, voice) for p in group])
            labels: dict[str, Label] = {"task": "recall", "temperature": self.temperature}
            labels |= {"tokens": num_tokens, "files": len(files)}
            labels["cached"] = sum(outcome.num_cached for outcome in outcomes)
            yield from self._measured([p for file in files for p in file], outcomes, labels)
            yield from accepted(engine, f"recall at {num_tokens}")

    def _measured(
        self, problems: Sequence[Problem], outcomes: Sequence[Outcome], labels: dict[str, Label]
    ) -> Iterator[Measurement]:
        rights = [outcome.is_right for outcome in outcomes]
        cut = sum(outcome.is_cut for outcome in outcomes)
        repeats = len(outcomes) // len(problems)
        labels = {**labels, "problems": len(problems), "samples": repeats}
        yield share("right answers", rights, {**labels, "cut": cut})
        if repeats > 1:
            any_right = [any(rights[i : i + repeats]) for i in range(0, len(rights), repeats)]
            yield share("a right answer among the samples", any_right, labels)
        if problems[0].tools:
            yield share("well-formed calls", [outcome.is_called for outcome in outcomes], labels)


def share(name: str, trials: Sequence[bool], labels: dict[str, Label]) -> Measurement:
    """A share as a measurement: ``low`` and ``high`` are its 95 % interval, ``repeats`` the trials."""
    right, total = sum(trials), len(trials)
    low, high = wilson(right, total)
    found = {**labels, "right": right, "interval": "Wilson 95 %"}
    return Measurement(name, "ratio", right / total if total else 0.0, low, high, total, found)


def accepted(engine: Engine, text: str) -> Iterator[Measurement]:
    """Of the drafts at each place of a step, those that became output, since the engine's start."""
    drafts = engine.stats().drafts
    pairs = zip(drafts.drafted_at, drafts.accepted_at, strict=True)
    for place, (drafted, taken) in enumerate(pairs, 1):
        if drafted:
            low, high = wilson(taken, drafted)
            labels: dict[str, Label] = {"place": place, "text": text, "interval": "Wilson 95 %"}
            yield Measurement("accepted drafts", "ratio", taken / drafted, low, high, drafted, labels)
