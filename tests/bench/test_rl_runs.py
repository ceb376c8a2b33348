"""Runs that a benchmark is made of are taken to their end once; what they say is what their files say."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bittrue.bench import rl_runs
from bittrue.bench.result import Measurement, decode_result
from bittrue.bench.rl_runs import by_step, compared, finished, held_out_shares, seconds_by_step
from bittrue.bench.tasks import wilson
from bittrue.errors import UsageError
from bittrue.rl.config import RlConfig
from bittrue.rl.records import Records
from bittrue.rl.run_files import RunFiles
from bittrue.train.run_file import checked

ROOT = Path(__file__).parents[2]
STEPS, PROBLEMS = 2, 8


def config(**run: Any) -> RlConfig:
    """Two steps on countdown, of which the bundled model solves a part."""
    sections = {
        "model": {"start": str(ROOT / "models" / "mini")},
        "data": {"tasks": {"countdown": 1.0}, "seed": 3},
        "rollout": {"prompts": 3, "group": 4, "max_tokens": 16, "kv_memory": "32MiB"},
        "run": {"steps": STEPS, "threads": 1, "eval_every": 1, "eval_problems": PROBLEMS, **run},
    }
    return checked(RlConfig, sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFiles:
    work = tmp_path_factory.mktemp("work")
    return finished(config(), work / "run", export=work / "made")


def values(found: Iterator[Measurement]) -> dict[str, float]:
    return {m.name: m.median for m in found}


def test_a_run_at_its_end_is_only_read(run: RunFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(rl_runs, "train_policy", refuse)
    made = run.directory.parent / "made"
    assert finished(config(), run.directory, export=made) == run
    with pytest.raises(AssertionError, match="trained again"):  # it is at its end, but not exported there
        finished(config(), run.directory, export=run.directory.parent / "other")
    with pytest.raises(UsageError, match="other settings; choose another --work"):
        finished(config(steps=STEPS + 1), run.directory)


@pytest.mark.slow
def test_a_run_that_only_began_is_gone_on_with(run: RunFiles, tmp_path: Path) -> None:
    out = tmp_path / "begun"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(config().model_dump(mode="json")))
    again = finished(config(), out)
    assert [step.weights_after for step in again.steps] == [step.weights_after for step in run.steps]


def test_measurements_are_those_of_the_files(run: RunFiles) -> None:
    records = Records(run.directory)
    tokens = [sum(len(r.answer_ids) for r in records.read(step).rollouts) for step in range(STEPS)]
    found = values(compared(run, {"arm": "a"}))
    learned = [line for line in run.metrics if "parity/num_tokens" in line]
    assert learned and found["steps compared"] == len(learned)
    assert found["steps"] == STEPS and found["tokens sampled"] == sum(tokens)
    assert 0 < found["tokens compared"] == sum(line["parity/num_tokens"] for line in learned) <= sum(tokens)
    assert found["tokens that differ"] == found["difference, largest"] == 0.0
    scores = list(by_step(run, ("reward/mean",), {"arm": "a"}))
    assert [m.median for m in scores] == [line["reward/mean"] for line in run.metrics[:STEPS]]
    assert [m.labels for m in scores] == [{"arm": "a", "step": step} for step in range(STEPS)]
    assert [m.median for m in seconds_by_step(run, {})] == [facts.seconds for facts in run.steps]


def test_held_out_shares_have_the_interval_of_their_problems(run: RunFiles) -> None:
    found = list(held_out_shares(run, {}))
    assert [m.labels["updates"] for m in found] == [0, 1, 2]
    for m in found:
        right = m.median * PROBLEMS
        assert right == int(right) and (m.low, m.high) == wilson(int(right), PROBLEMS)
        assert m.name == "eval/countdown/greedy" and m.repeats == PROBLEMS


@pytest.mark.slow
def test_arms_differ_in_staleness_and_a_loop_without_a_correction_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "staleness.json"
    sizes = ["--steps", "3", "--every", "3", "--problems", "8", "--prompts", "3", "--group", "4"]
    places = ["--run", str(ROOT / "configs" / "rl-mini.toml"), "--start", str(ROOT / "models" / "mini")]
    script(
        monkeypatch, "rl_staleness", *places, *sizes, "--work", tmp_path, "--staleness", "0,1", "--out", out
    )
    found = decode_result(out.read_bytes(), source="staleness.json")
    for arm, most in (("sync", 0.0), ("async 1", 1.0)):
        ages = [m.median for m in found.measurements if m.name == "rollout/staleness/max" and m.has(arm=arm)]
        assert len(ages) == 3 and max(ages) == most
        those, differing = (found.find(f"tokens {name}", arm=arm) for name in ("compared", "that differ"))
        assert those is not None and those.median > 0 and differing is not None and differing.median == 0
        assert [m.labels["updates"] for m in found.measurements if m.name == "eval/countdown/greedy"
                and m.has(arm=arm)] == [0, 3]  # fmt: skip
    for kind in ("pipelined", "async"):
        refused = found.find("refused without a correction", kind=kind)
        assert refused is not None and refused.median == 1.0
        assert "nothing corrects for that" in str(refused.labels["error"])


@pytest.mark.slow
def test_a_student_of_two_specialists_is_made_and_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "distill.json"
    runs = ["--countdown", "2,3,4", "--sub-think", "2,2,4", "--student", "2,4,2", "--rates", "1e-4,1e-2"]
    start = ["--start", str(ROOT / "models" / "mini"), "--trial-steps", "2", "--problems", "10"]
    script(monkeypatch, "rl_distill", *start, *runs, "--work", tmp_path / "work", "--out", out)
    found = decode_result(out.read_bytes(), source="distill.json")
    apart = [m for m in found.measurements if m.name == "train/teacher_kl"]
    assert [m.labels["step"] for m in apart] == [0, 1] and all(m.median > 0 for m in apart)
    trials = {m.labels["lr"]: m for m in found.measurements if m.name == "divergence of a trial"}
    best = min(trials.values(), key=lambda m: m.median)
    assert len(trials) == 2 and [m for m in trials.values() if m.labels["chosen"]] == [best]
    student = json.loads((tmp_path / "work" / "run-student" / "run.json").read_text())
    assert student["optim"]["lr"] == best.labels["lr"]
    counts = {name: found.find(name, of="student") for name in ("tokens sampled", "tokens compared")}
    assert counts["tokens sampled"] is not None and counts["tokens compared"] is not None
    assert counts["tokens sampled"].median == counts["tokens compared"].median > 0
    for task in ("countdown", "sub-think"):
        own, teacher = (found.find("right answers", of=of, task=task, temperature=0.0)
                        for of in ("student", task))  # fmt: skip
        over = found.find("student over specialist", task=task)
        assert own is not None and teacher is not None and own.repeats == 10
        if teacher.median:
            assert over is not None and over.median == own.median / teacher.median
            assert over.low < over.median < over.high


def script(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: object) -> None:
    """Runs a script of ``benchmarks`` in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.setattr("sys.argv", [f"{name}.py", *map(str, arguments)])
    __import__(name).main()
