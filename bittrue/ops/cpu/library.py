"""Loads the compiled CPU kernels for one instruction set, with the argument checks every binding shares."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch
from torch import Tensor

from bittrue.errors import BackendUnavailable, ConfigError

Isa = Literal["portable", "avx2", "avx512"]
ISAS: Final[tuple[Isa, ...]] = ("portable", "avx2", "avx512")  # every one includes those before it
LIBRARY_PATH: Final = Path(__file__).parent / "libbittrue_cpu.so"
BUILD_REMEDY: Final = "build it with `make setup` (needs g++ and make)"

# Argument types of kernels, for Kernels.bind.
PTR: Final = ctypes.c_void_p
I64: Final = ctypes.c_int64
F32: Final = ctypes.c_float

F32_CODE: Final = 0
BF16_CODE: Final = 1
ACT_DTYPES: Final = (torch.float32, torch.bfloat16)

Kernel = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one instruction set. ``bind`` gives one of them as a function."""

    isa: Isa
    library: ctypes.CDLL

    def bind(self, name: str, *argtypes: type) -> Kernel:
        """The kernel ``name`` taking ``argtypes`` (PTR, I64, F32). BackendUnavailable: not in the library."""
        symbol = f"bittrue_{name}_{self.isa}"
        try:
            function = self.library[symbol]
        except AttributeError:
            raise BackendUnavailable(
                f"{LIBRARY_PATH.name} has no kernel {symbol}: it is older than this program; {BUILD_REMEDY}"
            ) from None
        function.argtypes = argtypes
        function.restype = None
        return function

    def set_threads(self, threads: int) -> None:
        """Use ``threads`` threads in every kernel of this process from now on. Results never depend on it."""
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}", field="threads")
        self.library.bittrue_set_threads(I64(threads))

    @property
    def threads(self) -> int:
        return int(self.library.bittrue_threads())


def _open_library() -> ctypes.CDLL:
    if not LIBRARY_PATH.exists():
        raise BackendUnavailable(f"the CPU kernels are not built: no file {LIBRARY_PATH}; {BUILD_REMEDY}")
    try:
        library = ctypes.CDLL(str(LIBRARY_PATH))
    except OSError as error:
        raise BackendUnavailable(
            f"the CPU kernels cannot be loaded: {error}; {BUILD_REMEDY} on this machine"
        ) from None
    library.bittrue_best_isa.restype = I64
    library.bittrue_threads.restype = I64
    library.bittrue_set_threads.restype = None
    library.bittrue_run_program.restype = None
    library.bittrue_time_program.restype = None
    return library


def available_isas() -> tuple[Isa, ...]:
    """The instruction sets this processor runs, slowest first. BackendUnavailable without a library."""
    return ISAS[: int(_open_library().bittrue_best_isa()) + 1]


def load_kernels(isa: str | None = None) -> Kernels:
    """The kernels of ``isa``, or of the best this processor runs.

    Raises ConfigError for an unknown name, BackendUnavailable when library or instruction set is missing.
    """
    if isa is not None and isa not in ISAS:
        raise ConfigError(f"unknown instruction set {isa!r}: choose one of {', '.join(ISAS)}", field="isa")
    library = _open_library()
    available = ISAS[: int(library.bittrue_best_isa()) + 1]
    for name in available:
        if name == isa:
            return Kernels(name, library)
    if isa is not None:
        raise BackendUnavailable(
            f"this processor does not run {isa}: it runs {', '.join(available)}; choose one of these"
        )
    return Kernels(available[-1], library)


def pointer(tensor: Tensor | None) -> int:
    """Address of the first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def dtype_code(dtype: torch.dtype) -> int:
    """0 for float32, 1 for bfloat16; ValueError for any other."""
    if dtype == torch.float32:
        return F32_CODE
    if dtype == torch.bfloat16:
        return BF16_CODE
    raise ValueError(f"kernels take float32 or bfloat16, not {dtype}")


def check(
    op: str, name: str, tensor: Tensor, shape: tuple[int | None, ...] | None, *dtypes: torch.dtype
) -> None:
    """ValueError naming ``op`` and ``name`` unless the tensor is on the CPU, contiguous, of ``shape`` (None
    matches any size, shape None any shape) and of one of ``dtypes`` (none given: any)."""
    # A decode step makes hundreds of these calls: the words are found only when something is wrong.
    if (
        (not dtypes or tensor.dtype in dtypes)
        and (shape is None or _has_shape(tensor.shape, shape))
        and tensor.is_cpu
        and tensor.is_contiguous()
    ):
        return
    raise ValueError(f"{op}: {name} {_fault(tensor, shape, dtypes)}")


def _has_shape(got: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if got == wanted:
        return True
    if None not in wanted or len(got) != len(wanted):
        return False
    for g, w in zip(got, wanted, strict=True):  # noqa: SIM110 - all() over a generator takes twice as long
        if w is not None and w != g:
            return False
    return True


def _fault(tensor: Tensor, shape: tuple[int | None, ...] | None, dtypes: tuple[torch.dtype, ...]) -> str:
    """What is wrong with a tensor that ``check`` refuses."""
    if dtypes and tensor.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        return f"must be {wanted}, not {str(tensor.dtype).removeprefix('torch.')}"
    if shape is not None and not _has_shape(tensor.shape, shape):
        wanted = ", ".join("*" if w is None else str(w) for w in shape)
        return f"must have shape [{wanted}], not {list(tensor.shape)}"
    if not tensor.is_cpu:
        return f"must be on the CPU, not on {tensor.device}"
    return f"must be contiguous; its strides are {tensor.stride()}"
