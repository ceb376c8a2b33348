"""PrefillLog: how far long prefills are, as log lines: the first after two seconds, then one every five."""

from dataclasses import dataclass

from bittrue.obs.log import Log

_FIRST_S = 2.0
_EVERY_S = 5.0


@dataclass(slots=True)
class _Prefill:
    """One sequence from where it was first seen; the last line, or that moment, is (said_s, said_done)."""

    begun_s: float
    begun_done: int
    said_s: float
    said_done: int
    done: int
    total: int
    is_long: bool = False  # a line has been written


class PrefillLog:
    """Told after every step; writes little. Times are seconds of one clock."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._prefills: dict[str, _Prefill] = {}

    def note(self, request_id: str, done: int, total: int, now_s: float) -> None:
        """``done`` of ``total`` tokens are computed. Fewer than before: the sequence was preempted, and its
        time starts again."""
        seen = self._prefills.get(request_id)
        if seen is None or done < seen.done:
            self._prefills[request_id] = _Prefill(now_s, done, now_s, done, done, total)
            return
        seen.done, seen.total = done, total
        if now_s - seen.said_s < (_EVERY_S if seen.is_long else _FIRST_S):
            return
        # Of the time since the last line: prefill slows down as the context grows.
        tokens_per_s = (done - seen.said_done) / (now_s - seen.said_s)
        self._log.info(
            "prefill",
            id=request_id,
            tokens=f"{done}/{total}",
            tokens_per_s=tokens_per_s,
            left_s=(total - done) / tokens_per_s if tokens_per_s else "unknown",
        )
        seen.said_s, seen.said_done, seen.is_long = now_s, done, True

    def end(self, request_id: str, now_s: float) -> None:
        """The sequence has its first token: one more line if there was one before."""
        seen = self._prefills.pop(request_id, None)
        if seen is not None and seen.is_long:
            seconds = now_s - seen.begun_s
            rate = (seen.total - seen.begun_done) / seconds
            self._log.info("prefilled", id=request_id, tokens=seen.total, seconds=seconds, tokens_per_s=rate)

    def forget(self, request_id: str) -> None:
        """The sequence has ended some other way."""
        self._prefills.pop(request_id, None)

    def forget_all(self) -> None:
        """The engine has gone: what it had computed is lost."""
        self._prefills.clear()
