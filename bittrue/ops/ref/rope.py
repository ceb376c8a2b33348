"""Reference of rope_angles and rope, the rotary embedding of adjacent pairs."""

import torch
from torch import Tensor


def rope_angles(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    angles = (positions.float()[:, None] * inv_freq.float()).double()
    return torch.cos(angles).float(), torch.sin(angles).float()


def rope(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    kept = x.shape[-1] - 2 * cos.shape[-1]
    pairs = torch.unflatten(x[..., kept:].float(), -1, (-1, 2))
    a, b = pairs[..., 0], pairs[..., 1]
    c, s = cos[:, None, :], sin[:, None, :]
    if inverse:
        s = -s
    rotated = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    return torch.cat((x[..., :kept], rotated.to(x.dtype)), dim=-1)
