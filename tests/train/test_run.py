import json
import math
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_run import (
    MODEL,
    THREADS,
    SmallRun,
    Watched,
    final_bytes,
    no_room,
    settings,
    untimed_metrics,
)
from torch import Tensor

from bittrue.config.model import ModelConfig
from bittrue.engine.engine import Engine
from bittrue.errors import CheckpointError, TrainingFailed
from bittrue.model.convert import open_source
from bittrue.model.inventory import inventory
from bittrue.model.quantize import dequantize
from bittrue.model.tensor_file import map_tensors, read_header
from bittrue.train.assembly import open_origin
from bittrue.train.checkpoint import FACTS_FILE, TENSORS_FILE, Checkpoints, read_checkpoint
from bittrue.train.config import ModelSection, TrainConfig
from bittrue.train.document import Document
from bittrue.train.loss import LossWeights
from bittrue.train.metrics import METRICS_FILE, MetricsFile
from bittrue.train.spike import Routes
from bittrue.train.trainer import StepStats, Trainer

STEPS = 6
# Every phase has its end within the run: dense attention at 1, formats at 3, the draft's weight at 4.
PLAIN = settings(schedule={"dense_steps": 1, "qat_step": 3, "mtp_late_step": 4})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SmallRun:
    run = SmallRun(PLAIN, tmp_path_factory.mktemp("whole"))
    assert run.go()
    return run


def assert_same(directory: Path, whole: SmallRun) -> None:
    assert final_bytes(directory, STEPS) == final_bytes(whole.directory, STEPS)
    assert untimed_metrics(directory) == untimed_metrics(whole.directory)


def test_a_run_learns_and_leaves_its_checkpoints(whole: SmallRun) -> None:
    rows = untimed_metrics(whole.directory)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert rows[-1]["main"] < rows[0]["main"] - 0.5
    assert sorted(path.name for path in whole.directory.glob("step-*")) == [
        "step-000002",
        "step-000004",
        "step-000006",
    ]


def test_a_line_of_the_metrics_says_what_the_step_was(whole: SmallRun) -> None:
    row = untimed_metrics(whole.directory)[0]
    documents = whole.source.documents(0)
    assert row["tokens"] == sum(map(len, documents))
    assert row["targets"] == sum(int(document.is_target.sum()) for document in documents)
    assert row["tasks"].keys() == {document.task for document in documents}
    assert sum(total for total, _ in row["tasks"].values()) / row["targets"] == pytest.approx(row["main"])
    assert row["lr"] == pytest.approx(0.005)  # half way through the warm-up
    assert all(least <= 1 <= most for most, least in row["load"].values())


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bytes(whole: SmallRun, tmp_path: Path, stop_at: int) -> None:
    """3: no checkpoint was due, and the formats change with the next step."""
    assert SmallRun(PLAIN, tmp_path).go(stop_at=stop_at) is False
    resumed = SmallRun(PLAIN, tmp_path)
    assert resumed.run.step == stop_at
    assert resumed.go() is True
    assert_same(tmp_path, whole)


class Dying(Watched):
    """Dies in step 5."""

    def update_biases(self, loads: Any, speed: float) -> None:
        super().update_biases(loads, speed)
        if self.source.last == 5:
            raise KeyboardInterrupt


