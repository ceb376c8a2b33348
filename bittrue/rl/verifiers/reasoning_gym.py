"""The scorers of reasoning-gym, which evaluate what they are given: only ever in a worker."""

import importlib
import re
import unicodedata
from typing import Any

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.verifier import Answers, Checker, Place, Verdict, final_text, graded, unparsable

# An answer that could be code does not reach an eval: names with two underscores, attributes, and calls of
# what Python lets a bare expression call. Identifiers are compared as Python normalises them.
_CODE = re.compile(
    r"__|[\w)\]}'\"]\s*\.\s*[^\W\d]\w*\s*(?:[(\[=]|\.\s*[^\W\d])|\blambda\b|:=|\bimport\b|"
    r"\b(?:eval|exec|compile|open|input|print|getattr|setattr|delattr|vars|dir|globals|locals|type|super|"
    r"object|breakpoint|exit|quit|help|memoryview|bytearray|classmethod|staticmethod|property|map|filter|iter|next|"
    r"sorted|copyright|credits|license|hasattr|callable|id|isinstance|issubclass|repr|ascii|format|"
    r"sympify|parse_expr|lambdify|Function|Lambda|preview|init_printing)\s*\("
)


class ReasoningGym(Checker, frozen=True, tag="reasoning_gym"):
    """Scores with reasoning-gym's own scorer of ``dataset``. ``entry``: its problem, with question, answer
    and metadata. Right is a score of 1; what it pays for less, as for any text that holds the answer, counts
    only with ``is_strict=False``."""

    dataset: str
    entry: dict[str, Any]
    is_strict: bool = True

    def prepare(self) -> None:
        self._scorer()

    def judge(self, answers: Answers, place: Place) -> Verdict:
        text = final_text(answers)
        if text is None:
            return unparsable("the last message is no text")
        if could_be_code(text):
            return unparsable("code where an answer is asked for")
        return graded(self._scorer()(text.strip(), self.entry), is_strict=self.is_strict)

    def _scorer(self) -> Any:
        try:
            factory = importlib.import_module("reasoning_gym.factory")
        except ImportError as error:
            raise VerifierUnavailable(
                "reasoning-gym is not installed: pip install 'bittrue[reasoning-gym]'"
            ) from error
        try:
            return factory.get_score_answer_fn(self.dataset)
        except ValueError as error:
            raise VerifierUnavailable(f"reasoning-gym has no dataset {self.dataset!r}") from error


def could_be_code(text: str) -> bool:
    """Whether a text, evaluated as Python, could do more than calculate."""
    return _CODE.search(unicodedata.normalize("NFKC", text)) is not None
