"""What the engine chose, beside what the trainer chooses: equal, near, repeated, or of other tokens."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.training import VOCAB, export, tiny_trainer

from bittrue.bench.report import page
from bittrue.bench.result import Label, Measurement, Result, Unit, decode_result, measured
from bittrue.bench.targets import targets
from bittrue.engine.engine import Engine
from bittrue.engine.types import SamplingParams
from bittrue.errors import ParityBroken, RolloutInvalid
from bittrue.rl.metrics import StepReports, flatten
from bittrue.rl.parity import Selection, check_selection
from bittrue.rl.replay import document_of, routes_of, rows_of, selections_of
from bittrue.rl.rollout import Inbox, Prompt, Sampler
from bittrue.rl.types import Rollout
from bittrue.train.trainer import Trainer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "rl_replay.py"
LENGTHS = (70, 133)
FREE = 4 * (8 + 1) - 1  # with index_topk = 8: tokens that read every row they see


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return tiny_trainer("f32")


@pytest.fixture(scope="module")
def quantised() -> Trainer:
    """The same masters in the published formats."""
    return tiny_trainer("fp4")


@pytest.fixture(scope="module")
def engines(
    trainer: Trainer, quantised: Trainer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Engine]]:
    folder = tmp_path_factory.mktemp("models")
    knobs = {"kv_memory": "16MiB", "threads": 1, "log_level": "error", "max_context": 256}
    made = {
        name: Engine(export(source, folder / name), **knobs)  # type: ignore[arg-type]
        for name, source in (("f32", trainer), ("fp4", quantised))
    }
    yield made
    for engine in made.values():
        engine.close()


def sampled(engine: Engine, lengths: tuple[int, ...] = LENGTHS) -> list[Rollout]:
    rng = np.random.default_rng(0)
    prompts = [Prompt(f"p{n}", tuple(rng.integers(2, VOCAB, n).tolist())) for n in lengths]
    versions = {engine.fingerprint()["weight_version"]: 0}
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    sampler = Sampler(Inbox(engine), params, group_size=1, policy_versions=versions)
    return [group.rollouts[0] for group in sampler.groups(prompts, seed=0)]


@pytest.fixture(scope="module")
def rollouts(engines: dict[str, Engine]) -> list[Rollout]:
    """Sampled in FP4 and FP8."""
    return sampled(engines["fp4"])


def compared(
    trainer: Trainer, recorded: list[Rollout], *, repeats: list[Rollout] | None = None
) -> tuple[Selection, Selection]:
    config, documents = trainer.masters.config, [document_of(rollout) for rollout in recorded]
    routes, rows = (routes_of(config, repeats), rows_of(config, repeats)) if repeats else (None, None)
    return selections_of(config, recorded, *trainer.chosen(documents, routes=routes, rows=rows))


def moved(rollouts: list[Rollout], sources: list[np.ndarray]) -> list[Rollout]:
    """Every token gets the record of the token ``sources`` names; rows only of earlier ones, which see no
    more."""
    found = []
    for rollout, source in zip(rollouts, sources, strict=True):
        assert rollout.experts is not None and rollout.index_rows is not None
        gap = len(rollout.experts) - len(rollout.index_rows)
        rows = rollout.index_rows[np.maximum(source[gap:] - gap, 0)]
        found.append(replace(rollout, experts=rollout.experts[source], index_rows=rows))
    return found


def places(rollouts: list[Rollout]) -> list[np.ndarray]:
    return [np.arange(rollout.num_tokens - 1) for rollout in rollouts]


def test_the_same_arithmetic_chooses_the_same(trainer: Trainer, engines: dict[str, Engine]) -> None:
    own = sampled(engines["f32"])
    total = sum(rollout.num_tokens for rollout in own)
    routing, index = compared(trainer, own)
    assert (routing.flips, routing.overlap, routing.first_token) == (0.0, 1.0, -1)
    assert (index.flips, index.overlap, index.first_token) == (0.0, 1.0, -1)
    assert routing.num_tokens == total - len(own)  # no engine computed the last tokens
    assert index.num_tokens == total - len(own) * (1 + FREE)


def test_another_precision_flips_some_and_they_are_counted(
    trainer: Trainer, quantised: Trainer, rollouts: list[Rollout]
) -> None:
    assert [s.flips for s in compared(quantised, rollouts)] == [0.0, 0.0]
    routing, index = compared(trainer, rollouts)
    assert 0 < routing.flips < 0.5 and 0 < index.flips < 1 and index.overlap > 0.7
    routes, rows = trainer.chosen([document_of(rollout) for rollout in rollouts])
    recorded = routes_of(trainer.masters.config, rollouts)
    flips = [
        set(a) != set(b)
        for name, ids in recorded.items()
        for a, b in zip(ids.tolist(), routes[name].tolist(), strict=True)
        if a[0] >= 0
    ]
    assert routing.flips == pytest.approx(sum(flips) / len(flips))
    check_selection(routing, "experts", min_overlap=0.7)
    check_selection(index, "index rows", min_overlap=0.7)
    found = flatten(StepReports(routing=routing, index=index))
    assert found["parity/router_flips"] == routing.flips and found["parity/index_overlap"] == index.overlap


def test_the_first_flip_is_named_by_its_place_among_all_tokens(
    quantised: Trainer, rollouts: list[Rollout]
) -> None:
    second = rollouts[1]
    assert second.experts is not None and second.index_rows is not None
    experts, rows = second.experts.copy(), second.index_rows.copy()
    experts[50, 0] = (experts[50, 0] + 1) % 4
    rows[60 - FREE, 1, 0] = next(row for row in range(15) if row not in rows[60 - FREE, 1])
    changed = [rollouts[0], replace(second, experts=experts, index_rows=rows)]
    routing, index = compared(quantised, changed)
    assert routing.first_token == rollouts[0].num_tokens + 50
    assert index.first_token == rollouts[0].num_tokens + 60
    assert routing.flips * routing.num_tokens * experts.shape[1] == pytest.approx(1)


def test_what_is_repeated_is_the_record(trainer: Trainer, rollouts: list[Rollout]) -> None:
    routing, index = compared(trainer, rollouts, repeats=rollouts)
    assert (routing.flips, index.flips) == (0.0, 0.0)


def test_shuffled_and_shifted_records_are_caught(trainer: Trainer, rollouts: list[Rollout]) -> None:
    rng = np.random.default_rng(1)
    shuffled = moved(rollouts, [rng.permutation(len(place)) for place in places(rollouts)])
    late = moved(rollouts, [np.maximum(place - 1, 0) for place in places(rollouts)])
    # The rows of a later token may not be visible yet, so only experts are shuffled freely.
    shuffled = [replace(s, index_rows=r.index_rows) for s, r in zip(shuffled, rollouts, strict=True)]
    with pytest.raises(ParityBroken, match="the record of experts overlaps"):
        check_selection(compared(trainer, shuffled)[0], "experts", min_overlap=0.7)
    for selection, what in zip(compared(trainer, late), ("experts", "index rows"), strict=True):
        with pytest.raises(ParityBroken, match=f"the record of {what} is shifted"):
            check_selection(selection, what, min_overlap=0.0)


def test_tokens_without_a_record_are_not_compared(
    trainer: Trainer, engines: dict[str, Engine], rollouts: list[Rollout]
) -> None:
    """As behind a prefix that came out of a cache."""
    cut = [replace(r, experts=r.experts[-20:], index_rows=r.index_rows[-10:]) for r in rollouts]  # type: ignore[index]
    routing, index = compared(trainer, cut)
    assert (routing.num_tokens, index.num_tokens) == (40, 20)
    short = sampled(engines["fp4"], lengths=(4,))
    assert [s.num_tokens for s in compared(trainer, short)] == [27, 0]
    bare = [replace(r, experts=None, index_rows=None) for r in rollouts]
    assert [s.num_tokens for s in compared(trainer, bare)] == [0, 0]


def test_records_that_would_be_read_beyond_what_is_there_are_refused(
    trainer: Trainer, rollouts: list[Rollout]
) -> None:
    config, rollout = trainer.masters.config, rollouts[0]
    assert rollout.experts is not None and rollout.index_rows is not None
    rows, experts = rollout.index_rows.copy(), rollout.experts.copy()
    rows[0, 0, -1] = 9  # token 35 sees rows 0 to 8
    with pytest.raises(RolloutInvalid, match="token 35 has row 9 of 9; keep a record with the tokens"):
        rows_of(config, [replace(rollout, index_rows=rows)])
    experts[3, 0, 0] = config.num_experts
    with pytest.raises(RolloutInvalid, match=f"token 3 has expert {config.num_experts} of"):
        routes_of(config, [replace(rollout, experts=experts)])
    with pytest.raises(RolloutInvalid, match=r"a token has experts \[1, \d\] \(layers, ids\), not \["):
        routes_of(config, [replace(rollout, experts=experts[:, :1])])


# ---- the table -------------------------------------------------------------------------------------------


def seen(name: str, unit: Unit, values: list[float], labels: dict[str, Label]) -> Measurement:
    return measured(name, unit, values, {**labels, "mean": float(np.mean(values))})


def stored(rollout: str, differing: float, ratios: dict[str, list[float]]) -> Iterator[Measurement]:
    """What one policy's rollouts in one precision give, without replay."""
    labels: dict[str, Label] = {"policy": "as it is", "rollout": rollout}
    yield seen("rounding of weights", "ratio", [0.0182], labels)
    where: dict[str, Label] = {**labels, "replay": "none"}
    here: dict[str, Label] = {**where, "answers": "sampled"}
    yield seen("tokens compared", "count", [1024.0], here)
    yield seen("tokens that differ", "count", [differing], here)
    yield seen("difference, mean", "nats", [0.1, 0.2, 0.4, 0.2, 0.1] if differing else [0.0], here)
    yield seen("difference, largest", "nats", [1.5 if differing else 0.0], here)
    yield seen("router flips", "ratio", [0.05 if differing else 0.0], where)
    yield seen("records refused", "ratio", [0.0], where)
    for name, values in ratios.items():
        yield seen(name, "ratio", values, {**labels, "answers": "sampled"})