def test_a_run_that_died_within_a_step_goes_on_to_the_same_bytes(whole: SmallRun, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        SmallRun(PLAIN, tmp_path, plant=Dying).go()
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "ma')  # what a kill leaves of a line
    resumed = SmallRun(PLAIN, tmp_path)
    assert resumed.run.step == 4
    resumed.go()
    assert_same(tmp_path, whole)


def test_a_damaged_checkpoint_costs_steps_and_no_bit(whole: SmallRun, tmp_path: Path) -> None:
    SmallRun(PLAIN, tmp_path).go(stop_at=4)
    damaged = tmp_path / "step-000004" / TENSORS_FILE
    damaged.write_bytes(damaged.read_bytes()[:-1])
    resumed = SmallRun(PLAIN, tmp_path)
    assert resumed.run.step == 2
    assert "step-000002 is used instead" in resumed.told.getvalue()
    resumed.go()
    assert_same(tmp_path, whole)


def test_a_damaged_checkpoint_of_the_last_step_is_written_again(whole: SmallRun, tmp_path: Path) -> None:
    """Also where none is due at that step."""
    config = changed(run={"checkpoint_every": 4})
    SmallRun(config, tmp_path).go()
    damaged = tmp_path / f"step-{STEPS:06d}" / FACTS_FILE
    damaged.write_text("{}")
    resumed = SmallRun(config, tmp_path)
    assert resumed.run.step == 4
    resumed.go()
    assert SmallRun(config, tmp_path).run.step == STEPS
    assert_same(tmp_path, whole)


def test_the_end_can_be_moved(whole: SmallRun, tmp_path: Path) -> None:
    shutil.copytree(whole.directory, tmp_path / "run")
    assert SmallRun(PLAIN, tmp_path / "run").go(STEPS + 1)
    assert [row["step"] for row in untimed_metrics(tmp_path / "run")] == list(range(STEPS + 1))


def changed(**sections: Any) -> TrainConfig:
    merged: dict[str, Any] = {"schedule": {"dense_steps": 1, "qat_step": 3, "mtp_late_step": 4}}
    for section, changes in sections.items():
        merged[section] = {**merged.get(section, {}), **changes}
    return settings(**merged)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (changed(optim={"lr": 0.02}), "another run file: optim.lr was 0.01, now it is 0.02"),
        (changed(schedule={"qat_step": 4}), "schedule.qat_step was 3, now it is 4"),
        (
            changed(model={"config": {**MODEL["config"], "moe_intermediate_size": 64}}),  # type: ignore[dict-item]
            "another model: moe_intermediate_size was 32, now it is 64",
        ),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(
    whole: SmallRun, config: TrainConfig, message: str
) -> None:
    before = sorted(whole.directory.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        SmallRun(config, whole.directory)
    assert sorted(whole.directory.rglob("*")) == before


def test_other_threads_are_refused_unless_told(whole: SmallRun) -> None:
    with pytest.raises(CheckpointError, match="threads was 1, now it is 2; .* run.any_threads"):
        SmallRun(PLAIN, whole.directory, threads=2)
    told = changed(run={"any_threads": True})
    assert SmallRun(told, whole.directory, threads=2).run.step == STEPS


class Bad(Watched):
    """From step 3 on one number is none."""

    def backward(
        self, documents: Sequence[Document], weights: LossWeights, *, routes: Routes | None = None
    ) -> StepStats:
        stats = super().backward(documents, weights, routes=routes)
        if self.source.last == 3:
            self.spoil(stats, self.masters.named["layers.0.attn.wkv.weight"])
        return stats

    def spoil(self, stats: StepStats, weight: Tensor) -> None:
        stats.mtp = math.nan


class BadGradient(Bad):
    def spoil(self, stats: StepStats, weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad[0, 0] = math.inf


@pytest.mark.parametrize(
    ("plant", "message", "term"),
    [
        (Bad, "step 3: the mtp loss is nan; the last good checkpoint is", "mtp"),
        (BadGradient, "step 3: the gradient of layers.0.attn.wkv.weight is not", "layers.0.attn.wkv.weight"),
    ],
)
def test_a_number_that_is_none_ends_the_run_before_it_does_harm(
    tmp_path: Path, plant: type[Watched], message: str, term: str
) -> None:
    run = SmallRun(settings(), tmp_path, plant=plant)
    with pytest.raises(TrainingFailed, match=message) as caught:
        run.go()
    assert (caught.value.step, caught.value.term) == (3, term)
    assert str(tmp_path / "step-000002") in str(caught.value)
    assert [row["step"] for row in untimed_metrics(tmp_path)] == [0, 1, 2]
    for _, value in run.run.trainer.masters.named.items():
        assert bool(torch.isfinite(value).all())
    assert SmallRun(settings(), tmp_path).run.step == 2


def test_the_export_is_what_was_trained(whole: SmallRun, tmp_path: Path) -> None:
    path = whole.run.export(tmp_path / "published", whole.origin.files)
    assert (path / "tokenizer.json").read_bytes() == whole.origin.files["tokenizer.json"]
    assert json.loads((path / "config.json").read_text()) == whole.origin.raw
    file = path / "model.safetensors"
    tensors = map_tensors(file, read_header(file))
    assert torch.equal(
        tensors["layers.2.ffn.gate.bias"], whole.run.trainer.masters.biases["layers.2.ffn.gate.bias"]
    )
    assert tensors["layers.2.ffn.experts.3.w1.weight"].dtype == torch.int8
    document = whole.source.documents(9)[0]
    engine = Engine(path, prefix_cache=False, kv_memory="32MiB", threads=THREADS, log_level="error")
    scores = engine.score(document.token_ids.tolist())
    engine.close()
    trainer = whole.run.trainer
    assert isinstance(trainer, Watched) and isinstance(trainer.inner, Trainer)
    assert torch.equal(trainer.inner.logprobs([document])[0], torch.tensor(scores))


def test_an_export_that_cannot_be_written_is_named_and_leaves_nothing(
    whole: SmallRun, tmp_path: Path
) -> None:
    with no_room(1000), pytest.raises(CheckpointError, match=f"cannot write {tmp_path / 'full'}: File too"):
        whole.run.export(tmp_path / "full", whole.origin.files)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path / 'file' / 'x'}: .*; the run is kept"):
        whole.run.export(tmp_path / "file" / "x", whole.origin.files)


def test_a_run_can_start_from_anothers_weights(whole: SmallRun, tmp_path: Path) -> None:
    start = whole.directory / f"step-{STEPS:06d}"
    other = SmallRun(changed(model={"start": str(start), "precision": "fp8"}), tmp_path)
    assert other.run.step == 0
    assert "expert_dtype" not in other.origin.raw  # fp8 everywhere
    for name, value in whole.run.trainer.masters.named.items():
        assert torch.equal(value, other.run.trainer.masters.named[name]), name


def test_a_run_can_start_from_a_published_checkpoint(whole: SmallRun, tmp_path: Path) -> None:
    """The masters are the published values then, and publishing them again changes none."""
    path = whole.run.export(tmp_path / "published", whole.origin.files)
    (tmp_path / "run").mkdir()
    config = changed(model={"start": str(path), "precision": None, "config": {}})
    other = SmallRun(config, tmp_path / "run")
    assert dict(other.origin.raw) == dict(whole.origin.raw)
    first, again = (open_source(p) for p in (path, other.run.export(tmp_path / "again", other.origin.files)))
    for spec in inventory(ModelConfig.from_dict(other.origin.raw), draft="mtp"):
        if spec.dtype in ("I8", "F8_E4M3"):
            assert torch.equal(dequantize(first.matrix(spec.name)), dequantize(again.matrix(spec.name))), spec
        elif spec.dtype != "F8_E8M0":
            assert torch.equal(first.tensor(spec.name), again.tensor(spec.name)), spec


def test_a_start_without_tokenizer_is_refused(whole: SmallRun, tmp_path: Path) -> None:
    start = tmp_path / "moved"
    shutil.copytree(whole.directory / f"step-{STEPS:06d}", start)
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json"):
        open_origin(ModelSection.model_validate({"start": str(start)}))


def test_a_start_of_other_sizes_is_refused_with_the_weight(whole: SmallRun, tmp_path: Path) -> None:
    start = whole.directory / f"step-{STEPS:06d}"
    config = changed(model={"start": str(start), "config": {"moe_intermediate_size": 64}})
    with pytest.raises(CheckpointError, match=r"layers\.0\.ffn\.experts\.w. does not fit"):
        SmallRun(config, tmp_path)


def test_the_facts_name_the_settings(whole: SmallRun) -> None:
    facts = json.loads((whole.directory / f"step-{STEPS:06d}" / FACTS_FILE).read_text())
    assert facts["digest"] == PLAIN.digest
    assert facts["identity"]["optim.lr"] == 0.01
    assert facts["config"] == whole.origin.raw
    assert facts["threads"] == 1


def test_a_checkpoint_without_its_facts_is_refused(
    whole: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallRun(PLAIN, tmp_path)
    found = replace(read_checkpoint(tmp_path / "step-000000"), facts={"config": whole.origin.raw})
    monkeypatch.setattr(Checkpoints, "newest", lambda self, warn: found)
    with pytest.raises(CheckpointError, match=r"step-000000 lacks 'identity'; choose another directory"):
        SmallRun(PLAIN, tmp_path)


def test_a_metrics_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot write {tmp_path}: Is a directory; choose another"):
        MetricsFile(tmp_path)


def test_metrics_are_cut_where_a_run_goes_on(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    with MetricsFile(path) as metrics:
        metrics.cut(2)
        metrics.append({"step": 2, "again": True})
    assert path.read_text() == '{"step": 0}\n{"step": 1}\n{"step": 2, "again": true}\n'


@pytest.mark.slow
def test_stops_at_random_steps_change_no_bit(whole: SmallRun, tmp_path: Path) -> None:
    rng = random.Random(0)
    for case in range(3):
        directory = tmp_path / str(case)
        directory.mkdir()
        done = False
        while not done:
            run = SmallRun(PLAIN, directory)
            done = run.go(stop_at=run.run.step + rng.randint(1, 2))
        assert_same(directory, whole)


def test_a_full_disk_under_the_metrics_ends_the_run() -> None:
    with MetricsFile(Path("/dev/full")) as metrics:
        with pytest.raises(CheckpointError, match="cannot write /dev/full: No space left on device"):
            metrics.append({"step": 0})


def test_a_full_disk_under_a_checkpoint_ends_the_run_with_the_last_good_one(
    whole: SmallRun, tmp_path: Path
) -> None:
    run = SmallRun(PLAIN, tmp_path)
    run.go(stop_at=2)
    with no_room(len(final_bytes(tmp_path, 2)) // 2), pytest.raises(CheckpointError) as caught:
        run.go()
    assert str(caught.value).startswith(f"cannot write the checkpoint {tmp_path / 'step-000004'}: ")
    assert f"the last good checkpoint is {tmp_path / 'step-000002'}; make room" in str(caught.value)
    resumed = SmallRun(PLAIN, tmp_path)
    assert resumed.run.step == 2
    resumed.go()
    assert_same(tmp_path, whole)
