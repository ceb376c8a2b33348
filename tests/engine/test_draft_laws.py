"""L5 bit for bit: any draft length, any drafts, any kind of sampling; alone and beside the prefix cache."""

from collections import Counter
from collections.abc import Iterator

import pytest
from support.small import LEVELS, plain_engines, small_checkpoint

from bittrue.engine.types import Request
from bittrue.probes.drafts import (
    MAX_DRAFT,
    Adversary,
    DraftWatch,
    adversarial,
    asked,
    drafted_by,
    patterns_of,
    scripts_of,
    speculation,
)
from bittrue.probes.engines import Engines
from bittrue.probes.workload import Answers, difference, run_requests

Asked = tuple[list[Request], Answers]


@pytest.fixture(scope="module", params=LEVELS)
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    model = small_checkpoint(tmp_path_factory.mktemp("model"), precision=LEVELS[request.param], draft="mtp")
    with plain_engines(model, level=request.param) as found:
        yield found


@pytest.fixture(scope="module")
def requests(engines: Engines) -> Asked:
    return asked(engines, seed=3)


@pytest.mark.parametrize("length", [1, 4, MAX_DRAFT])
def test_mixed_adversarial_drafts_change_no_bit(engines: Engines, requests: Asked, length: int) -> None:
    result = adversarial(engines, *requests, (length, patterns_of(length)))
    assert result.holds, result
    assert result.exercised["drafts accepted"] > 0
    assert all(result.exercised[f"drafts rejected at {place + 1}"] > 0 for place in range(length))


def test_drafts_end_where_requests_do(engines: Engines, requests: Asked) -> None:
    """Grammars, stop strings and lengths end some of them among drafts that are all right."""
    result = adversarial(engines, *requests, (MAX_DRAFT, ("right",)))
    assert result.holds, result
    ends = Counter(answer.end[0] for answer in requests[1].values() if answer.end is not None)
    assert ends["stop"] >= 2 and ends["length"] >= 2
    assert result.exercised["drafts accepted"] > 5 * result.exercised["drafts rejected"]


@pytest.mark.slow
@pytest.mark.parametrize("length", range(1, MAX_DRAFT + 1))
def test_each_kind_of_draft_changes_no_bit(engines: Engines, requests: Asked, length: int) -> None:
    for pattern in patterns_of(length):
        result = adversarial(engines, *requests, (length, (pattern,)))
        assert result.holds, result
        wanted = "accepted" if pattern == "right" else "rejected"
        assert result.exercised[f"drafts {wanted}"] > 0, pattern


@pytest.mark.parametrize("length", [3, pytest.param(MAX_DRAFT, marks=pytest.mark.slow)])
def test_drafts_beside_the_prefix_cache_change_no_bit(engines: Engines, requests: Asked, length: int) -> None:
    """Told twice: what drafts left in pages and states serves the second time, checked by the canary."""
    asked_for, plain = requests
    vocab = engines.parts.config.vocab_size
    adversary = Adversary(scripts_of(asked_for, plain), length, patterns_of(length), vocab=vocab)
    knobs = {"speculation": "ngram", "max_draft": length, "kv_canary": "raise", "snapshot_every": 128}
    with engines.another(drafted_by(adversary), prefix_cache=True, **knobs) as engine:
        for _ in range(2):
            watch = DraftWatch()
            assert difference(plain, run_requests(engine, asked_for, watch)) is None
            assert watch.counts["drafts accepted"] > 0 and watch.counts["drafts rejected"] > 0
        assert engine.stats().cache.hit_tokens["device"] > 0
        assert engine.stats().num_canary_faults_total == 0


@pytest.mark.slow
def test_the_proposers_there_are_change_no_bit(engines: Engines) -> None:
    results = list(speculation(engines, rounds=2, seed=9))
    assert {"drafts by ngram", "drafts by mtp"} <= {result.variant for result in results}
    assert [result for result in results if not result.holds] == []


def test_a_script_has_the_targets_second_choice(engines: Engines, requests: Asked) -> None:
    for name, script in scripts_of(*requests).items():
        for entry, second in zip(requests[1][name].entries, script.seconds, strict=True):
            best = [token for token, _ in entry.top[:2]]
            assert second in best and second != entry.token_id