def test_the_page_says_what_was_stored_and_which_target_does_not_hold() -> None:
    found = [
        *stored("f32", 0.0, {}),
        *stored("bf16", 1000.0, {"both over none": [0.4, 0.5, 0.6], "shuffled over both": [100.0]}),
        *stored("fp4", 1024.0, {"both over none": [0.59, 0.61, 0.7], "shuffled over both": [2.9]}),
    ]
    config: dict[str, Label] = {"model": "mini", "threads": 2}
    result = Result("rl-replay", "CPU", 2, "abc", "2026-01-02T03:04:05+00:00", "x", config, tuple(found))
    verdicts = {t.measure: t.is_met for t in targets({"r.json": result}) if t.measure.startswith("rollouts")}
    assert verdicts == {
        "rollouts in f32, log-probabilities that differ (mini)": True,
        "rollouts in bf16, mean difference, replay: both over none (mini)": True,
        "rollouts in bf16, mean difference, replay: shuffled over both (mini)": True,
        "rollouts in fp8, mean difference, replay: both over none": None,
        "rollouts in fp8, mean difference, replay: shuffled over both": None,
        "rollouts in fp4, mean difference, replay: both over none (mini)": False,
        "rollouts in fp4, mean difference, replay: shuffled over both (mini)": False,
    }
    text = page({"r.json": result})
    assert "| f32 | none | 0 | 0 |  |  | 0 of 1,024 | 0.00% |  | 0% |" in text
    assert "| fp4 | none | 2.00e-01 (1.00e-01 to 4.00e-01) | 1.50e+00 |" in text  # the mean, not the median
    assert "| as it is | bf16 | 1.82% | sampled | 2.00e-01 |  |  | 0.50 (0.40 to 0.60) | 100.00 |" in text


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on idle cores
def test_rollouts_of_the_same_arithmetic_are_exact_and_misplaced_records_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    sizes = ["--seeds", "1", "--prompts", "1", "--steps", "1", "--threads", "1"]
    model = str(SCRIPT.parents[1] / "models" / "mini")
    command = [sys.executable, str(SCRIPT), "--model", model, "--out", str(out), *sizes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = decode_result(out.read_bytes(), source="out.json")

    def value(name: str, **labels: Label) -> float:
        found = result.find(name, **labels)
        assert found is not None, (name, labels)
        return found.median

    for policy in ("as it is", "after 1 steps in float32"):
        for way in ("none", "routing", "index", "both"):
            where: dict[str, Label] = {"policy": policy, "rollout": "f32", "replay": way}
            for answers in ("sampled", "given"):
                assert value("tokens that differ", **where, answers=answers) == 0
            assert value("router flips", **where) == value("index flips", **where) == 0
        for rollout in ("f32", "bf16", "fp8", "fp4"):
            where = {"policy": policy, "rollout": rollout}
            refused = {
                w: value("records refused", **where, replay=w) for w in ("none", "shuffled", "shifted")
            }
            assert refused == {"none": 0, "shuffled": 1, "shifted": 1}
        assert value("both over none", policy=policy, rollout="bf16", answers="sampled") < 1
    # The bundled weights are on the grids of every format; trained ones are not.
    same = "seeds equal to the precision before"
    for policy, is_on_grid in (("as it is", True), ("after 1 steps in float32", False)):
        assert (value("rounding of weights", policy=policy, rollout="fp4") == 0) is is_on_grid
        assert (value(same, policy=policy, rollout="fp4") == 1) is is_on_grid
        assert value(same, policy=policy, rollout="bf16") == 0
