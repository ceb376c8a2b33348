"""Resident memory of a process of this machine, as the kernel counts it."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes in memory: pages of mapped files (weights, libraries), and the process's own."""

    file_bytes: int
    own_bytes: int

    @property
    def bytes(self) -> int:
        return self.file_bytes + self.own_bytes


def resident(pid: int) -> Resident | None:
    """None where the process has gone, or the system does not tell (no /proc)."""
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return None
    kib = {
        name: int(rest.split()[0])
        for name, _, rest in (line.partition(":") for line in text.splitlines())
        if name in ("RssAnon", "RssFile", "RssShmem")
    }
    if "RssAnon" not in kib:
        return None  # a zombie has no memory
    return Resident(kib["RssFile"] << 10, (kib["RssAnon"] + kib["RssShmem"]) << 10)
