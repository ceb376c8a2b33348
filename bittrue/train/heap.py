"""The C library's heap, told to keep what it has: a step frees as much as the next one asks for."""

import ctypes

# Parameters of mallopt, <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Large blocks come from the heap and go back to it, not to the system, which would have to clear their
    pages again for every step: a twentieth of a step's processor time. Whether the C library took it; others
    than glibc do not know it, and nothing changes."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {_TRIM_THRESHOLD: (1 << 31) - 1, _TOP_PAD: 64 << 20, _MMAP_THRESHOLD: 32 << 20}
    return all(bool(mallopt(name, value)) for name, value in settings.items())
