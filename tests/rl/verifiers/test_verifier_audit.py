from collections.abc import Iterator

import pytest

from bittrue.rl.verifiers.audit import AuditCase, audit_table, cases_for, corpus, run_audit
from bittrue.rl.verifiers.limits import Limits
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.task import TaskQuestion
from bittrue.rl.verifiers.verifier import answer_of
from bittrue.train.tasks.catalogue import all_tasks
from bittrue.train.tasks.task import seeded

KINDS = ("exact", "choice", "math", "function_tests", "program_tests", "json_schema", "tool_calls")


@pytest.fixture(scope="module")
def hasty() -> Iterator[Pool]:
    with Pool(num_workers=2, limits=Limits(seconds=0.7, cpu_seconds=1)) as pool:
        yield pool


def test_the_corpus_tries_every_verifier_that_needs_nothing() -> None:
    counted = {kind: sum(case.verifier.kind == kind for case in corpus()) for kind in KINDS}
    assert {case.verifier.kind for case in corpus()} == set(KINDS)
    assert min(counted.values()) >= 25


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_adversarial_answer_scores(hasty: Pool, kind: str) -> None:
    cases = [case for case in corpus() if case.verifier.kind == kind]
    if not hasty.isolation.is_sandbox:  # nothing would count what forks for ever
        cases = [case for case in cases if case.name != "forks"]
    rows = run_audit(hasty, cases)
    assert all(row.holds for row in rows), audit_table(rows)


def test_most_adversarial_answers_are_judged_and_not_only_late(pool: Pool) -> None:
    cases = [
        case for case in corpus() if case.verifier.kind in ("exact", "choice", "json_schema", "tool_calls")
    ]
    assert {row.outcome for row in run_audit(pool, cases)} <= {"wrong", "unparsable"}


@pytest.mark.parametrize("name", ["sort", "add", "countdown", "brackets"])
def test_no_adversarial_answer_to_a_task_scores(pool: Pool, name: str) -> None:
    question = all_tasks()[name].problem(seeded("audit", name)).questions[0]
    rows = run_audit(pool, cases_for(TaskQuestion(question), question.reference[0].content))
    assert all(row.holds for row in rows), audit_table(rows)


def test_the_table_marks_what_scored(pool: Pool) -> None:
    right = AuditCase("the answer itself", corpus()[0].verifier, answer_of("42"))
    rows = run_audit(pool, [corpus()[0], right])
    assert [row.holds for row in rows] == [True, False]
    assert audit_table(rows).splitlines()[-1].endswith("'the answer itself'  <- SCORED")
