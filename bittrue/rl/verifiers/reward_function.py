"""Reward functions that users write, with TRL's signature."""

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from bittrue.errors import ConfigError, VerifierUnavailable
from bittrue.rl.verifiers.verifier import (
    Answers,
    Checker,
    Place,
    Verdict,
    final_text,
    graded,
    no_verdict,
    unparsable,
)

_MODULE = "bittrue_reward_{}"


class RewardFunction(Checker, frozen=True, tag="reward_function"):
    """Calls ``function`` of the Python file ``path`` as ``function(prompts=, completions=, **columns)`` with
    lists of one, and takes the one number of the list that it returns; None is no score. Right is 1 or
    more. A prompt that is a list of messages gets its completion as messages, any other as text.

    The file is the one with ``digest``: whatever else its path holds later is refused.
    """

    path: str
    function: str
    digest: str
    prompt: str | list[dict[str, Any]]
    columns: dict[str, Any] = {}
    is_strict: bool = True

    @property
    def visible(self) -> tuple[str, ...]:
        return (str(Path(self.path).parent),)

    def prepare(self) -> None:
        self._loaded()

    def judge(self, answers: Answers, place: Place) -> Verdict:
        text = final_text(answers)
        if text is None:
            return unparsable("the last message is no text")
        is_chat = not isinstance(self.prompt, str)
        completion: Any = [{"role": "assistant", "content": text}] if is_chat else text
        columns = {name: [value] for name, value in self.columns.items()}
        values = self._loaded()(prompts=[self.prompt], completions=[completion], **columns)
        if len(values) != 1:
            return unparsable(f"the function gave {len(values)} rewards for one completion")
        if values[0] is None:
            return no_verdict("unparsable", "the function gives no reward for this")
        return graded(values[0], is_strict=self.is_strict)

    def _loaded(self) -> Callable[..., list[float | None]]:
        name = _MODULE.format(hashlib.blake2b(self.path.encode(), digest_size=8).hexdigest())
        module = sys.modules.get(name)
        if module is None:
            module = self._load(name)
            sys.modules[name] = module
        if vars(module)["__digest__"] != self.digest:
            raise VerifierUnavailable(f"{self.path} changed since the run began")
        found: Callable[..., list[float | None]] | None = getattr(module, self.function, None)
        if not callable(found):
            raise VerifierUnavailable(f"{self.path} has no function {self.function!r}")
        return found

    def _load(self, name: str) -> ModuleType:
        """The module of the file, whose neighbours it can import."""
        directory = str(Path(self.path).parent)
        if directory not in sys.path:
            sys.path.append(directory)
        source = Path(self.path).read_bytes()
        module = ModuleType(name)
        module.__file__ = self.path
        vars(module)["__digest__"] = hashlib.sha256(source).hexdigest()
        exec(compile(source, self.path, "exec"), vars(module))
        return module


def reward_function(
    reference: str,
    prompt: str | list[dict[str, Any]],
    columns: dict[str, Any] | None = None,
    *,
    is_strict: bool = True,
) -> RewardFunction:
    """The verifier for ``file.py:function``. Raises ConfigError where there is no such file or name."""
    file, _, function = reference.rpartition(":")
    path = Path(file).resolve()
    if not file or not function.isidentifier() or not path.is_file():
        raise ConfigError(
            f"{reference!r} is no reward function; write file.py:function", field="reward_function"
        )
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return RewardFunction(str(path), function, digest, prompt, columns or {}, is_strict)
