"""On-policy distillation: the student's own answers, judged token by token by specialists.

DeepSeek-V4's report: sum over teachers of weight * KL(student || teacher) with the whole vocabulary. Of a
teacher only what its head reads is kept; logits are made when they are needed, and never lie about whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bittrue.rl.packing import Packing, Reduction, Totals, reduce
from bittrue.train.document import Document
from bittrue.train.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Teacher:
    """A specialist. ``tasks``: those it teaches; empty = all."""

    name: str
    trainer: Trainer
    weight: float
    tasks: tuple[str, ...] = ()

    def teaches(self, task: str) -> bool:
        return not self.tasks or task in self.tasks


@dataclass(frozen=True, slots=True, eq=False)
class Lesson:
    """What a teacher has to say of a step's targets: ``hidden`` [n, D] act of those at ``places`` [n] i64,
    ascending."""

    teacher: Teacher
    places: Tensor
    hidden: Tensor


def lessons(teachers: Sequence[Teacher], documents: Sequence[Document], tasks: Sequence[str]) -> list[Lesson]:
    """Every teacher's pass over the documents whose task it teaches."""
    counts = [int(document.is_target[1:].sum()) for document in documents]
    begins = [sum(counts[:i]) for i in range(len(counts))]
    found = []
    for teacher in teachers:
        own = [i for i, task in enumerate(tasks) if teacher.teaches(task)]
        if own:
            places = torch.cat([torch.arange(begins[i], begins[i] + counts[i]) for i in own])
            found.append(Lesson(teacher, places, teacher.trainer.hidden([documents[i] for i in own])))
    return found


class DistillObjective:
    """The divergence of the student from its teachers at the answers' tokens. ``divergence`` [N] f64: what
    was computed for each, the teachers' weights included."""

    leaves: Sequence[Tensor] = ()

    def __init__(self, taught: Sequence[Lesson], packing: Packing, reduction: Reduction, length: int) -> None:
        self.recomputed = torch.full((len(packing.mask),), torch.nan)
        self.divergence = torch.zeros(len(packing.mask), dtype=torch.float64)
        self.packing = packing
        self._taught, self._reduction = taught, reduction
        self._totals = Totals.of(packing, length=length)

    def __call__(self, logprobs: Tensor, logits: Tensor, hidden: Tensor, first: int) -> Tensor:
        here = slice(first, first + len(logprobs))
        self.recomputed[here] = logprobs.detach()
        losses = torch.zeros(len(logprobs), dtype=torch.float64)
        for lesson in self._taught:
            begin, end = torch.searchsorted(lesson.places, torch.tensor([here.start, here.stop])).tolist()
            if begin == end:
                continue
            rows = lesson.places[begin:end] - first
            taught = lesson.teacher.trainer.project(lesson.hidden[begin:end])
            apart = reverse_kl(logits.index_select(0, rows), taught)
            losses = losses.index_add(0, rows, lesson.teacher.weight * apart)
        self.divergence[here] = losses.detach()
        ids = self.packing.sequence_ids[here] - self.packing.sequence_ids[first]
        part = Packing(ids, self.packing.mask[here], int(ids[-1]) + 1)
        return reduce(losses, part, self._reduction, self._totals)

    def loss(self) -> float:
        """Of the whole step, as it was minimised."""
        return float(reduce(self.divergence, self.packing, self._reduction, self._totals))

    def mean(self) -> float:
        """Nats a token."""
        return self.packing.mean(self.divergence)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) of each row over the whole vocabulary: [R] f64, nats, from logits [R, V]. The
    gradient flows into ``student``."""
    own = torch.log_softmax(student.double(), dim=-1)
    other = torch.log_softmax(teacher.double(), dim=-1)
    return (own.exp() * (own - other)).sum(dim=-1)
