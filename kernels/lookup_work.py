"""What the kernels of `lookup` leave for each other, and how their work is split."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vllm_mac.kernels.launch import REGISTER_LIMITS, power_of_two
from vllm_mac.lookup import SPAN
from vllm_mac.state import Geometry

DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def narrow_width(directions: int) -> int:
    """`BN`: how many directions of one half of the index a kernel holds; its products of integers take 32 or more."""
    return max(32, power_of_two(directions // 2))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is split.

    per_sm, weighers_per_sm: programs of `look_kernel` and of `weigh_kernel` for each SM. most: programs of one (row, KV
    head) pair at most. block: tokens that are read at once. slots: tokens that are listed before they are read. words: of
    32 tokens, that are listed at once. The others are launch options.
    """

    per_sm: int = 4
    weighers_per_sm: int = 2
    most: int = 128
    block: int = 32
    slots: int = 4096
    words: int = 8
    warps: int = 4
    weigh_stages: int = 4
    list_stages: int = 2
    read_stages: int = 3
    registers: int | None = 128


@dataclass(slots=True)
class LookupWork:
    """What one step leaves for its later kernels, for all layers of one geometry.

    slots: int32 `[programs, slots]`, the list of each program. words: int32, `[pairs, spans, SPAN / 32]`. read: int32, of each program.
    narrow: `[pairs, 2, BN, 2 BQ]` int8. scale: `[pairs, 2, BQ]`. lse2: float32 base 2, of each program's tokens. part, part_acc:
    float32, of each program. programs, weighers: how many share a step in `look_kernel` and in `weigh_kernel`.
    at_once: `T` of steps in which rows decode several tokens. found: how `look_kernel` is launched, see `launch`.
    """

    slots: Tensor
    words: Tensor
    read: Tensor
    narrow: Tensor
    scale: Tensor
    lse2: Tensor
    part: Tensor
    part_acc: Tensor
    programs: int
    weighers: int
    at_once: int
    pdl: bool
    tuning: Tuning
    found: dict

    @classmethod
    def allocate(cls, geometry: Geometry, directions: int, device, tuning: Tuning | None = None) -> "LookupWork":
        """For batches of at most `max_rows` rows, padding included, and an index of so many directions."""
        on, g, tuning = torch.device(device), geometry, tuning or Tuning()
        gpu = torch.cuda.get_device_properties(on) if on.type == "cuda" else None
        sms = gpu.multi_processor_count if gpu else 1
        programs, weighers = tuning.per_sm * sms, tuning.weighers_per_sm * sms
        pairs, columns = g.max_rows * g.kv_heads, g.group * g.at_once
        width = cls.width(columns)
        parts = max(pairs, programs, weighers)
        tokens = -(-g.max_blocks * g.page_size // SPAN) * SPAN

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=on)

        return cls(
            slots=empty(parts, tuning.slots, dtype=torch.int32),
            words=empty(pairs, tokens // 32, dtype=torch.int32), read=empty(parts, dtype=torch.int32),
            narrow=empty(pairs, 2, narrow_width(directions), 2 * width, dtype=torch.int8), scale=empty(pairs, 2, width),
            lse2=empty(parts, columns), part=empty(parts, columns, 2),
            part_acc=empty(parts, columns, g.head_size),
            programs=programs, weighers=weighers, at_once=g.at_once, pdl=gpu is not None and gpu.major >= 9, tuning=tuning,
            found={},
        )  # fmt: skip

    @staticmethod
    def width(columns: int) -> int:
        """`BQ` of kernels with so many columns."""
        return max(power_of_two(columns), 8)

    @staticmethod
    def wider(width: int, size: int) -> int:
        """How many times more warps programs with such blocks have; size: of a head."""
        return 1 if width * power_of_two(size) <= 1024 else 2

    def options(self, width: int, size: int) -> list[dict]:
        """How to launch `look_kernel`, for `launch.launch`. Before sm90 more warps are faster, and wide blocks without a limit."""
        t = self.tuning
        limited = size <= 128 and (width < 32 if self.pdl else width == 8)
        fast = {
            "num_warps": t.warps * self.wider(width, size) if self.pdl else 8,
            "maxnreg": t.registers if limited else None,
        }
        return [fast, fast | {"maxnreg": REGISTER_LIMITS[1]}, fast | {"num_warps": 8, "maxnreg": None}]

    def splits(self, pairs: int) -> int:
        """Programs of `look_kernel` for each of so many (row, KV head) pairs."""
        return max(1, min(self.tuning.most, self.programs // pairs))

    def weigh_splits(self, pairs: int) -> int:
        """The same of `weigh_kernel`."""
        return max(1, min(self.tuning.most, self.weighers // pairs))
