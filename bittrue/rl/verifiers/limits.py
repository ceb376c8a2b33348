"""What one answer may cost before its check is cut off."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds on the check of one answer; every process of a check is under all of them.

    ``seconds``: wall clock. ``memory_bytes``: address space of one process. ``directory_bytes``: of all files
    written, and of one. ``processes``: at the same time, threads too, as far as the isolation counts them.
    ``answer_characters``: a longer answer is unparsable. ``start_seconds``: for a worker to start and to load
    a verifier's library, which no answer can prolong. ``grace_seconds``: for a worker to end a check that is
    late, and what is left of it; then the worker is killed.
    """

    seconds: float = 10.0
    cpu_seconds: int = 10
    memory_bytes: int = 1 << 30
    directory_bytes: int = 64 << 20
    processes: int = 16
    answer_characters: int = 200_000
    start_seconds: float = 60.0
    grace_seconds: float = 5.0
