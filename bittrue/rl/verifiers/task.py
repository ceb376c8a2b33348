"""The project's own tasks as verifiers: bounded and pure, so they judge in the caller's process."""

from dataclasses import dataclass
from typing import ClassVar

from bittrue.rl.verifiers.verifier import Answers, Place, Room, Verdict, right, wrong
from bittrue.train.tasks.task import Question


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """Right is what the question's own check accepts: of all the model's messages, in order."""

    room: ClassVar[Room] = "here"
    question: Question
    kind: str = "task"
    visible: tuple[str, ...] = ()

    def prepare(self) -> None:
        return

    def judge(self, answers: Answers, place: Place) -> Verdict:
        return right() if self.question.check(answers) else wrong("not what the task accepts")
