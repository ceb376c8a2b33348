"""The team of threads: the same bits for any number of them, from many callers, after a fork or a sleep."""

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from bittrue.ops.contracts import OpTable, Weight
from bittrue.ops.dispatch import select
from bittrue.ops.threads import set_threads, threads_of

OPS = select("cpu")
ROWS = 64


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    before = threads_of(OPS)
    yield
    set_threads(OPS, before)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X = normal(0, ROWS, 4096)
MATRIX = Weight(normal(1, 300, 4096), None, "f32")
SEEDS = torch.arange(ROWS)
HYPER = (
    normal(2, ROWS, 4, 256),
    normal(3, 24, 1024) / 32,
    normal(4, 24),
    torch.ones(3),
    torch.ones(256),
)

# Every one has enough work for several threads; in some a thread takes rows, in others parts of one row.
KERNELS: dict[str, Callable[[OpTable], tuple[Tensor, ...]]] = {
    "rms_norm": lambda ops: (ops.rms_norm(X, None, 1e-6),),
    "linear": lambda ops: (ops.linear(X, MATRIX),),
    "linear, one row": lambda ops: (ops.linear(X[:1].contiguous(), MATRIX),),
    "hc_pre": lambda ops: ops.hc_pre(*HYPER, iters=20, eps=1e-6, norm_eps=1e-6),
    "log_softmax": lambda ops: (ops.log_softmax(X),),
    "log_softmax, one row": lambda ops: (ops.log_softmax(X.view(1, -1)),),
    "argmax, one row": lambda ops: (ops.argmax(X.view(1, -1)),),
    "gumbel": lambda ops: (ops.gumbel(SEEDS, SEEDS, 4096),),
    "gumbel, one row": lambda ops: (ops.gumbel(SEEDS[:1], SEEDS[:1], 100_000),),
}


def all_results() -> dict[str, tuple[Tensor, ...]]:
    return {name: run(OPS) for name, run in KERNELS.items()}


def differing(got: dict[str, tuple[Tensor, ...]], want: dict[str, tuple[Tensor, ...]]) -> list[str]:
    return [
        name
        for name, tensors in want.items()
        if not all(torch.equal(a, b) for a, b in zip(got[name], tensors, strict=True))
    ]


@pytest.fixture(scope="module")
def alone() -> dict[str, tuple[Tensor, ...]]:
    set_threads(OPS, 1)
    return all_results()


@pytest.mark.parametrize("threads", [2, 5, 1, 3])
def test_the_number_of_threads_changes_no_bit(threads: int, alone: dict[str, tuple[Tensor, ...]]) -> None:
    set_threads(OPS, threads)
    for _ in range(5):
        assert differing(all_results(), alone) == []


def test_a_loop_that_finds_the_workers_asleep_is_whole(alone: dict[str, tuple[Tensor, ...]]) -> None:
    set_threads(OPS, 3)
    for _ in range(20):
        time.sleep(0.005)
        for name, run in KERNELS.items():
            assert differing({name: run(OPS)}, {name: alone[name]}) == []


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_python_threads_that_call_kernels_at_once_do_not_meet(
    threads: int, alone: dict[str, tuple[Tensor, ...]]
) -> None:
    set_threads(OPS, threads)
    wrong: list[object] = []
    together = threading.Barrier(3)

    def work() -> None:
        try:
            together.wait(timeout=60)
            for _ in range(8):
                wrong.extend(differing(all_results(), alone))
        except Exception as error:  # noqa: BLE001 - an assertion in a thread would be lost
            wrong.append(error)

    callers = [threading.Thread(target=work, daemon=True) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
    assert not any(caller.is_alive() for caller in callers)
    assert wrong == []


FORK = """
import os, sys, torch
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.dispatch import select

torch.set_num_threads(1)  # torch's own threads do not survive a fork
set_threads = load_kernels().set_threads
ops = select("cpu")
x = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
set_threads(1)
want = ops.rms_norm(x, None, 1e-6)
set_threads(3)

def is_right():
    return all(torch.equal(ops.rms_norm(x, None, 1e-6), want) for _ in range(50))

assert is_right()
child = os.fork()
if child == 0:
    grandchild = 0 if is_right() else 3
    if grandchild == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if is_right() else 4)
        grandchild = os.waitstatus_to_exitcode(os.waitpid(grandchild, 0)[1])
    os._exit(grandchild)
assert is_right()
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_hires_a_team_of_its_own() -> None:
    """The child has the parent's memory without its threads: a loop that waited for them would never end."""
    done = subprocess.run(
        [sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


FEW_THREADS = """
import resource, torch
from pathlib import Path
from bittrue.ops.cpu.library import load_kernels
from bittrue.ops.dispatch import select

torch.set_num_threads(1)  # torch's own threads would end the process
kernels, ops = load_kernels(), select("cpu")
x = torch.randn(64, 8192, generator=torch.Generator().manual_seed(0))
kernels.set_threads(1)
want = ops.rms_norm(x, None, 1e-6)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# Room for the stacks of some threads, not of a thousand.
resource.setrlimit(resource.RLIMIT_AS, (used + (200 << 20),) * 2)
kernels.set_threads(1024)
for _ in range(3):
    assert torch.equal(ops.rms_norm(x, None, 1e-6), want)
"""


def test_a_system_that_gives_fewer_threads_gets_the_same_results_from_those() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
