"""How far a run is: a bar where someone watches, lines elsewhere, never both."""

import io

import pytest

from bittrue.obs.log import Log
from bittrue.train.progress import TrainProgress
from bittrue.train.run import Progress

VALUES = {
    "main": 1.25, "mtp": 2.0, "index": 0.1, "balance": 1.0, "grad_norm": 3.0, "lr": 1e-3, "tokens": 64,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    with TrainProgress(Log(stream), step=0, steps=5, every=2) as progress:
        for step in range(1, 6):
            progress(Progress(step, VALUES, is_anticipating=step == 4))
    return stream.getvalue()


def test_a_line_is_written_every_few_steps_and_at_the_end() -> None:
    lines = shown(io.StringIO()).splitlines()
    assert [line.split("n=")[1].split()[0] for line in lines] == ["2/5", "4/5", "5/5"]
    assert "loss=1.25" in lines[0] and "left_s=0" in lines[2]
    assert ["anticipating" in line for line in lines] == [False, True, False]


def test_a_terminal_has_the_bar_and_no_line_through_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    text = shown(Terminal())
    assert "loss 1.2500" in text
    assert "INFO" not in text
