"""A certificate says what its run directory says, and no byte of either can change unseen."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from bittrue.errors import CertificateInvalid, CheckpointError
from bittrue.obs.log import Log
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.dispatch import select
from bittrue.rl.assembly import open_policy
from bittrue.rl.certificate import (
    CERTIFICATE_FILE,
    check_certificate,
    make_certificate,
    read_certificate,
    write_certificate,
)
from bittrue.rl.environment import begin_sitting, read_sittings, sources_digest
from bittrue.rl.records import Records, StepBatch
from bittrue.rl.report import write_report
from bittrue.rl.run_files import FILES, SourceFacts, write_source
from bittrue.rl.types import Rollout, Scored, Span
from bittrue.train.metrics import MetricsFile
from tests.support.rl_runs import (
    edit_line,
    hex_of,
    metrics_of,
    settings_of,
    write_lines,
    write_run,
    write_sittings,
)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


# ---- what it says ------------------------------------------------------------------------------------


def test_a_certificate_condenses_its_run(run: Path) -> None:
    made = make_certificate(run)
    assert made.holds and made.problems == ()
    assert made.verdict == "difference 0 at every of 4 steps over 400 tokens"
    assert (made.steps.done, made.steps.asked, made.steps.is_finished) == (5, 5, True)
    assert (made.steps.resumed, made.steps.engine_restarts) == ((2,), 2)
    assert made.parity.mode == "exact" and made.parity.steps_differing == made.parity.tokens_differing == 0
    assert made.parity.worst["parity/logprob_abs_diff/max"].value == 0.0
    assert made.outcomes == {"right": 30, "wrong": 30}
    assert made.groups == 15 and made.drops == {"zero_spread": 7}
    assert made.held_out == {"eval/countdown/greedy": ((0, 0.25), (2, 0.375), (4, 0.5), (5, 0.625))}
    assert made.seeds == {"data.seed": 3, "source": 3}
    assert made.data["source"] == hex_of("data") and made.data["held_out.countdown"] == hex_of("held out")
    assert made.seconds == {"steps": 17.5, "rollout": 10.0, "train": 5.0, "sync": 1.25, "eval": 2.5}
    assert made.staleness["rollout/staleness/max"].high == 1.0
    assert made.correction.extents["is/ess_ratio"].steps == 4
    assert made.code.sources == "cd" * 32 and made.code.environments == 1


def test_the_weights_are_a_chain_of_publications(run: Path) -> None:
    weights = make_certificate(run).weights
    expected = [hex_of("run", step) for step in (-1, 0, 1, 1, 3, 4)]
    assert list(weights.published) == expected and weights.breaks == ()
    assert (weights.start, weights.end) == (expected[0], expected[-1])
    assert weights.masters_end == hex_of("masters", "run", 4)


def test_a_broken_chain_is_said(run: Path) -> None:
    edit_line(run / "steps.jsonl", 3, weights_before="0" * 64, versions={})
    made = make_certificate(run)
    assert not made.holds
    known = hex_of("run", 1)[:12]
    assert made.problems == (
        f"step 3 began with weights 000000000000, but the step before ended with {known}",
    )
    assert made.verdict.endswith("; 1 problem")


def test_tokens_of_weights_that_were_never_published_are_said(run: Path) -> None:
    edit_line(run / "steps.jsonl", 1, versions={hex_of("run", 3): 1})
    (problem,) = make_certificate(run).problems
    assert problem == f"step 1 learned from tokens of unknown weights {hex_of('run', 3)[:12]}"


def test_older_published_weights_are_no_problem(run: Path) -> None:
    edit_line(run / "steps.jsonl", 3, versions={hex_of("run", 0): 1, hex_of("run", 1): 2})
    assert make_certificate(run).holds


def test_code_that_changed_between_sittings_is_said_and_threads_are_not(run: Path) -> None:
    write_sittings(run, threads=1)
    made = make_certificate(run)
    assert made.holds and made.code.environments == 2
    write_sittings(run, sources="00" * 32)
    assert make_certificate(run).problems == ("step 2 went on with other sources than the sitting before",)


def test_the_digest_of_the_config_does_not_depend_on_where_the_run_lies(run: Path, tmp_path: Path) -> None:
    elsewhere = write_run(tmp_path / "elsewhere", run={"out": "runs/b"})
    other = write_run(tmp_path / "other", rollout={"group": 5})
    digests = [make_certificate(path).config for path in (run, elsewhere, other)]
    assert digests[0] == digests[1] != digests[2]


# ---- verdicts ----------------------------------------------------------------------------------------


def test_one_differing_token_is_not_exact(run: Path) -> None:
    edit_line(run / "metrics.jsonl", 1, **{"parity/differing": 2.0, "parity/logprob_abs_diff/max": 1e-7})
    made = make_certificate(run)
    assert not made.holds
    assert made.verdict == "NOT exact: 2 tokens differ, at 1 of 4 steps over 400 tokens"
    assert (made.parity.worst["parity/logprob_abs_diff/max"].step, made.parity.tokens_differing) == (1, 2)


@pytest.mark.parametrize(("mean", "word"), [(1e-3, "within"), (6e-3, "OUT of")])
def test_a_bounded_run_says_its_bounds(tmp_path: Path, mean: float, word: str) -> None:
    run = write_run(tmp_path / "run", policy={"parity": "bf16"})
    edit_line(run / "metrics.jsonl", 3, **{"parity/differing": 90.0, "parity/logprob_abs_diff/mean": mean})
    made = make_certificate(run)
    assert made.holds == (word == "within")
    assert made.verdict == (
        f"{word} the bounds of bf16 at every of 4 steps over 400 tokens: "
        f"mean |d| at most {mean:.3g} (allowed 0.005)"
    )


def test_a_value_that_is_no_number_or_a_step_without_comparison_proves_nothing(run: Path) -> None:
    edit_line(run / "metrics.jsonl", 1, **{"parity/k3": float("nan")})
    made = make_certificate(run)
    assert (made.holds, made.parity.not_numbers) == (False, 1)
    assert made.verdict == "not shown: 0 steps were not compared, 1 values are no numbers"
    lines = [metrics_of(step) for step in range(5)]
    lines[2]["train/grad_norm"] = 0.5
    write_lines(run / "metrics.jsonl", lines)
    made = make_certificate(run)
    assert (made.holds, made.parity.unmeasured) == (False, 1)


def test_steps_that_learn_only_from_answers_of_older_weights_were_compared_when_these_came(
    tmp_path: Path,
) -> None:
    stale = {"kind": "async", "staleness": 2}
    run = write_run(tmp_path / "run", loop=stale, policy={"correction": "tis"})
    edit_line(run / "metrics.jsonl", 2, **{"train/grad_norm": 0.5})
    made = make_certificate(run)
    assert made.holds and made.parity.unmeasured == 1
    assert made.verdict == "difference 0 at every of 4 steps over 400 tokens, compared as answers came"


def test_a_run_that_compared_nothing_shows_nothing(tmp_path: Path) -> None:
    made = make_certificate(write_run(tmp_path / "run", steps=0))
    assert not made.holds and made.steps.done == 0 and made.weights.published == ()
    assert made.verdict == "no step compared a token, so nothing is shown"


def test_the_worst_overlap_is_the_smallest(run: Path) -> None:
    edit_line(run / "metrics.jsonl", 3, **{"parity/router_overlap": 0.75, "parity/k1": -0.5})
    worst = make_certificate(run).parity.worst
    assert (worst["parity/router_overlap"].value, worst["parity/router_overlap"].step) == (0.75, 3)
    assert worst["parity/k1"].value == -0.5


# ---- interrupted runs --------------------------------------------------------------------------------


def test_a_kill_between_the_two_lines_of_a_step_leaves_the_steps_before(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics_of(step) for step in range(4)])
    with (run / "steps.jsonl").open("a") as file:
        file.write('{"step": 5, "weig')
    made = make_certificate(run)
    assert made.holds and made.steps.done == 4 and not made.steps.is_finished


def test_a_gap_between_the_files_and_a_line_that_cannot_be_read_are_said(run: Path) -> None:
    write_lines(run / "metrics.jsonl", [metrics_of(step) for step in (0, 1, 3)])
    assert make_certificate(run).problems == (
        "metrics.jsonl has 3 steps, steps.jsonl has 5",
        "metrics.jsonl does not have every step once, in order",
    )
    text = (run / "steps.jsonl").read_text().splitlines()
    (run / "steps.jsonl").write_text("\n".join([*text[:3], "{", text[4]]) + "\n")
    assert "steps.jsonl: line 4 of 5 cannot be read" in make_certificate(run).problems


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(run: Path, name: str) -> None:
    (run / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        make_certificate(run)


def test_a_line_that_is_no_step_is_named(run: Path) -> None:
    edit_line(run / "steps.jsonl", 3, weights_after=7)
    with pytest.raises(CheckpointError, match=r"steps.jsonl is not what .* step 3: .*weights_after"):
        make_certificate(run)


# ---- tampering ---------------------------------------------------------------------------------------


def test_a_certificate_holds_for_its_directory_wherever_that_lies(run: Path, tmp_path: Path) -> None:
    written = write_certificate(run)
    assert check_certificate(written) == check_certificate(run) == make_certificate(run)
    moved = run.rename(tmp_path / "moved")
    assert check_certificate(moved).holds


@pytest.mark.parametrize("name", FILES)
def test_a_changed_file_is_named(run: Path, name: str) -> None:
    write_certificate(run)
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[:-1] + b" ")
    with pytest.raises(CertificateInvalid, match=f"{name} was changed") as caught:
        check_certificate(run)
    assert caught.value.field == f"files.{name}"


def test_a_changed_certificate_is_noticed(run: Path) -> None:
    path = write_certificate(run)
    path.write_text(path.read_text().replace('"done": 5', '"done": 6'))
    with pytest.raises(CertificateInvalid, match="the certificate itself was changed") as caught:
        check_certificate(path)
    assert caught.value.field == "digest"


def test_a_certificate_that_was_changed_with_its_digest_is_recomputed(run: Path) -> None:
    path = write_certificate(run)
    held, metrics = json.loads(path.read_text()), (run / "metrics.jsonl").read_bytes()
    edit_line(run / "metrics.jsonl", 4, **{"eval/countdown/greedy": 0.9})
    better = json.loads(write_certificate(run).read_text())
    # Curves that were made up, under the digests of the true files, signed anew.
    (run / "metrics.jsonl").write_bytes(metrics)
    path.write_text(json.dumps({**better, "files": held["files"]}))
    with pytest.raises(CertificateInvalid) as caught:
        check_certificate(path)
    assert caught.value.field == "digest"
    path.write_text(json.dumps({**better, "files": held["files"], "digest": _resigned(path)}))
    with pytest.raises(CertificateInvalid, match="the run gives another value") as caught:
        check_certificate(path)
    assert caught.value.field == "held_out.eval/countdown/greedy[2][1]"


def _resigned(path: Path) -> str:
    """What the check says the digest should be."""
    with pytest.raises(CertificateInvalid) as caught:
        check_certificate(path)
    return str(caught.value).split("but it is '")[1][:64]


def test_what_is_no_certificate_is_refused(run: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        check_certificate(run)
    path = write_certificate(run)
    fields = json.loads(path.read_text())
    del fields["parity"]
    path.write_text(json.dumps(fields))
    with pytest.raises(CertificateInvalid, match="parity"):
        read_certificate(path)


def test_a_changed_record_is_named_and_a_removed_one_is_not(run: Path) -> None:
    records = Records(run)
    answer = Rollout(
        "p", *(np.ones(3, kind) for kind in (np.int32, np.int32, np.float32)), (Span(0, 3),), "stop"
    )
    digest = records.write(StepBatch(1, ("countdown",), ((Scored(answer, 1.0, "right"),),)))
    edit_line(run / "steps.jsonl", 1, record=digest)
    edit_line(run / "steps.jsonl", 0, record=hex_of("not kept"))
    write_certificate(run)
    assert check_certificate(run).holds
    content = records.path(1).read_bytes()
    records.path(1).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CertificateInvalid, match=r"records/step-000001.rec is not what step 1 wrote"):
        check_certificate(run)
    records.path(1).unlink()
    assert check_certificate(run).holds


# ---- environment -------------------------------------------------------------------------------------


def test_every_sitting_of_a_run_is_kept_with_its_environment(tmp_path: Path) -> None:
    ops = select("cpu")
    for step in (0, 3):
        begin_sitting(tmp_path, ops, step=step)
    first, second = read_sittings(tmp_path / "environment.json")
    assert (first.step, second.step) == (0, 3)
    found = second.environment
    assert first.environment == found
    assert found.backend == ops.name and found.threads == load_kernels().threads
    assert len(found.sources) == 64 and found.torch and found.processor
    text = (tmp_path / "environment.json").read_text()
    assert str(Path(__file__).parents[2]) not in text


def test_sources_have_one_digest_whatever_else_lies_there(tmp_path: Path) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "a.py").write_text("x = 1\n")
    before = sources_digest(tmp_path)
    (tmp_path / "ops" / "a.pyc").write_text("compiled")
    assert sources_digest(tmp_path) == before
    (tmp_path / "ops" / "a.py").rename(tmp_path / "a.py")
    assert sources_digest(tmp_path) != before


def test_an_environment_that_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text('{"sittings": [{"step": 1}]}')
    with pytest.raises(CheckpointError, match=r"environment.json does not say where the run ran"):
        begin_sitting(tmp_path, select("cpu"), step=2)


def test_the_file_is_plain_json_that_any_reader_takes(run: Path) -> None:
    edit_line(run / "metrics.jsonl", 1, **{"parity/k3": float("inf")})
    text = write_certificate(run).read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{CERTIFICATE_FILE} has {name}"))


# ---- a real run --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_of_the_loop_has_a_certificate_that_holds(tmp_path: Path) -> None:
    given = {"tasks": {"countdown": 1.0}, "seed": 3}
    rollout = {"prompts": 3, "group": 4, "max_tokens": 16, "kv_memory": "32MiB"}
    length = {"steps": 3, "threads": 1, "checkpoint_every": 1, "eval_every": 2, "eval_problems": 4}
    mini = Path(__file__).parents[2] / "models" / "mini"
    config = settings_of(model={"start": str(mini)}, data=given, rollout=rollout, run=length)
    for stop_at in (2, 3):
        with open_policy(config, tmp_path, Log(sys.stderr, "error")) as policy:
            with MetricsFile(tmp_path / "metrics.jsonl") as metrics:
                policy.run.begin(metrics)
                begin_sitting(tmp_path, policy.trainer.ops, step=policy.run.step)
                policy.run.go(metrics, should_stop=lambda: policy.run.step >= stop_at)  # noqa: B023
    (tmp_path / "run.json").write_text(config.model_dump_json())
    write_source(tmp_path, SourceFacts(digest="d", seed=3, isolation="none: own tasks judged in process"))
    write_certificate(tmp_path)
    made = check_certificate(tmp_path)
    assert made.holds and made.verdict.startswith("difference 0 at every of ")
    assert made.parity.steps >= 1 and made.parity.tokens > 0
    assert made.steps.is_finished and made.steps.resumed == (2,)
    assert len(made.weights.published) == 4 and len(set(made.weights.published)) >= 2
    assert sum(made.outcomes.values()) == 3 * 3 * 4
    assert [step for step, _ in made.held_out["eval/countdown/greedy"]] == [0, 2, 3]
    text = write_report(tmp_path).read_text()
    assert made.verdict in text and made.weights.end in text
    record = tmp_path / "records" / "step-000001.rec"
    record.write_bytes(record.read_bytes()[:-1])
    with pytest.raises(CertificateInvalid, match=r"records/step-000001.rec is not what step 1 wrote"):
        check_certificate(tmp_path)
