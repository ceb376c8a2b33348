"""A live server on a loopback port over the n-gram engine, as a subprocess."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Self

import httpx
from standins.ngram_engine import Reply, StandinOptions

from bittrue.text.small_tokenizer import small_tokenizer_json
from bittrue.text.tokenizer import Tokenizer

VOCAB_SIZE = 512
NUM_PLAIN = 449  # ids 3 .. 448 are bytes and merges
MODEL = "tiny"
FACTORY = "standins.ngram_engine:NgramEngine"
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from bittrue.cli.main import run
from bittrue.config.load import load_run_config
from bittrue.engine.launch import EngineProcess
from bittrue.errors import BittrueError
from bittrue.server.run import run_server
try:
    config = load_run_config(None, json.loads(sys.argv[2]))
    with EngineProcess.start(config, factory=sys.argv[3]) as engine:
        sys.exit(run_server(config, engine))
except BittrueError as error:
    sys.stderr.write(f"bittrue: {error}\\n")
    sys.exit(error.exit_code)
"""


def write_model(directory: Path, *, replies: dict[str, str] | None = None, **options: Any) -> Tokenizer:
    """A stand-in model directory. ``replies``: prompt text -> answer text, where the markers ``</think>`` and
    DSML become the special tokens."""
    document = _tokenizer_json()
    (directory / "tokenizer.json").write_text(document)
    tokenizer = Tokenizer(document.encode(), source="small")
    texts = replies or {}
    pairs = [Reply(tokenizer.encode_text(key), ids_of(tokenizer, texts[key])) for key in texts]
    values: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "low": 3,
        "high": NUM_PLAIN,
        "max_context": 8192,
        "num_pages": 200_000,
        "replies": pairs,
    }
    StandinOptions(**{**values, **options}).save(directory)
    return tokenizer


@cache
def _tokenizer_json() -> str:
    return small_tokenizer_json(VOCAB_SIZE)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of text in which markers stand for special tokens."""
    ids: list[int] = []
    for piece in re.split("(</think>|｜DSML｜)", text):
        is_marker = piece in ("</think>", "｜DSML｜")
        ids += [tokenizer.special_id(piece)] if is_marker else tokenizer.encode_text(piece)
    return ids


@dataclass
class LiveServer:
    """One server process. Leaving the ``with`` block ends it."""

    directory: Path
    knobs: dict[str, Any] = field(default_factory=dict)
    url: str = ""
    log: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self.start()
        deadline = time.monotonic() + 60
        while not self.url:
            assert self.process.poll() is None, "".join(self.log)
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.01)
        self.http = httpx.Client(base_url=self.url, timeout=30, verify=False)
        return self

    def start(self) -> None:
        flags = {"model": str(self.directory), "served_name": MODEL, "port": 0, **self.knobs}
        arguments = [json.dumps(sys.path), json.dumps(flags), FACTORY]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments], stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            found = re.search(r" serving url=(\S+)", line)
            if found:
                self.url = found[1]

    def wait(self, timeout_s: float = 20) -> int:
        """The exit code."""
        code = self.process.wait(timeout_s)
        self._reader.join(5)
        return code

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def stream(self, path: str, body: Any) -> list[Any]:
        """The data of every event of a stream; ``[DONE]`` as that text."""
        events = []
        with self.http.stream("POST", path, json=body) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if line.startswith("data: "):
                    events.append(line[6:] if line == "data: [DONE]" else json.loads(line[6:]))
        return events

    def stats(self) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get("/admin/stats").json()
        return answer

    def is_idle_and_conserved(self, timeout_s: float = 5) -> bool:
        """Whether soon nothing runs, nothing waits, and free + held + cached = total with nothing
        held."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            stats = self.stats()
            for kind in ("pages", "slots"):
                parts = [stats[f"{kind}_{state}"] for state in ("free", "held", "cached")]
                assert sum(parts) == stats[f"{kind}_total"], stats
            if stats["pages_held"] == stats["num_running"] == stats["num_waiting"] == 0:
                return True
            time.sleep(0.02)
        return False

    def engine_pid(self) -> int:
        pids = [line for line in self.log if " engine_ready " in line]
        found = re.search(r"pid=(\d+)", pids[-1])
        assert found is not None
        return int(found[1])

    def kill_engine(self) -> None:
        os.kill(self.engine_pid(), signal.SIGKILL)

    def wait_for_log(self, text: str, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while not any(text in line for line in self.log):
            assert time.monotonic() < deadline, "".join(self.log)
            time.sleep(0.02)
