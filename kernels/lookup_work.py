"""What the kernels of `lookup` leave for each other, and how their work is split."""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor

from vllm_mac.kernels.launch import power_of_two
from vllm_mac.lookup import SPAN, TILE
from vllm_mac.state import Geometry

REGISTERS, QUARTERS = 65536, 4  # of an SM; a warp has those of one quarter of it
MOST_NEAR = 1024  # tokens that a list has room for beside those of a turn's spans
DOT_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def narrow_width(directions: int) -> int:
    """`BN`: how many directions of one half of the index a kernel holds; its products of integers take 32 or more."""
    return max(32, power_of_two(directions // 2))


def _fitting(warps: int, registers: int) -> int:
    """Programs of so many warps that an SM's registers are enough for, each thread with so many."""
    of_a_quarter = REGISTERS // QUARTERS // (-(-registers // 8) * 8 * 32)
    return max(of_a_quarter * QUARTERS // warps, 1)


def _most_registers(warps: int) -> int:
    """Of a thread, with which one program of so many warps fits."""
    return min(REGISTERS // (32 * warps) // 8 * 8, 255)


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the work is split.

    weighers_per_sm: programs of one warp of `weigh_kernel` for each SM. most, most_weighers: programs of one (row, KV head)
    pair at most, powers of two. block: tokens that eight queries read at once; pages hold a multiple of them. turn: spans that are
    marked before what they list is read. The others are stages of loops.
    """

    weighers_per_sm: int = 8
    most: int = 256
    most_weighers: int = 32
    block: int = 16
    turn: int = 16
    weigh_stages: int = 3
    mark_stages: int = 3
    read_stages: int = 2


@dataclass(slots=True)
class LookupWork:
    """What one step leaves for its later kernels, for all layers of one geometry.

    slots: int32 `[programs, tokens]`, what each program of `look_kernel` lists in a turn. words: int32 `[programs, turn,
    SPAN / 32]`. rest: float32 `[programs, turn, SPAN / page, BQ]`. read: int32, of each program. narrow: `[pairs, 2, 2 BQ,
    BN]` int8. scale: `[pairs, 2, BQ]`. lse2: float32 base 2, of each program's tokens. part, part_acc: float32, of each
    program. programs: how many share a step in `look_kernel`, by `BQ`, at most. weighers: the same in `weigh_kernel`. together,
    parts: `T` and `PARTS` of steps in which rows decode several tokens. found: how `look_kernel` is launched, by `BQ`, see `launch`.
    """

    slots: Tensor
    words: Tensor
    rest: Tensor
    read: Tensor
    narrow: Tensor
    scale: Tensor
    lse2: Tensor
    part: Tensor
    part_acc: Tensor
    sms: int
    programs: dict[int, int]
    weighers: int
    together: int
    parts: int
    pdl: bool
    tuning: Tuning
    found: dict[int, dict]

    @classmethod
    def allocate(cls, geometry: Geometry, directions: int, device, tuning: Tuning | None = None) -> "LookupWork":
        """For batches of at most `max_rows` rows, padding included, and an index of so many directions."""
        on, g, tuning = torch.device(device), geometry, tuning or Tuning()
        gpu = torch.cuda.get_device_properties(on) if on.type == "cuda" else None
        sms = gpu.multi_processor_count if gpu else 1
        pairs, queries = g.max_rows * g.parts * g.kv_heads, g.group * g.together
        width = cls.width(queries)
        widths = {cls.width(g.group), width}
        programs = {one: cls.resident(one, g.head_size, g.kv_dtype.itemsize, directions) * sms for one in widths}
        weighers = -(-tuning.weighers_per_sm // cls.weigher_warps(width, g.head_size, directions)) * sms
        parts = max(pairs, weighers, *programs.values())
        # A program lists near tokens too, where they have room: those of the first tiles, and of the band, widened to tiles.
        near = min(-(-max(g.sink, 1) // TILE) * TILE + g.band + TILE, MOST_NEAR)
        room = tuning.turn * SPAN + near + 2 * TILE  # and what is read beyond a list's end, of a block at most

        def empty(*shape, dtype=torch.float32):
            return torch.empty(shape, dtype=dtype, device=on)

        return cls(
            slots=empty(parts, room, dtype=torch.int32),
            words=empty(parts, tuning.turn, SPAN // 32, dtype=torch.int32),
            rest=empty(parts, tuning.turn, SPAN // g.page_size, width), read=empty(parts, dtype=torch.int32),
            narrow=empty(pairs, 2, 2 * width, narrow_width(directions), dtype=torch.int8), scale=empty(pairs, 2, width),
            lse2=empty(parts, queries), part=empty(parts, queries, 2),
            part_acc=empty(parts, queries, g.head_size),
            sms=sms, programs=programs, weighers=weighers, together=g.together, parts=g.parts, pdl=gpu is not None and gpu.major >= 9, tuning=tuning,
            found={one: {} for one in widths},
        )  # fmt: skip

    @staticmethod
    def width(queries: int) -> int:
        """`BQ` of kernels for so many queries: heads of a group, of each token."""
        return max(power_of_two(queries), 8)

    @staticmethod
    def warps(width: int, size: int) -> int:
        """Of a program of `look_kernel`, by the results that it holds: `BQ` heads of such a size, 128 at least."""
        return max(width * max(power_of_two(size), 128) // 1024, 1)

    def block(self, width: int, size: int, itemsize: int, page: int) -> int:
        """Tokens that a program of `look_kernel` reads at once: as many for every eight queries as for the first, so that the
        warps that these take wait for each other less often. With FP8 the registers of two warps are too few for that."""
        times = 1 if (self.warps(width, size), itemsize) == (2, 1) else width // 8
        return min(self.tuning.block * times, page)

    @classmethod
    def weigher_warps(cls, width: int, size: int, directions: int) -> int:
        """Of a program of `weigh_kernel`, which holds the maps too."""
        return max(cls.warps(width, size), power_of_two(size) * narrow_width(directions) // 4096)

    @classmethod
    def weigher_options(cls, width: int, size: int, directions: int) -> dict:
        """How to launch `weigh_kernel`. Without a limit ptxas takes fewer registers than there are, and spills."""
        warps = cls.weigher_warps(width, size, directions)
        return {"num_warps": warps, "maxnreg": _most_registers(warps)}

    @classmethod
    def registers(cls, width: int, size: int, itemsize: int, directions: int) -> int:
        """Of a thread of `look_kernel`, at most. itemsize: bytes of the cache's elements."""
        warps = cls.warps(width, size)
        if warps > 1 or narrow_width(directions) > 32:
            return _most_registers(warps)
        return 200 if itemsize == 1 else 168

    @classmethod
    def resident(cls, width: int, size: int, itemsize: int, directions: int) -> int:
        """Programs of `look_kernel` that an SM's registers are enough for."""
        return _fitting(cls.warps(width, size), cls.registers(width, size, itemsize, directions))

    @classmethod
    def options(cls, width: int, size: int, itemsize: int, directions: int) -> list[dict]:
        """How to launch `look_kernel`, for `launch.launch`: with more registers, then with more warps, where some would spill."""
        warps, least = cls.warps(width, size), cls.registers(width, size, itemsize, directions)
        ways = [(warps, some) for some in sorted({least, 200, 255}) if least <= some <= _most_registers(warps)]
        more = min(2 * warps, 32)  # no program has more
        return [{"num_warps": n, "maxnreg": some} for n, some in (*ways, (more, _most_registers(more)))]

    def splits(self, pairs: int, width: int) -> int:
        """Programs of `look_kernel` for each of so many (row, KV head) pairs: all run at once, as it was compiled."""
        fitting = [self.sms * _fitting(way["num_warps"], way["maxnreg"]) for way in self.found[width].values()]
        return max(1, min(self.tuning.most, min([self.programs[width], *fitting]) // pairs))

    def weigh_splits(self, pairs: int) -> int:
        """The same of `weigh_kernel`."""
        return max(1, min(self.tuning.most_weighers, self.weighers // pairs))
