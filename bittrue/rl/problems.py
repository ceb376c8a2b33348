"""The project's own tasks as prompts for a policy, with their checkers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bittrue.errors import ConfigError
from bittrue.rl.rollout import Prompt
from bittrue.rl.types import Outcome, Rollout, Scored
from bittrue.text.parser import parse_answer
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.catalogue import make_tasks
from bittrue.train.tasks.render import Renderer
from bittrue.train.tasks.task import Problem, Split, problem_in, seeded


@dataclass(frozen=True, slots=True)
class Asked:
    """A problem and the prompt that asks it."""

    problem: Problem
    prompt: Prompt


class Problems:
    """Problems of a run: the same for the same step, none of them in another split."""

    def __init__(
        self, tokenizer: Tokenizer, weights: Mapping[str, float], *, seed: int, split: Split = "train"
    ) -> None:
        """``weights``: shares of the problems, by task (any scale). Raises ConfigError for tasks that are no
        single question."""
        self._tokenizer, self._renderer = tokenizer, Renderer(tokenizer)
        self._seed, self._split = seed, split
        self._tasks = make_tasks(weights)
        for task in self._tasks:
            example = problem_in(task, split, seeded("example"))
            if len(example.questions) > 1 or example.tools:
                raise ConfigError(
                    f"problems of {task.name} take several answers, and a policy is trained on one answer to "
                    "each; choose other tasks",
                    field="tasks",
                )

    def of_step(self, step: int, count: int) -> list[Asked]:
        """``count`` problems, each by a name of its own."""
        rng = seeded("problems", self._seed, self._split, step)
        tasks = rng.choices(list(self._tasks), list(self._tasks.values()), k=count)
        asked = []
        for place, task in enumerate(tasks):
            problem = problem_in(task, self._split, rng)
            key = f"{task.name}-{step}-{place}"
            asked.append(Asked(problem, Prompt(key, tuple(self._renderer.prompt(problem)))))
        return asked

    def score(self, asked: Asked, rollouts: Sequence[Rollout]) -> list[Scored]:
        """1 for an answer its checker takes, else 0; one cut at its limit is wrong."""
        return [Scored(rollout, *self._verdict(asked.problem, rollout)) for rollout in rollouts]

    def is_right(self, problem: Problem, token_ids: Sequence[int]) -> bool:
        """Whether these tokens, the end token among them, answer the problem."""
        eos = self._tokenizer.eos_id
        if not token_ids or token_ids[-1] != eos:
            return False
        answer = parse_answer(
            self._tokenizer,
            token_ids[:-1],
            request_id="problem",
            starts_in_reasoning=problem.thinking.is_enabled,
            parse_tools=False,
        )
        return problem.questions[0].check([answer])

    def _verdict(self, problem: Problem, rollout: Rollout) -> tuple[float, Outcome]:
        if rollout.is_truncated:
            return 0.0, "unparsable"
        is_right = self.is_right(problem, rollout.answer_ids.tolist())
        return (1.0, "right") if is_right else (0.0, "wrong")
