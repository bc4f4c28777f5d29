"""Compiles the kernels for a GPU that need not be there: `python -m support.compiled ARCH [sass] [few]` in `tests/`, 80 for
sm80. With `few`, for few shapes.

Prints a JSON line for each kernel variant that the warm-up of a small server launches:

triton: the version that compiles. kernel, launch: its name, and what it is launched with that is compiled in.
shared, stack: bytes of shared memory that a program takes, and of memory that a thread does.
registers: of a thread. passed_over: faster ways to launch it under which threads would lack registers.
With `sass`, of the kernels in LOOPED, instructions: in all. loads, copies: how many of them read 16 bytes a thread into
registers, and into shared memory. loops: of each loop that has none inside, in order, how many there are of what.
itemsize: bytes of an element of the KV cache and, where it reads rings, of a recorded query.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from unittest.mock import patch

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from support.decoders import fill_plans, make
from vllm_mac import lookup_decoder, warmup
from vllm_mac.counters import Count
from vllm_mac.kernels import complete, launch
from vllm_mac.kernels.exact import TritonExact, Tuning
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.key_index import Maps, Scales
from vllm_mac.state import Geometry, IndexRule, IndexState, most_together

# Most shared memory of a program, and multiprocessors, by the CUDA C++ Programming Guide: A100, L4, H200, B200.
GPUS = {80: (163 << 10, 108), 89: (99 << 10, 58), 90: (227 << 10, 132), 100: (227 << 10, 148)}
# GQA groups of 16 with heads of 256, the largest there are, groups that are no power of two, and what `hit._tune` was
# measured with.
SHAPES = [
    {
        "rows": 2,
        "heads": 64,
        "kv_heads": 4,
        "d": 256,
        "dtype": torch.bfloat16,
        "sink": 4,
        "audit": 0.1,
        "mass_floor": 0.2,
    },
    {"rows": 2, "heads": 28, "kv_heads": 4, "d": 128, "dtype": torch.float16, "audit": 0.1},
    {"rows": 40, "heads": 32, "kv_heads": 8, "d": 128, "dtype": torch.bfloat16},
]
# Of 40 rows: with 5 a ring is read by one program and the band by four, with 40 the band by one too.
SIZES = (5, 40)
# Few heads with wide maps, the widest index there is, and small heads.
MORE = [
    ({"rows": 1, "heads": 16, "kv_heads": 8, "d": 256, "dtype": torch.bfloat16}, None),
    ({"rows": 1, "heads": 32, "kv_heads": 8, "d": 128, "dtype": torch.bfloat16}, 128),
    ({"rows": 64, "heads": 14, "kv_heads": 2, "d": 64, "dtype": torch.bfloat16}, None),
]
# The longest window, whose page numbers a program holds all at once, where there is least shared memory.
LONG = SHAPES[0] | {"rows": 1, "heads": 16, "kv_heads": 1, "window": 65536, "rings": 1}


LOOPED = ("hit_kernel", "prefix_kernel", "look_kernel")


class Driver:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, arch: int):
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0


class Compiled:
    """In place of a kernel: a launch compiles it."""

    sass = False  # whether instructions are counted, which takes a second a variant

    def __init__(self, kernel, seen: set, passed_over: dict):
        self.kernel, self.warmup, self.seen, self.passed_over = kernel, kernel.warmup, seen, passed_over

    def __getitem__(self, grid):
        def launch(*args, launch_pdl=False, **kwargs):
            made = self.kernel.warmup(*args, grid=grid, **kwargs)
            if made.hash in self.seen:
                return
            self.seen.add(made.hash)
            called = self.kernel.fn.__name__
            tensors = [kwargs[name] for name in ("p_kv", "p_ring_query") if name in kwargs]
            row = {
                "triton": triton.__version__, "kernel": called, "shared": made.metadata.shared, **measure(made.asm["cubin"], self.sass and called in LOOPED),
                "itemsize": [tensor.element_size() for tensor in tensors], "passed_over": self.passed_over.pop(self.kernel, 0),
                "launch": {k: v for k, v in kwargs.items() if isinstance(v, int) and (k.isupper() or k == "num_warps")},
            }  # fmt: skip
            print(json.dumps(row), flush=True)

        return launch


def noting(passed_over: dict):
    """`launch._enough`, which notes how many options it passed over for a kernel that is launched next."""
    enough = launch._enough

    def noted(kernel, grid, arguments, options, found, variant):
        option = enough(kernel, grid, arguments, options, found, variant)
        passed_over[kernel.kernel] = list(options).index(option)
        return option

    return noted


def measure(cubin: bytes, sass: bool = False) -> dict:
    """What the assembly of a kernel tells. A thread has memory of its own mostly for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", *["-sass"] * sass, file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    ((used, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout + done.stderr)
    found = {"registers": int(used), "stack": int(stack)}
    if sass:
        lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?([A-Z][A-Z0-9_.]*)(.*);", done.stdout, re.M)
        names = [name for _, name, _ in lines]
        count = lambda name: sum(x.split(".")[0] == name and "128" in x.split(".") for x in names)
        found |= {"instructions": len(names), "loads": count("LDG"), "copies": count("LDGSTS"), "loops": loops(lines)}
    return found


