"""What the machine itself can do: copy and read bandwidth, the peak of its matrix product, its last cache."""

from dataclasses import dataclass
from pathlib import Path

import torch

from bittrue.bench.result import Measurement, measured
from bittrue.bench.timing import Call, time_in_turn

COPY_BYTES = 1 << 28  # far beyond every cache
PEAK_SIZE = 2048  # a square this large is bound by arithmetic
_DEFAULT_CACHE_BYTES = 32 << 20  # where the system does not tell


@dataclass(frozen=True, slots=True)
class Roof:
    """The bounds that every op is held against. A copy counts what it reads and what it writes."""

    copy: Measurement
    read: Measurement
    product: Measurement

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (self.copy, self.read, self.product)


def measure_roof(*, seconds: float) -> Roof:
    """Measures the three bounds in turn, with torch and as many threads as torch now uses."""
    a, b = torch.randn(2, PEAK_SIZE, PEAK_SIZE).unbind()
    out = torch.empty(PEAK_SIZE, PEAK_SIZE)
    calls: dict[str, Call] = {
        "copy": copy_call(COPY_BYTES),
        "read": read_call(COPY_BYTES),
        "product": lambda: torch.mm(a, b, out=out),
    }
    timings = time_in_turn(calls, seconds=seconds)
    square = f"f32, {PEAK_SIZE} cubed"
    size = f"{COPY_BYTES >> 20} MiB"
    return Roof(
        copy=measured("copy", "s", timings["copy"], {"case": size}, num_bytes=2 * COPY_BYTES),
        read=measured("read", "s", timings["read"], {"case": size}, num_bytes=COPY_BYTES),
        product=measured("torch product", "s", timings["product"], {"case": square}, flops=2 * PEAK_SIZE**3),
    )


def copy_call(num_bytes: int) -> Call:
    """Copies ``num_bytes`` bytes at every call."""
    # Written once: pages that were never written are all one page of zeros, which stays in the first cache.
    source = torch.ones(num_bytes, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def read_call(num_bytes: int) -> Call:
    """Reads ``num_bytes`` bytes at every call: a sum of float32."""
    source = torch.ones(num_bytes // 4)
    return source.sum


def last_cache_bytes() -> int:
    """Bytes of the largest cache of the first core, as Linux tells; elsewhere 32 MiB."""
    sizes = [
        int(text[:-1]) << {"K": 10, "M": 20}[text[-1]]
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
        if (text := path.read_text(encoding="ascii").strip())[-1:] in ("K", "M")
    ]
    return max(sizes, default=_DEFAULT_CACHE_BYTES)
