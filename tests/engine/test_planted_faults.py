"""Every planted fault of the cache is found by ``bittrue verify``, under the law it breaks."""

import json
from pathlib import Path

import pytest
from support.faults import FAULTS, Fault
from support.small import plain_engines, small_checkpoint

from bittrue.cli import verify as verb
from bittrue.probes.verify import Options, verify_laws

LAWS = sorted({fault.law for fault in FAULTS})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("model"))


def broken_variant(model: Path, law: str) -> str | None:
    """The first comparison of the law that fails."""
    with plain_engines(model) as engines:
        for result in verify_laws(engines.plain, Options(max_tokens=330, rounds=1, laws=(law,))):
            if result.first_difference is not None:
                return result.variant
    return None


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_found(model: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    fault.plant(monkeypatch)
    variant = broken_variant(model, fault.law)
    assert variant is not None and fault.variant in variant


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_verb_says_which_law_a_planted_fault_breaks(
    model: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fault.plant(monkeypatch)
    code = verb.verify(model, json=True, rounds=1, max_tokens=330, laws=fault.law)
    document = json.loads(capsys.readouterr().out)
    assert (code, document["verdict"]) == (1, "broken")
    (row,) = document["laws"]
    assert row["law"] == fault.law and row["first_difference"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_without_a_fault_nothing_is_found(model: Path, law: str) -> None:
    assert broken_variant(model, law) is None
