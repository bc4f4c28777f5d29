"""Undoing RoPE: the query as it was before rotation, from the query that attention is given.

Letters: `N` tokens, `H` heads, `D` head size, `E` rotary dimension (`E <= D`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Attributes by which vLLM's models state whether a full-attention layer rotates its queries.
# A layer whose module has one of them as false rotates nothing.
ROTATES = ("use_rope", "_use_rope", "use_rotary", "force_rope", "apply_rope_all_layers", "is_local_attention", "v1")

# A module where it is not empty takes several positions for each token (M-RoPE). They are equal only in text.
SECTIONS = "mrope_section"


class RotaryError(ValueError):
    """The rotation of a layer cannot be undone. The message explains why; `reason` is one word for it."""

    def __init__(self, message: str, reason: str = "rotary"):
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Rotary:
    """One layer's rotation, or none at all (`module` is None: NoPE).

    module: has `cos_sin_cache` `[positions, E]` (cosines, then sines, both times the scaling
        method's attention factor), `rotary_dim` and `is_neox_style`.
    """

    module: nn.Module | None

    @property
    def cos_sin(self) -> Tensor | None:
        """`[positions, E]`, `[cos | sin]`; None for a layer without RoPE."""
        return None if self.module is None else self.module.cos_sin_cache

    @property
    def is_neox(self) -> bool:
        """Whether RoPE pairs `j` with `j + E/2`, else `2j` with `2j + 1`."""
        return self.module is None or self.module.is_neox_style

    def undo(self, query: Tensor, position: Tensor) -> Tensor:
        """The query before RoPE: `[N, H, D]` float32, from query `[N, H, D]` and position `[N]`.

        A rotation's inverse is its transpose; dividing by `cos^2 + sin^2` also removes the
        attention factor (YaRN) and the rounding of the cache.
        """
        query = query.float()
        if self.module is None:
            return query
        cos, sin = self.module.cos_sin_cache[position].float().chunk(2, dim=-1)
        norm = (cos**2 + sin**2)[:, None]
        cos, sin = cos[:, None] / norm, sin[:, None] / norm
        size = self.module.rotary_dim
        rotated, kept = query[..., :size], query[..., size:]
        if self.module.is_neox_style:
            a, b = rotated.chunk(2, dim=-1)
            parts = torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
        else:
            a, b = rotated[..., 0::2], rotated[..., 1::2]
            parts = torch.stack((a * cos + b * sin, b * cos - a * sin), -1).flatten(-2)
        return torch.cat((parts, kept), -1)


def find_rotary(attention: nn.Module, has_rope: bool, head_size: int, length: int, media: bool) -> Rotary:
    """The rotation that the module which holds an attention layer applies to its queries.

    attention: the model's own attention module (`LlamaAttention`, ...), which holds both the
    attention layer and `rotary_emb`. has_rope: whether the model's configuration mentions
    RoPE at all. length: tokens that a sequence may have. media: whether requests may hold images,
    videos and the like. Raises RotaryError where the rotation is unknown or cannot be undone, which
    is tried on random queries.
    """
    if any(not getattr(attention, flag, True) for flag in ROTATES):
        return Rotary(None)
    if not hasattr(attention, "rotary_emb"):
        if has_rope:
            raise RotaryError(f"{type(attention).__name__} has no rotary_emb to undo")
        return Rotary(None)
    if attention.rotary_emb is None:
        return Rotary(None)
    rotary = Rotary(attention.rotary_emb)
    name = type(rotary.module).__name__
    if media and getattr(rotary.module, SECTIONS, None):
        # Attention only gets the index of a token. From an image on, the token is rotated by another number.
        raise RotaryError(
            f"{name} rotates by positions that attention is not told once a request holds an image, a video or sound. "
            "Where requests hold text alone, --language-model-only lets MAC serve them",
            "mrope",
        )
    check(rotary, head_size)
    known = len(rotary.module.cos_sin_cache)
    if known < length:
        raise RotaryError(
            f"{name}.cos_sin_cache holds {known} positions, and --max-model-len is {length}; up to {known} MAC serves it"
        )
    return rotary


def check(rotary: Rotary, head_size: int) -> None:
    """Raise RotaryError unless `undo` inverts the module on random queries."""
    module, name = rotary.module, type(rotary.module).__name__
    missing = [a for a in ("cos_sin_cache", "rotary_dim", "is_neox_style", "forward_native") if not hasattr(module, a)]
    if missing:
        raise RotaryError(f"{name} has no {', '.join(missing)}")
    cache = module.cos_sin_cache
    if cache.shape[-1] != module.rotary_dim:
        raise RotaryError(f"{name}.cos_sin_cache is {list(cache.shape)}, not [positions, {module.rotary_dim}]")
    generator = torch.Generator().manual_seed(0)
    position = torch.tensor([0, 1, len(cache) // 2, len(cache) - 1], device=cache.device)
    query = torch.randn(4, 2, head_size, generator=generator).to(cache)
    try:
        rotated, _ = module.forward_native(position, query.flatten(1).clone(), query.flatten(1).clone())
    except Exception as error:  # whatever a model's own module may raise
        raise RotaryError(f"{name} failed on plain positions: {type(error).__name__}: {error}") from error
    # The module rounds the rotated query and each product to the cache's dtype: 4 roundings.
    bound = 4 * torch.finfo(cache.dtype).eps * query.float().norm(dim=-1).max()
    error = (rotary.undo(rotated.view_as(query), position) - query.float()).abs().max()
    if not error <= bound:
        raise RotaryError(f"{name} is not undone by its cos_sin_cache (error {error:.2g}, rounding allows {bound:.2g})")
