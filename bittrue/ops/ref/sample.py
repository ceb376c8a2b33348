"""Reference of sampling: argmax, log_softmax, and Gumbel noise as a function of (seed, position, id)."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bittrue.ops.ref.norm import row_sum

Words = NDArray[np.uint64]  # 32-bit words held in 64 bits, so that a product of two does not overflow
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


def log_softmax(logits: Tensor) -> Tensor:
    largest = logits.amax(-1, keepdim=True)
    # Elementary functions go through float64: torch's own f32 ones give other bits at the end of a buffer.
    total = row_sum(torch.exp((logits - largest).double()).float())
    return logits - (largest + torch.log(total.double()).float()[:, None])


def argmax(logits: Tensor) -> Tensor:
    return torch.from_numpy(np.argmax(logits.numpy(), axis=-1))


def philox_4x32_10(
    counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]
) -> tuple[Words, Words, Words, Words]:
    """Philox-4x32 with 10 rounds (Salmon et al., SC 2011): four random words per (counter, key)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & _LOW, (k1 + np.uint64(0xBB67AE85)) & _LOW
    return c0, c1, c2, c3


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    seed = seeds.numpy().astype(np.uint64)[:, None]
    position = positions.numpy().astype(np.uint64)[:, None]
    block = np.arange(-(-vocab_size // 4), dtype=np.uint64)[None, :]
    counter = (block, position & _LOW, position >> _SHIFT, np.zeros_like(block))
    words = np.stack(philox_4x32_10(counter, (seed & _LOW, seed >> _SHIFT)), axis=-1)  # [R, V / 4, 4]
    words = words.reshape(seed.shape[0], 4 * block.shape[1])[:, :vocab_size]
    top = (words >> np.uint64(8)).astype(np.float64)
    return torch.from_numpy(-np.log(-np.log((top + 0.5) / 2.0**24))).float()
