"""The comparison's own parts: when outputs agree, and that a worker does what the driver asks."""

import sys
from pathlib import Path

import pytest

from bittrue.engine.engine import Engine
from bittrue.model.presets import make_checkpoint

PEERS = Path(__file__).parents[2] / "benchmarks" / "peers"


@pytest.fixture(autouse=True)
def peers_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PEERS))


EXPECTED = {"argmax": [1, 2, 3, 4], "logprob": [-1.0, -2.0, -3.0, -4.0], "margin": [0.5, 0.001, 0.5, 0.5]}


def test_float32_engines_may_differ_where_nothing_leads() -> None:
    from agreement import compare

    tie = compare(EXPECTED, {"argmax": [1, 9, 3, 4], "logprob": EXPECTED["logprob"]})
    assert (tie.num_same, tie.largest_lost_margin, tie.median_error) == (3, 0.001, 0.0)
    assert tie.agrees(is_exact=True, is_pruned=False)
    assert not tie.agrees(is_exact=False, is_pruned=False)  # 75 % is too little for any
    lost = compare(EXPECTED, {"argmax": [9, 2, 3, 4], "logprob": EXPECTED["logprob"]})
    assert not lost.agrees(is_exact=True, is_pruned=False)


def test_rounded_engines_must_give_the_text_its_probability() -> None:
    from agreement import compare

    near = compare(EXPECTED, {"argmax": [1, 2, 3, 4], "logprob": [-1.01, -2.01, -3.0, -9.0]})
    assert near.agrees(is_exact=False, is_pruned=False)
    far = compare(EXPECTED, {"argmax": [1, 2, 3, 4], "logprob": [-1.1, -2.1, -3.1, -4.0]})
    assert not far.agrees(is_exact=False, is_pruned=False)


def test_a_worker_scores_prefills_decodes_and_ends(tmp_path: Path) -> None:
    from protocol import Worker

    directory = make_checkpoint("tiny", 2, "bf16", tmp_path / "tiny")
    options = ["--act", "f32", "--threads", "1", "--max-context", "300", "--max-batch", "3"]
    worker = Worker(
        "ours", [sys.executable, str(PEERS / "worker_bittrue.py"), str(directory), *options], threads=1
    )
    try:
        assert worker.facts["level"] == "maths" and worker.facts["act"] == "f32"
        ids = [(5 * i * i + 3) % 1000 for i in range(40)]
        scores = worker.ask("score", token_ids=ids)
        engine = Engine(directory, act="f32", threads=1, kv_memory=1 << 22)
        assert scores["logprob"] == engine.score(ids)
        assert len(scores["argmax"]) == 39 and min(scores["margin"]) >= 0
        for batch in (3, 1):
            prompts = [[(i * k + k) % 1000 for i in range(300)] for k in range(1, batch + 1)]
            assert worker.ask("open", prompts=prompts)["seconds"] > 0
            for _ in range(2):
                answer = worker.ask("decode", steps=4, seconds=9.0)
                assert len(answer["seconds"]) == 4 and answer["peak_bytes"] > 1 << 26
            assert worker.ask("close") == {}
    finally:
        worker.end()


def test_a_worker_that_fails_is_named() -> None:
    from protocol import Worker

    with pytest.raises(RuntimeError, match="ours ended with code 3"):
        Worker("ours", [sys.executable, "-c", "import sys; sys.exit(3)"], threads=1)


def test_ratios_are_taken_round_by_round_against_the_fastest_peer() -> None:
    from run import OURS, Cell, Timings, _ratios

    timings = {
        OURS: Timings(prefills=[1.0, 2.0], rounds=[[0.1], [0.2], [0.1]]),
        "slow": Timings(prefills=[9.0, 9.0], rounds=[[1.0], [1.0], [1.0]]),
        "fast": Timings(prefills=[3.0, 6.0], rounds=[[0.2], [0.4], [0.3]]),
    }
    prefill, decode = _ratios(Cell(1, 256), timings)
    assert (prefill.median, prefill.repeats, prefill.labels["peer"]) == (3.0, 2, "fast")
    assert decode.median == pytest.approx(2.0) and decode.high == pytest.approx(3.0)
    assert decode.labels["peer"] == "fast"
