"""The tasks by name, as run files and the evaluation name them."""

from collections.abc import Iterable

from bittrue.errors import ConfigError
from bittrue.train.tasks.arithmetic import Arithmetic
from bittrue.train.tasks.brackets import Brackets
from bittrue.train.tasks.calc import Calc
from bittrue.train.tasks.countdown import Countdown
from bittrue.train.tasks.recall import LEAST_TOKENS, MOST_TOKENS, Recall
from bittrue.train.tasks.reverse import Reverse
from bittrue.train.tasks.sort import Sort
from bittrue.train.tasks.task import Task

_THINK_DIGITS = 5
TASK_NAMES = (
    "sort", "reverse", "add", "sub", "add-think", "sub-think", "brackets", "countdown", "recall", "calc",
)  # fmt: skip


def all_tasks(*, recall_min_tokens: int = 256, recall_max_tokens: int = 4096) -> dict[str, Task]:
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
        Calc(),
    )
    return {task.name: task for task in tasks}


def check_names(names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no task's."""
    for name in names:
        if name not in TASK_NAMES:
            raise ConfigError(
                f"there is no task {name!r}; choose among {', '.join(TASK_NAMES)}", field="tasks"
            )
