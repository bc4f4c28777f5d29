"""Rotations of layers, made of a cache of cosines and sines alone."""

from types import SimpleNamespace

import torch
from torch import Tensor

from vllm_mac.rope import Rotary


def rotation(cos_sin: Tensor | None, neox: bool = True) -> Rotary:
    """cos_sin: `[positions, E]`, cosines, then sines; None, or no `E`: a layer without RoPE."""
    if cos_sin is None or not cos_sin.shape[1]:
        return Rotary(None)
    return Rotary(SimpleNamespace(cos_sin_cache=cos_sin, rotary_dim=cos_sin.shape[1], is_neox_style=neox))


def cosines_and_sines(positions: int, size: int) -> Tensor:
    """`[positions, size]` float32, the frequencies of a head falling from 1 to about `0.3^4`."""
    angle = torch.arange(positions)[:, None] * 0.3 ** (torch.arange(size // 2) * 8 / size)
    return torch.cat((angle.cos(), angle.sin()), -1)
