"""Prefills and decodes one long prompt through the HTTP server, once per chunk size, and compares the bits.

Usage: python benchmarks/long_prompt.py MODEL --out benchmarks/results/long-prompt.json

The server runs under GNU time, whose largest resident set is stored beside what the engine's ledger states.
Exit code 1: two chunk sizes gave different log-probabilities.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from bittrue.bench.result import Label, Measurement, measured, new_result, write_result
from bittrue.config.model import ModelConfig

OUTPUT_TOKENS = 130


@dataclass(frozen=True, slots=True)
class Answer:
    """What one server said: every log-probability as the text it was sent in."""

    prompt_logprobs: str
    logprobs: str
    first_s: float
    decode_s: float  # from the second token on: the first comes with millions of characters about the prompt
    progress: list[str]  # comment lines of the stream


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def serving(model: Path, report: Path, *options: str) -> Iterator[str]:
    """A server under GNU time, which writes to ``report`` when the server has ended."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    server = [sys.executable, "-m", "bittrue.cli.main", "serve", str(model), "--port", str(port), *options]
    process = subprocess.Popen(["/usr/bin/time", "-v", "-o", str(report), *server])
    try:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == httpx.codes.OK:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with code {process.returncode}")
            time.sleep(0.1)
        yield url
    finally:
        # GNU time does not hand signals on: its child is the server.
        children = (
            Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        )
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGTERM)
        process.wait()


def ask(url: str, prompt: list[int]) -> Answer:
    """The prompt's and the answer's log-probabilities, over a stream."""
    sampling = {"max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    body = {
        "prompt_ids": prompt,
        "stream": True,
        "sampling": {**sampling, "logprobs": 0, "prompt_logprobs": 0},
    }
    start = time.perf_counter()
    lines, arrived_s, comments = [], [], []
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=None) as response:
        if response.status_code != httpx.codes.OK:
            raise SystemExit(f"{response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line.startswith(":"):
                comments.append(line)
            elif line.startswith("data: {"):
                arrived_s.append(time.perf_counter() - start)
                lines.append(line.removeprefix("data: "))
    events = [json.loads(line, parse_float=str) for line in lines]
    prompt_part = next(e["prompt_logprobs"] for e in events if e.get("prompt_logprobs"))
    generated = [entry for e in events for entry in e["logprobs"]]
    assert len(prompt_part) == len(prompt) and len(generated) == OUTPUT_TOKENS
    decode_s = arrived_s[-1] - arrived_s[1]
    return Answer(json.dumps(prompt_part), json.dumps(generated), arrived_s[0], decode_s, comments)


def largest_resident(report: Path) -> int:
    """Bytes, of GNU time's report."""
    found = re.search(r"Maximum resident set size \(kbytes\): (\d+)", report.read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) * 1024


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a checkpoint directory")
    parser.add_argument("--out", type=Path, required=True, help="the result file to write")
    parser.add_argument("--tokens", type=int, default=131072, help="of the prompt")
    parser.add_argument("--chunks", default="512,2048,333", help="values of --max-step-tokens, by comma")
    parser.add_argument("--kv-memory", default="1GiB")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    vocab = ModelConfig.from_file(arguments.model / "config.json").vocab_size
    source = random.Random(0)
    prompt = [source.randrange(vocab) for _ in range(arguments.tokens)]
    found: list[Measurement] = []
    answers: list[Answer] = []
    for chunk in arguments.chunks.split(","):
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "time"
            options = (
                "--max-step-tokens",
                chunk,
                "--max-context",
                "1048576",
                "--kv-memory",
                arguments.kv_memory,
            )
            with serving(arguments.model, report, *options) as url:
                answer = ask(url, prompt)
                ledger = ledger_bytes(url)
            resident = largest_resident(report)
        answers.append(answer)
        labels: dict[str, Label] = {"tokens": arguments.tokens, "chunk": int(chunk)}
        found.append(measured("time to first token", "s", [answer.first_s], labels))
        found.append(measured("prefill", "tokens/s", [arguments.tokens / answer.first_s], labels))
        decode = (OUTPUT_TOKENS - 2) / answer.decode_s
        found.append(measured("decode", "tokens/s", [decode], labels))
        found.append(measured("largest resident", "bytes", [resident], {**labels, "ledger_bytes": ledger}))
        found.append(measured("progress comments", "count", [len(answer.progress)], labels))
        same = answer.prompt_logprobs == answers[0].prompt_logprobs and answer.logprobs == answers[0].logprobs
        found.append(measured("same bits as the first", "count", [int(same)], labels))
        sys.stderr.write(
            f"chunk {chunk}: first token {answer.first_s:.1f} s, "
            f"{arguments.tokens / answer.first_s:.0f} tokens/s, decode {decode:.1f} tokens/s, "
            f"resident {resident / 1e6:.0f} MB (ledger {ledger / 1e6:.0f} MB), "
            f"{len(answer.progress)} comments, {'same bits' if same else 'OTHER BITS'}\n"
        )
    command = shlex.join(["python", *sys.argv])
    config: dict[str, Label] = {"model": arguments.model.name, "kv_memory": arguments.kv_memory}
    write_result(arguments.out, new_result("long-prompt", command, config, found))
    return 0 if all(m.median == 1 for m in found if m.name == "same bits as the first") else 1


def ledger_bytes(url: str) -> int:
    """The sum of the engine's own ledger, from its metrics."""
    text = httpx.get(f"{url}/metrics").text
    return int(
        sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith("bittrue_memory_bytes{")
        )
    )


if __name__ == "__main__":
    sys.exit(main())
