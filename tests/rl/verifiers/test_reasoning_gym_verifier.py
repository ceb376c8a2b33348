"""The adapter is tested with a stand-in for the library that has its interface and its weaknesses: an `eval`
of the answer, and part of the score for any text that holds the oracle. The library is not installed here."""

import importlib.util
from collections.abc import Iterator

import pytest

from bittrue.errors import VerifierUnavailable
from bittrue.rl.verifiers.audit import audit_table, cases_for, run_audit
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.reasoning_gym import ReasoningGym, could_be_code
from bittrue.rl.verifiers.verifier import answer_of

FACTORY = """
def evaluates(answer, entry):
    try:
        return 1.0 if eval(answer) == eval(entry["answer"]) else 0.01
    except Exception:
        return 0.0

def generous(answer, entry):
    oracle = entry["answer"]
    if answer == oracle:
        return 1.0
    return len(oracle) / len(answer) if oracle in answer else 0.01

def get_score_answer_fn(name):
    if name not in ("evaluates", "generous"):
        raise ValueError(f"Dataset '{name}' not registered")
    return globals()[name]
"""


@pytest.fixture(scope="module")
def gym(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    folder = tmp_path_factory.mktemp("gym")
    (folder / "reasoning_gym").mkdir()
    (folder / "reasoning_gym" / "__init__.py").touch()
    (folder / "reasoning_gym" / "factory.py").write_text(FACTORY)
    with Pool(num_workers=2, limits=Limits(seconds=60.0, cpu_seconds=1), python_path=(str(folder),)) as pool:
        yield pool


def entry(answer: str) -> dict[str, object]:
    return {"question": "q", "answer": answer, "metadata": {"source_dataset": "x"}}


def test_the_scorer_of_the_dataset_judges(gym: Pool) -> None:
    verifier = ReasoningGym("evaluates", entry("[1, 2]"))
    assert [gym.judge(verifier, answer_of(a)).outcome for a in ("[1,2]", "[2, 1]")] == ["right", "wrong"]


def test_part_of_a_score_is_no_score(gym: Pool) -> None:
    strict = gym.judge(ReasoningGym("generous", entry("42")), answer_of("42 43"))
    assert (strict.outcome, strict.score, strict.sub_scores["value"]) == ("wrong", 0.0, 0.4)
    loose = ReasoningGym("generous", entry("42"), is_strict=False)
    assert gym.judge(loose, answer_of("42 43")).score == 0.4


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["evaluates", "generous"])
@pytest.mark.parametrize("oracle", ["42", "[[1, 0], [0, 1]]"])
def test_no_adversarial_answer_scores(gym: Pool, dataset: str, oracle: str) -> None:
    rows = run_audit(gym, cases_for(ReasoningGym(dataset, entry(oracle)), oracle))
    assert all(row.holds for row in rows), audit_table(rows)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "().__class__",
        "ｅｖａｌ('1')",
        "[].append (1)",
        "(lambda: 1)()",
        "print(1)",
        "globals ()['entry']['answer']",
        "[x := 1]",
    ],
)
def test_code_never_reaches_the_scorer(gym: Pool, text: str) -> None:
    verdict = gym.judge(ReasoningGym("evaluates", entry("1")), answer_of(text))
    assert (verdict.outcome, verdict.detail) == ("unparsable", "code where an answer is asked for")


@pytest.mark.parametrize(
    "text",
    [
        "[[1, 2], [3, 4]]",
        "3*x**2 + sin(x)",
        "The cat sat. Then it left.",
        "e.g. (a) and (b)",
        "0.5",
        "A:1, B:2",
    ],
)
def test_answers_are_not_taken_for_code(text: str) -> None:
    assert not could_be_code(text)


def test_an_unknown_dataset_is_no_verdict(gym: Pool) -> None:
    with pytest.raises(VerifierUnavailable, match="no dataset 'nothing'"):
        gym.judge(ReasoningGym("nothing", entry("1")), answer_of("1"))


@pytest.mark.skipif(importlib.util.find_spec("reasoning_gym") is not None, reason="it is installed")
def test_a_missing_library_names_the_extra(pool: Pool) -> None:
    with pytest.raises(VerifierUnavailable, match=r"bittrue\[reasoning-gym\]"):
        pool.judge(ReasoningGym("gcd", entry("1")), answer_of("1"))
