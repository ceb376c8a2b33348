"""The tasks by name, as run files and the evaluation name them."""

from collections.abc import Iterable, Mapping, Sequence

from bittrue.errors import ConfigError
from bittrue.train.tasks.arithmetic import Arithmetic
from bittrue.train.tasks.brackets import Brackets
from bittrue.train.tasks.calc import Calc
from bittrue.train.tasks.countdown import Countdown
from bittrue.train.tasks.recall import LEAST_TOKENS, MOST_TOKENS, Recall, RecallFar
from bittrue.train.tasks.reverse import Reverse
from bittrue.train.tasks.sort import Sort
from bittrue.train.tasks.task import Task

_THINK_DIGITS = 5
_RECALL_LEAST, _RECALL_MOST = 256, 4096
TASK_NAMES = (
    "sort", "reverse", "add", "sub", "add-think", "sub-think", "brackets", "countdown", "recall",
    "recall-far", "calc",
)  # fmt: skip


def all_tasks(
    *, recall_min_tokens: int = _RECALL_LEAST, recall_max_tokens: int = _RECALL_MOST
) -> dict[str, Task]:
    """Every task by its name; the lengths are of recall's conversations. Raises ConfigError for lengths that
    cannot be."""
    if not LEAST_TOKENS <= recall_min_tokens <= recall_max_tokens <= MOST_TOKENS:
        fact = f"from {recall_min_tokens} to {recall_max_tokens} tokens"
        raise ConfigError(
            f"conversations of recall cannot be {fact}; choose from {LEAST_TOKENS} to {MOST_TOKENS}",
            field="recall_max_tokens",
        )
    tasks: tuple[Task, ...] = (
        Sort(),
        Reverse(),
        Arithmetic("add"),
        Arithmetic("sub"),
        Arithmetic("add", _THINK_DIGITS, thinks=True),
        Arithmetic("sub", _THINK_DIGITS, thinks=True),
        Brackets(),
        Countdown(),
        Recall(recall_min_tokens, recall_max_tokens),
        RecallFar(),
        Calc(),
    )
    return {task.name: task for task in tasks}


def make_tasks(
    weights: Mapping[str, float], lengths: Mapping[str, Sequence[int]] | None = None
) -> dict[Task, float]:
    """The tasks of a run file with their weights. ``lengths``: the least and the most tokens of a
    conversation, by task; recall alone has a choice. Raises ConfigError."""
    lengths = lengths or {}
    check_names(weights)
    stray = next((name for name in lengths if name != "recall" or name not in weights), None)
    if stray is not None:
        fact = "has no choice of lengths" if stray in weights else "is not among the tasks"
        raise ConfigError(f"lengths are given for {stray!r}, which {fact}", field="lengths")
    bounds = lengths.get("recall", (_RECALL_LEAST, _RECALL_MOST))
    if len(bounds) != 2:
        raise ConfigError(
            f"lengths of recall are {list(bounds)}; give the least and the most", field="lengths"
        )
    tasks = all_tasks(recall_min_tokens=bounds[0], recall_max_tokens=bounds[1])
    return {tasks[name]: weight for name, weight in weights.items()}


def check_names(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no task's."""
    for name in names:
        if name not in TASK_NAMES:
            raise ConfigError(
                f"there is no task {name!r}; choose among {', '.join(TASK_NAMES)}", field="tasks"
            )
