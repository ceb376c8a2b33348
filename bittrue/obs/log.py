"""Log: one line per event, as fields, for people."""

import time
from dataclasses import dataclass
from typing import Literal, TextIO

LogLevel = Literal["debug", "info", "warning", "error"]
_RANK: dict[str, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def _field(value: object) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if text and text.isprintable() and not any(c in text for c in ' "=\\'):
        return text
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in escaped) + '"'


@dataclass(frozen=True, slots=True)
class Log:
    """Writes ``time LEVEL event key=value ...`` to one stream; events below ``level`` are dropped."""

    stream: TextIO
    level: LogLevel = "info"

    def debug(self, event: str, **fields: object) -> None:
        self._write("debug", event, fields)

    def info(self, event: str, **fields: object) -> None:
        self._write("info", event, fields)

    def warning(self, event: str, **fields: object) -> None:
        self._write("warning", event, fields)

    def error(self, event: str, **fields: object) -> None:
        self._write("error", event, fields)

    def _write(self, level: LogLevel, event: str, fields: dict[str, object]) -> None:
        if _RANK[level] < _RANK[self.level]:
            return
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
        shown = "".join(f" {key}={_field(value)}" for key, value in fields.items())
        self.stream.write(f"{stamp} {level.upper():<7} {event}{shown}\n")
        self.stream.flush()
