import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.small_run import SmallRun, final_bytes, untimed_metrics

from bittrue.cli.main import run
from bittrue.model.weights import load_checkpoint
from bittrue.train.config import load_train_config
from bittrue.train.metrics import METRICS_FILE

RUN_FILE = """
[model]
preset = "tiny"
config = { num_hidden_layers = 3, num_hash_layers = 1, vocab_size = 640, hc_sinkhorn_iters = 2 }
[data]
max_tokens = 256
tasks = { sort = 1.0 }
[optim]
lr = 0.01
[schedule]
warmup_steps = 2
[run]
steps = 40
tokens_per_step = 60
checkpoint_every = 5
log_every = 5
threads = 1
"""


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(RUN_FILE, encoding="utf-8")
    return path


def start(run_file: Path, out: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bittrue.cli.main", "train", str(run_file), "--out", str(out), *options]
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    return subprocess.Popen(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )


def num_lines(out: Path) -> int:
    path = out / METRICS_FILE
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for_lines(process: subprocess.Popen[str], out: Path, count: int) -> None:
    """Until the metrics have ``count`` lines or the process has ended."""
    while process.poll() is None and num_lines(out) < count:
        time.sleep(0.005)


def test_a_killed_run_ends_in_the_same_bytes(run_file: Path, tmp_path: Path) -> None:
    """Killed by SIGKILL in a step after the first checkpoint, then gone on with to step 12."""
    config = load_train_config(run_file, {"run.steps": 12})
    process = start(run_file, tmp_path / "killed")
    wait_for_lines(process, tmp_path / "killed", 7)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    resumed = SmallRun(config, tmp_path / "killed")
    assert resumed.run.step >= 5
    resumed.go()
    (tmp_path / "whole").mkdir()
    SmallRun(config, tmp_path / "whole").go()
    assert final_bytes(tmp_path / "killed", 12) == final_bytes(tmp_path / "whole", 12)
    assert untimed_metrics(tmp_path / "killed") == untimed_metrics(tmp_path / "whole")


def test_a_run_from_file_to_export(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, exported = tmp_path / "run", tmp_path / "published"
    command = ["train", str(run_file), "--out", str(out), "--steps", "3"]
    assert run(command) == 0
    assert capsys.readouterr().out == f"{out}\n"
    assert json.loads((out / "run.json").read_text())["run"]["steps"] == 3
    assert "3 of 3" in (out / "report.html").read_text()
    # It is finished: the same command again has nothing to train, and exports.
    assert run([*command, "--export", str(exported)]) == 0
    assert capsys.readouterr().out == f"{exported}\n"
    assert load_checkpoint(exported).draft_kind == "mtp"
    assert run([*command, "--export", str(exported)]) == 2
    assert f"{exported} exists and is not empty" in capsys.readouterr().err


def test_sigterm_ends_with_a_checkpoint(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        while num_lines(out) < 2:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=terminate)
    sender.start()
    assert run(["train", str(run_file), "--out", str(out), "--steps", "100000"]) == 130
    sender.join()
    shown = capsys.readouterr()
    steps = num_lines(out)
    assert shown.out == ""
    assert f"stopped step={steps} of=100000" in shown.err
    assert signal.getsignal(signal.SIGTERM) == before
    assert SmallRun(load_train_config(run_file), out).run.step == steps


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (RUN_FILE + "[optim2]\nlr = 1", ["--out", "x"], "optim2: unknown key; did you mean optim?"),
        (RUN_FILE, [], "run.out is missing"),
        (RUN_FILE, ["--out", "x", "--steps", "0"], "run.steps: Input should be greater than or equal to 1"),
        (RUN_FILE, ["--out", "/proc/none"], "cannot write /proc/none"),
        (RUN_FILE.replace("sort =", "sorting ="), ["--out", "x"], "no task 'sorting'"),
        (RUN_FILE.replace("hc_sinkhorn_iters", "hc_iterations"), ["--out", "x"], "hc_iterations"),
        (RUN_FILE.replace('"tiny"', '"tinny"'), ["--out", "x"], "model.preset is 'tinny'"),
        (
            RUN_FILE.replace("tasks = { sort = 1.0 }", 'jsonl = "lines.jsonl"'),
            ["--out", "x"],
            "lines.jsonl:2: ",
        ),
    ],
)
def test_bad_input_exits_2_with_its_place(
    text: str,
    options: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(text, encoding="utf-8")
    Path("lines.jsonl").write_text('{"text": "abc"}\nno json\n', encoding="utf-8")
    assert run(["train", "run.toml", *options]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and "Traceback" not in shown.err
    assert shown.out == ""
    assert list(tmp_path.glob("x/step-*")) == []


def test_a_file_of_lines_that_changed_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN_FILE.replace("tasks = { sort = 1.0 }", 'jsonl = "lines.jsonl"'))
    Path("lines.jsonl").write_text('{"text": "abc def ghi"}\n' * 4)
    assert run(["train", "run.toml", "--out", "x", "--steps", "1"]) == 0
    Path("lines.jsonl").write_text('{"text": "abc def ghj"}\n' * 4)
    assert run(["train", "run.toml", "--out", "x", "--steps", "2"]) == 2
    assert "another data file: sha256 was" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(run_file: Path, tmp_path: Path) -> None:
    """Five kills in one run, at moments that have nothing to do with its steps, then the rest."""
    rng = random.Random(time.time_ns())
    out = tmp_path / "killed"
    kills = 0
    while kills < 5:
        process = start(run_file, out)
        wait_for_lines(process, out, max(1, num_lines(out) - 4))
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        process.communicate()
        if process.returncode == 0:
            break
        kills += 1
    assert kills == 5, "the run was over before it was killed five times"
    process = start(run_file, out)
    process.communicate(timeout=120)
    assert process.returncode == 0
    (tmp_path / "whole").mkdir()
    SmallRun(load_train_config(run_file), tmp_path / "whole").go()
    assert final_bytes(out, 40) == final_bytes(tmp_path / "whole", 40)
    assert untimed_metrics(out) == untimed_metrics(tmp_path / "whole")


def test_a_run_goes_on_without_the_checkpoint_it_started_from(run_file: Path, tmp_path: Path) -> None:
    first, second, whole = tmp_path / "first", tmp_path / "second", tmp_path / "whole"
    assert run(["train", str(run_file), "--out", str(first), "--steps", "5"]) == 0
    stage = tmp_path / "stage.toml"
    begun = f'[model]\nstart = "{first / "step-000005"}"'
    stage.write_text(begun + RUN_FILE[RUN_FILE.index("\n[data]") :], encoding="utf-8")
    assert run(["train", str(stage), "--out", str(whole), "--steps", "6"]) == 0
    assert run(["train", str(stage), "--out", str(second), "--steps", "5"]) == 0
    shutil.rmtree(first)
    exported = tmp_path / "exported"
    assert run(["train", str(stage), "--out", str(second), "--steps", "6", "--export", str(exported)]) == 0
    assert final_bytes(second, 6) == final_bytes(whole, 6)
    assert load_checkpoint(exported).draft_kind == "mtp"


def test_a_start_that_is_a_run_directory_is_told_of_its_checkpoints(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = tmp_path / "first"
    assert run(["train", str(run_file), "--out", str(first), "--steps", "1"]) == 0
    stage = tmp_path / "stage.toml"
    stage.write_text(f'[model]\nstart = "{first}"' + RUN_FILE[RUN_FILE.index("\n[data]") :], encoding="utf-8")
    assert run(["train", str(stage), "--out", str(tmp_path / "second")]) == 2
    assert f"give one of its checkpoints, such as {first / 'step-000001'}" in capsys.readouterr().err


def test_metrics_without_a_checkpoint_are_not_written_over(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / METRICS_FILE).write_text('{"step": 0}\n', encoding="utf-8")
    assert run(["train", str(run_file), "--out", str(out)]) == 2
    assert "but no checkpoint; choose another run directory" in capsys.readouterr().err
    assert (out / METRICS_FILE).read_text(encoding="utf-8") == '{"step": 0}\n'
