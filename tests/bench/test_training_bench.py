"""The comparison of training with transformers computes the same model in both, and stores its ratios."""

import subprocess
import sys
from pathlib import Path

import pytest

from bittrue.bench.result import decode_result

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training.py"
RUN = """\
[model]
preset = "tiny"
draft = "mtp"
config = { vocab_size = 640 }
[data]
tasks = { sort = 1.0 }
"""


def compared(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    run = tmp_path / "run.toml"
    run.write_text(RUN, encoding="utf-8")
    command = [sys.executable, str(SCRIPT), "--run", str(run), "--out", str(tmp_path / "out.json"), *options]
    return subprocess.run([*command, "--threads", "1"], capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_both_train_the_same_model(tmp_path: Path) -> None:
    done = compared(tmp_path, "--lengths", "32,160", "--tokens", "160", "--rounds", "2")
    assert done.returncode == 0, done.stderr
    result = decode_result((tmp_path / "out.json").read_bytes(), source="out.json")
    for length, is_exact in ((32, True), (160, False)):
        loss = result.find("loss off by", length=length)
        assert loss is not None and loss.labels["exact"] is is_exact and loss.median < 1e-5
        ours, theirs = (
            result.find("training", by=by, length=length)
            for by in ("bittrue, published", "transformers, fastest")
        )
        ratio = result.find(
            "training over transformers", by="bittrue, published", length=length, over="fastest"
        )
        assert ours is not None and theirs is not None and ratio is not None and ratio.repeats == 2
        assert ratio.low <= ours.high / theirs.low and ours.low / theirs.high <= ratio.high
    assert done.stdout.startswith("| tiny, 160 tokens a step: tokens/s | documents of 32 |")


@pytest.mark.slow
def test_documents_longer_than_a_step_are_refused(tmp_path: Path) -> None:
    done = compared(tmp_path, "--lengths", "64", "--tokens", "32")
    assert done.returncode == 1 and "--lengths have to be from 1 to --tokens" in done.stderr
