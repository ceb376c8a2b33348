"""Verifiers that run elsewhere, asked over HTTP."""

import importlib
from typing import Any, ClassVar

import msgspec

from bittrue.rl.verifiers.verifier import (
    Answers,
    Checker,
    Outcome,
    Place,
    Room,
    Verdict,
    crashed,
    graded,
    no_verdict,
    timed_out,
    unparsable,
)

MAX_REPLY = 1 << 20  # bytes


class Reply(msgspec.Struct, frozen=True):
    """What the other side answers: a score, of which 1 is right, or an outcome other than right and wrong."""

    score: float | None = None
    outcome: Outcome | None = None
    sub_scores: dict[str, float] = {}
    detail: str = ""


class Http(Checker, frozen=True, tag="http"):
    """POSTs ``{"problem": problem, "answers": [{"content", "reasoning", "tool_calls"}, ...]}`` to ``url`` and
    reads a Reply. What is not one, or has another status than 200, is a crash without a score: a verifier
    that is down says nothing of the answer. No proxy or other setting of the environment is used."""

    room: ClassVar[Room] = "network"
    url: str
    problem: Any = None
    headers: dict[str, str] = {}
    is_strict: bool = True

    def prepare(self) -> None:
        _httpx()

    def judge(self, answers: Answers, place: Place) -> Verdict:
        body = msgspec.json.encode({"problem": self.problem, "answers": answers})
        headers = {"content-type": "application/json", **self.headers}
        httpx = _httpx()
        try:
            status, reply = self._post(body, headers, place.limits.seconds)
        except httpx.TimeoutException:
            return timed_out("the verifier did not answer in time")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return no_verdict("crash", f"{type(error).__name__}: {error}")
        if status != 200 or len(reply) > MAX_REPLY:
            return no_verdict("crash", f"status {status}, {len(reply)} bytes")
        try:
            found = msgspec.json.decode(reply, type=Reply)
        except msgspec.DecodeError as error:
            return no_verdict("crash", f"no reply of a verifier: {error}")
        match found.outcome:
            case "timeout":
                return timed_out(found.detail)
            case "crash":
                return crashed(found.detail)
            case "unparsable":
                return unparsable(found.detail)
        if found.score is None:
            return no_verdict("crash", "neither a score nor an outcome")
        return graded(found.score, is_strict=self.is_strict, sub_scores=found.sub_scores)

    def _post(self, body: bytes, headers: dict[str, str], seconds: float) -> tuple[int, bytes]:
        reply = b""
        with (
            _httpx().Client(trust_env=False, timeout=seconds) as client,
            client.stream("POST", self.url, content=body, headers=headers) as response,
        ):
            for chunk in response.iter_bytes():
                reply += chunk
                if len(reply) > MAX_REPLY:
                    break
            return response.status_code, reply


def _httpx() -> Any:
    """Loaded where it is used: workers without network need not wait for it."""
    return importlib.import_module("httpx")
