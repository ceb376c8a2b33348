"""A run of reinforcement learning: parity at every step, the same bytes however it was interrupted."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from bittrue.cli.main import run as command
from bittrue.cli.rl import progress
from bittrue.errors import CheckpointError, ConfigError
from bittrue.obs.log import Log
from bittrue.rl.assembly import open_policy
from bittrue.rl.config import RlConfig
from bittrue.rl.problems import Problems
from bittrue.rl.sitting import train_policy
from bittrue.train.metrics import MetricsFile
from bittrue.train.run_file import checked, setting_help

MINI = Path(__file__).parents[2] / "models" / "mini"
STEPS = 4


def config(**sections: Any) -> RlConfig:
    """A short run on countdown, of which the bundled model solves a part."""
    small = {
        "model": {"start": str(MINI)},
        "data": {"tasks": {"countdown": 1.0}, "seed": 3},
        "rollout": {"prompts": 3, "group": 4, "max_tokens": 16, "kv_memory": "32MiB"},
        "optim": {"lr": 1e-3},
        "run": {"steps": STEPS, "threads": 1, "checkpoint_every": 2, "eval_every": 0},
    }
    names = small.keys() | sections.keys()
    return checked(RlConfig, {name: {**small.get(name, {}), **sections.get(name, {})} for name in names})


def weights_after(settings: RlConfig, out: Path, *, stop_after: int = 10**9) -> dict[str, Tensor]:
    """The masters at the end of a run, or after some steps of this process."""
    out.mkdir(exist_ok=True)
    done = 0

    def tell(values: object) -> None:
        nonlocal done
        done += 1

    log = Log(sys.stderr, "error")
    with open_policy(settings, out, log) as policy, MetricsFile(out / "metrics.jsonl") as metrics:
        policy.run.begin(metrics)
        policy.run.go(metrics, should_stop=lambda: done >= stop_after, tell=tell)
        return {name: leaf.detach().clone() for name, leaf in policy.trainer.masters.named.items()}


def lines_of(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def of_the_step(line: dict[str, float]) -> dict[str, float]:
    """Without what says how it was sampled this time: a recorded step is not sampled again."""
    how = ("perf/", "rollout/queue_depth", "rollout/prefix_hit_rate", "rollout/preemptions")
    return {name: value for name, value in line.items() if not name.startswith(how)}


def facts_of(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("begun_at", "seconds")} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return out, weights_after(config(), out)


def test_the_trainer_computes_what_was_sampled_at_every_step(whole: tuple[Path, dict[str, Tensor]]) -> None:
    lines = lines_of(whole[0])
    assert [line["step"] for line in lines] == list(range(STEPS))
    updates = [line for line in lines if "parity/differing" in line]
    assert len(updates) >= 2
    for line in updates:
        assert line["parity/num_tokens"] > 0
        assert line["parity/differing"] == line["parity/logprob_abs_diff/max"] == line["parity/k3"] == 0.0
        assert line["train/ratio/min"] == line["train/ratio/max"] == 1.0
        assert line["parity/router_flips"] == line["parity/index_flips"] == 0.0
        assert line["train/grad_norm"] > 0
    assert all(line["perf/sync_bytes"] > 0 for line in lines[:1])
    assert any(0 < line["reward/mean"] < 1 for line in lines)
    facts = facts_of(whole[0])
    assert [line["weights_after"] for line in facts[:-1]] == [line["weights_before"] for line in facts[1:]]
    assert all(line["versions"] == {line["weights_before"]: line["step"]} for line in facts)


@pytest.mark.slow
def test_drafts_and_batches_do_not_change_a_run(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    other = config(rollout={"speculation": "mtp", "max_running": 3})
    weights = weights_after(other, tmp_path / "run")
    assert all(bool((weights[name] == tensor).all()) for name, tensor in whole[1].items())


def test_a_run_that_was_stopped_ends_in_the_same_bytes(
    whole: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    weights_after(config(), out, stop_after=3)
    (out / "step-000003" / "state.json").unlink()  # the one before is taken: a step is run again
    weights = weights_after(config(), out)
    assert all(bool((weights[name] == tensor).all()) for name, tensor in whole[1].items())
    assert [of_the_step(line) for line in lines_of(whole[0])] == [of_the_step(line) for line in lines_of(out)]
    assert facts_of(whole[0]) == facts_of(out)


def test_a_directory_of_another_run_is_refused(whole: tuple[Path, dict[str, Tensor]]) -> None:
    with pytest.raises(CheckpointError, match="rollout.group"):
        train_policy(config(rollout={"group": 5}), whole[0], Log(sys.stderr, "error"))
    with pytest.raises(CheckpointError, match=r"threads was 1, now it is 2; set run.threads = 1"):
        weights_after(config(run={"threads": 2}), whole[0])
    assert not (whole[0] / "run.json").exists()  # its own settings are not lost to the other's


def test_a_run_whose_prompts_changed_is_refused(
    whole: tuple[Path, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Problems, "digest", lambda self: "another")
    with pytest.raises(CheckpointError, match="of another source"):
        weights_after(config(), whole[0])


def test_run_files_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"rollout.grup: unknown key; did you mean rollout.group\?"):
        config(rollout={"grup": 5})
    with pytest.raises(ConfigError, match="parity is 'roughly'; choose one of exact"):
        config(policy={"parity": "roughly"})
    with pytest.raises(ConfigError, match="calc take several answers"):
        weights_after(config(data={"tasks": {"calc": 1.0}}), tmp_path / "calc")
    path = tmp_path / "run.toml"
    path.write_text('[model]\nstart = "models/mini"\n[data]\ntasks = { sort = 1.0 }\n')
    assert command(["rl", str(path)]) == 2
    assert "run.out is missing" in capsys.readouterr().err
    assert command(["rl", str(path), "--out", str(tmp_path / "out"), "--ray", "head:6379"]) == 2
    assert "choose loop.engine = ray, or leave it out" in capsys.readouterr().err


def test_a_step_without_any_score_is_told_as_others_are(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(Log(sys.stderr), steps=2) as tell:
        tell(0, {})
        tell(1, {"parity/logprob_abs_diff/max": 0.0})  # a reward function said None of every answer
        tell(2, {"reward/mean": 0.5})
    assert [line.split("reward=")[1].split()[0] for line in capsys.readouterr().err.splitlines()] == [
        "None",
        "0.5",
    ]


def test_every_setting_is_in_the_page_of_rl() -> None:
    text = (MINI.parents[1] / "docs" / "rl.md").read_text(encoding="utf-8")
    settings = setting_help(RlConfig).items()
    rows = [f"| `{name}` | `{default}` | {help_line} |" for name, (default, help_line) in settings]
    assert [row for row in rows if row not in text] == []
