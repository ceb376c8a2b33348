"""The project's own tasks as a source of prompts, judged by their checkers in this process."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from bittrue.errors import ConfigError
from bittrue.rl.rollout import Prompt
from bittrue.rl.source import Asked
from bittrue.rl.types import Outcome, Rollout, Scored
from bittrue.rl.verifiers.health import Health
from bittrue.text.parser import parse_answer
from bittrue.text.tokenizer import Tokenizer
from bittrue.train.tasks.catalogue import make_tasks
from bittrue.train.tasks.render import Renderer
from bittrue.train.tasks.task import Problem, Split, problem_in, seeded

_DIGESTED = 64  # prompts of the first step that stand in the digest for what the tasks generate


class Problems:
    """Problems of a run: the same for the same step, none of them in another split. Their checkers are
    bounded and take any text, so no process of their own is needed."""

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
            prompt = Prompt(f"{task.name}-{step}-{place}", tuple(self._renderer.prompt(problem)))
            asked.append(Asked(prompt, task.name, problem))
        return asked

    def score(self, pairs: Sequence[tuple[Asked, Sequence[Rollout]]]) -> list[list[Scored]]:
        """1 for an answer its checker takes, else 0; one cut at its limit is unparsable."""
        return [[self._scored(asked, rollout) for rollout in rollouts] for asked, rollouts in pairs]

    def digest(self) -> str:
        """Of tasks, weights, seed and split, and of the first prompts: the generators may change too."""
        weights = {task.name: weight for task, weight in self._tasks.items()}
        first = [asked.prompt.token_ids for asked in self.of_step(0, _DIGESTED)]
        facts = ["tasks", weights, self._seed, self._split, first]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def health(self) -> Health | None:
        return None

    def isolation(self) -> str:
        return "none: tasks of the project are judged in this process"

    def close(self) -> None:
        return

    def _scored(self, asked: Asked, rollout: Rollout) -> Scored:
        assert isinstance(asked.judge, Problem), "another source asked this"
        if rollout.is_truncated:
            return Scored(rollout, 0.0, "unparsable")
        is_right = self.is_right(asked.judge, rollout.answer_ids.tolist())
        outcome: Outcome = "right" if is_right else "wrong"
        return Scored(rollout, float(is_right), outcome)

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
