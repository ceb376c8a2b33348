import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from bittrue.rl.verifiers.audit import audit_table, cases_for, run_audit
from bittrue.rl.verifiers.http import MAX_REPLY, Http
from bittrue.rl.verifiers.pool import Pool
from bittrue.rl.verifiers.verifier import answer_of

REPLIES = {
    "/half": b'{"score": 0.5, "sub_scores": {"style": 0.25}}',
    "/unparsable": b'{"outcome": "unparsable", "detail": "no number"}',
    "/late": b'{"outcome": "timeout"}',
    "/crashed": b'{"outcome": "crash"}',
    "/right_without_score": b'{"outcome": "right"}',
    "/text": b"right",
    "/wrong_type": b'{"score": "1"}',
    "/too_large": b'{"score": 1, "detail": "' + b"x" * MAX_REPLY + b'"}',
}


class Handler(BaseHTTPRequestHandler):
    """Compares the answer with the problem at /compare; says a fixed thing elsewhere."""

    release = threading.Event()

    def do_POST(self) -> None:
        told: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["content-length"])))
        status, reply = 200, REPLIES.get(self.path, b"")
        if self.path == "/compare":
            is_right = told["answers"][-1]["content"] == told["problem"] and self.headers["x-key"] == "k"
            reply = json.dumps({"score": float(is_right)}).encode()
        if self.path == "/error":
            status, reply = 500, b'{"score": 1}'
        if self.path == "/hangs":
            self.release.wait(60)
        self.send_response(status)
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        try:
            self.wfile.write(reply)
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        return


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        Handler.release.set()
        server.shutdown()
        thread.join()


def test_the_other_side_judges(pool: Pool, url: str) -> None:
    verifier = Http(f"{url}/compare", "42", {"x-key": "k"})
    assert [pool.judge(verifier, answer_of(text)).outcome for text in ("42", "43")] == ["right", "wrong"]


def test_a_part_of_a_score_counts_if_asked_for(pool: Pool, url: str) -> None:
    strict = pool.judge(Http(f"{url}/half"), answer_of("x"))
    assert (strict.score, dict(strict.sub_scores)) == (0.0, {"style": 0.25, "value": 0.5})
    assert pool.judge(Http(f"{url}/half", is_strict=False), answer_of("x")).score == 0.5


@pytest.mark.parametrize(
    ("path", "outcome"),
    [
        ("/unparsable", "unparsable"),
        ("/late", "timeout"),
        ("/crashed", "crash"),
        ("/right_without_score", "crash"),
        ("/text", "crash"),
        ("/wrong_type", "crash"),
        ("/too_large", "crash"),
        ("/error", "crash"),
    ],
)
def test_every_reply_has_an_outcome(pool: Pool, url: str, path: str, outcome: str) -> None:
    assert pool.judge(Http(url + path), answer_of("x")).outcome == outcome


def test_no_reply_is_a_timeout(pool: Pool, url: str) -> None:
    assert pool.judge(Http(f"{url}/hangs"), answer_of("x"), seconds=0.3).outcome == "timeout"


@pytest.mark.parametrize("address", ["http://127.0.0.1:9/", "nothing", "http://[::1"])
def test_nobody_there_is_a_crash(pool: Pool, address: str) -> None:
    verdict = pool.judge(Http(address), answer_of("x"))
    assert (verdict.outcome, verdict.score) == ("crash", None)


@pytest.mark.slow
def test_no_adversarial_answer_scores(pool: Pool, url: str) -> None:
    rows = run_audit(pool, cases_for(Http(f"{url}/compare", "42", {"x-key": "k"}), "42"))
    assert all(row.holds for row in rows), audit_table(rows)
