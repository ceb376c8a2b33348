import subprocess
import sys

# Pages that the system had to give anew, while 16 MiB were taken and given back 50 times.
_FAULTS = """
import ctypes, resource, sys
from bittrue.train.heap import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes, libc.memset.argtypes = [ctypes.c_void_p], [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def use():
    block = libc.malloc(16 << 20)
    libc.memset(block, 1, 16 << 20)
    return block
libc.free(use())
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    first, second = use(), use()
    libc.free(second)
    libc.free(first)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    found = subprocess.run([sys.executable, "-c", _FAULTS, mode], capture_output=True, text=True, check=True)
    return int(found.stdout)


def test_memory_that_was_freed_is_taken_again_without_the_system() -> None:
    assert faults("kept") < 20_000 < faults("plain")