def loops(lines: list[tuple[str, str, str]]) -> list[dict[str, int]]:
    """lines: address, name and operands of instructions. A loop ends with a jump back to where it begins."""
    spans, at = set(), {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    for i, (_, name, operands) in enumerate(lines):
        if name.startswith("BRA") and (to := re.search(r"0x[0-9a-f]+", operands)) and at[int(to[0], 16)] < i:
            spans.add((at[int(to[0], 16)], i))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [dict(Counter(name.split(".")[0] for _, name, _ in lines[a : b + 1])) for a, b in sorted(inner)]


def main(arch: int, sass: bool, few: bool) -> None:
    driver.set_active(Driver(arch))
    Compiled.sass = sass
    (shared, sms), pdl, seen, passed_over = GPUS[arch], arch >= 90, set(), {}
    for module, name in (*warmup.KERNELS, *lookup_decoder.KERNELS):
        setattr(module, name, Compiled(getattr(module, name), seen, passed_over))
    launch._spills = lambda made: measure(made.asm["cubin"])["stack"]
    launch._enough = noting(passed_over)
    allocate, default, init = Workspace.allocate.__func__, Tuning.default.__func__, TritonExact.__init__
    Workspace.allocate = classmethod(
        lambda *args, **more: dataclasses.replace(allocate(*args, **more), slots=3 * sms, pdl=pdl)
    )
    Tuning.default = classmethod(lambda cls, *args: default(cls, *args, shared))

    def init_for(self, geometry, device):
        tuning = Tuning.default(geometry.head_size, geometry.dtype, geometry.group)
        init(self, geometry, device, programs=sms * tuning.per_sm, tuning=tuning)
        self.pdl = pdl

    TritonExact.__init__ = init_for
    if arch < 100:  # see `capabilities.INDEX_BEFORE`
        for shape, page in [*zip(SHAPES, (16, 64), strict=False)][few:]:
            if (arch, shape["d"]) not in ((80, 256), (89, 128)):  # sm89 has least shared memory, else they are alike
                for fp8 in (False, True)[: 1 + (arch >= 89 and not few)]:  # see `capabilities.FLOAT8_FROM`
                    look_up(arch, shape, page, fp8)
        if arch == 90:
            for shape, size in MORE[:1] if few else MORE:
                look_up(arch, shape, 64, False, size)
    # All shapes where the kernels were measured; elsewhere the one whose threads need most registers.
    for shape in SHAPES[2 * few :] if arch == 90 else [LONG if arch == 89 else SHAPES[0]]:
        float8 = {"ring_dtype": "float8_e4m3fn"} if arch == 89 or shape["dtype"] == torch.float16 else {}
        decoder, layers, table = make(**{"window": 512, "band": 256, "min_context": 2048} | shape | float8)
        some = lambda *span: SIZES if span[-1] > max(SIZES) else range(*span)
        with patch.object(warmup, "range", some, create=True):  # the sizes of steps
            warmup.warm_up(decoder, layers[:1], table)
        # What goes before and after FlashInfer, which is not asked to plan without a GPU.
        fill_plans(2, shape["kv_heads"], sms, pdl, columns=37, block_pages=8, head_pages=1)
        query = torch.empty(2, shape["heads"], shape["d"], dtype=shape["dtype"])
        rows = decoder.rows(torch.zeros(2, 1, dtype=torch.int32))
        complete.complete_misses(layers[0], rows, query, query, decoder._work.part_lse, decoder._work, query)


def look_up(arch: int, shape: dict, page: int, fp8: bool, size: int | None = None) -> None:
    """Launch the kernels of steps that decode by the index of keys, with pages of so many tokens: one token a row, and as
    many as a program takes of a step of speculation, 4 at most. fp8: whether the cache is. size: of the index."""
    rows, heads, kv_heads, d, dtype = (shape[name] for name in ("rows", "heads", "kv_heads", "d", "dtype"))
    at_once = max(min(most_together(heads // kv_heads, d), 4), 1)
    geometry = Geometry(rows, heads, kv_heads, d, page, 8, dtype, 256, 0, d**-0.5, at_once, fp8)
    decoder = lookup_decoder.LookupDecoder(geometry, IndexRule(1.5, 256, 16, 2048, d**-0.5), size, torch.device("cpu"))
    work, sms = decoder._work, GPUS[arch][1]
    work.sms, work.weighers, work.pdl = sms, work.weighers * sms, arch >= 90  # of one SM here
    work.programs = {width: programs * sms for width, programs in work.programs.items()}
    scales = Scales(torch.ones(()), torch.ones(())) if fp8 else None
    maps = Maps.allocate(kv_heads, d, decoder.layout.directions, dtype, "cpu", scales)
    decoder.warm_up(IndexState(maps, torch.zeros(len(Count), dtype=torch.int64)))


if __name__ == "__main__":
    main(int(sys.argv[1]), "sass" in sys.argv[2:], "few" in sys.argv[2:])
