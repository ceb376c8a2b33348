from pathlib import Path

import pytest

from bittrue.errors import ConfigError, VerifierUnavailable
from bittrue.rl.verifiers.audit import audit_table, cases_for, run_audit
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.reward_function import reward_function
from bittrue.rl.verifiers.verifier import answer_of

SOURCE = """
import near

def length(prompts, completions, wanted, **columns):
    return [float(len(c) == w) for c, w in zip(completions, wanted)]

def half(prompts, completions, **columns):
    return [0.5 for _ in completions]

def chat(prompts, completions, **columns):
    assert prompts[0][-1]["role"] == "user" and completions[0][0]["role"] == "assistant"
    return [near.score(prompts[0][-1]["content"], completions[0][0]["content"])]

def skips(prompts, completions, **columns):
    return [None]

def two(prompts, completions, **columns):
    return [1.0, 1.0]

def no_number(prompts, completions, **columns):
    return [float("nan")]

def prints(prompts, completions, **columns):
    print("score: 1.0", flush=True)
    return [0.0]
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("functions")
    (folder / "near.py").write_text(
        "def score(prompt, completion):\n    return float(prompt == completion)\n"
    )
    path = folder / "rewards.py"
    path.write_text(SOURCE)
    return path


def test_columns_arrive_by_name(pool: Pool, file: Path) -> None:
    verifier = reward_function(f"{file}:length", "p", {"wanted": 3})
    assert [pool.judge(verifier, answer_of(text)).score for text in ("abc", "ab")] == [1.0, 0.0]


def test_a_chat_gets_messages_and_neighbours_can_be_imported(pool: Pool, file: Path) -> None:
    verifier = reward_function(f"{file}:chat", [{"role": "user", "content": "hi"}])
    assert [pool.judge(verifier, answer_of(text)).outcome for text in ("hi", "no")] == ["right", "wrong"]


def test_part_of_a_reward_is_a_sub_score_unless_asked_for(pool: Pool, file: Path) -> None:
    strict = pool.judge(reward_function(f"{file}:half", "p"), answer_of("x"))
    assert (strict.outcome, strict.score, dict(strict.sub_scores)) == ("wrong", 0.0, {"value": 0.5})
    assert pool.judge(reward_function(f"{file}:half", "p", is_strict=False), answer_of("x")).score == 0.5


@pytest.mark.parametrize("name", ["skips", "two", "no_number"])
def test_what_is_no_reward_is_unparsable(pool: Pool, file: Path, name: str) -> None:
    verdict = pool.judge(reward_function(f"{file}:{name}", "p"), answer_of("x"))
    assert (verdict.outcome, verdict.score) == ("unparsable", None if name == "skips" else 0.0)


def test_what_a_function_prints_is_no_verdict(pool: Pool, file: Path) -> None:
    assert pool.judge(reward_function(f"{file}:prints", "p"), answer_of("x")).outcome == "wrong"


@pytest.mark.parametrize("reference", ["rewards.py", "missing.py:f", "rewards.py:f()", ":f"])
def test_a_reference_to_nothing_is_refused(reference: str) -> None:
    with pytest.raises(ConfigError, match=r"file\.py:function"):
        reward_function(reference, "p")


def test_a_file_that_changed_is_refused(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "changing.py"
    path.write_text("def f(prompts, completions):\n    return [0.0]\n")
    verifier = reward_function(f"{path}:f", "p")
    path.write_text("def f(prompts, completions):\n    return [1.0]\n")
    with pytest.raises(VerifierUnavailable, match="changed"):
        pool.judge(verifier, answer_of("x"))


def test_a_file_that_cannot_be_loaded_says_why(pool: Pool, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_module_at_all\n")
    with pytest.raises(VerifierUnavailable, match="no_such_module_at_all"):
        pool.judge(reward_function(f"{path}:f", "p"), answer_of("x"))
    missing = tmp_path / "other.py"
    missing.write_text("x = 1\n")
    with pytest.raises(VerifierUnavailable, match="no function 'f'"):
        pool.judge(reward_function(f"{missing}:f", "p"), answer_of("x"))


def test_no_adversarial_completion_scores(pool: Pool, file: Path) -> None:
    verifier = reward_function(f"{file}:chat", [{"role": "user", "content": "42"}])
    rows = run_audit(pool, cases_for(verifier, "42"))
    assert all(row.holds for row in rows), audit_table(rows)
