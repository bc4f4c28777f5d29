"""Compiles the kernels for a GPU that need not be there: `python tests/compiled.py ARCH`, 80 for sm80.

Prints a JSON line for each kernel variant that the warm-up of a small server launches: its name, the shared
memory that a program takes and the memory that a thread does, both in bytes.
"""

import dataclasses
import json
import re
import subprocess
import sys
import tempfile

import torch
from test_warmup import fill_plans, make
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vllm_mac import warmup
from vllm_mac.fused import rotation
from vllm_mac.kernels import complete, registers
from vllm_mac.kernels.exact import TritonExact, Tuning
from vllm_mac.kernels.hit import Workspace

# Most shared memory of a program, and multiprocessors, by the CUDA C++ Programming Guide: A100, L4, H200, B200.
GPUS = {80: (163 << 10, 108), 89: (99 << 10, 58), 90: (227 << 10, 132), 100: (227 << 10, 148)}
# GQA groups of 16 with heads of 256, the largest there are, groups that are no power of two, and batches of all sizes.
SHAPES = [
    {"rows": 2, "heads": 64, "kv_heads": 4, "d": 256, "dtype": torch.bfloat16, "sink": 4},
    {"rows": 2, "heads": 28, "kv_heads": 4, "d": 128, "dtype": torch.float16, "audit": 0.1},
    {"rows": 40, "heads": 32, "kv_heads": 4, "d": 128, "dtype": torch.bfloat16, "mass_floor": 0.2},
]


class Driver:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, arch: int):
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device=0: 0


class Compiled:
    """In place of a kernel: a launch compiles it."""

    def __init__(self, kernel, seen: set):
        self.kernel, self.warmup, self.seen = kernel, kernel.warmup, seen

    def __getitem__(self, grid):
        def launch(*args, launch_pdl=False, **kwargs):
            made = self.kernel.warmup(*args, grid=grid, **kwargs)
            if made.hash not in self.seen:
                self.seen.add(made.hash)
                row = {"kernel": self.kernel.fn.__name__, "shared": made.metadata.shared, "stack": stack(made.asm["cubin"])}
                print(json.dumps(row), flush=True)

        return launch


def stack(cubin: bytes) -> int:
    """What a thread keeps in memory, mostly for want of registers."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True)
    (found,) = re.findall(r"REG:\d+ STACK:(\d+)", usage.stdout + usage.stderr)
    return int(found)


def main(arch: int) -> None:
    driver.set_active(Driver(arch))
    (shared, sms), pdl, seen = GPUS[arch], arch >= 90, set()
    for module, name in warmup.KERNELS:
        setattr(module, name, Compiled(getattr(module, name), seen))
    registers._spills = lambda made: stack(made.asm["cubin"])
    allocate, default, init = Workspace.allocate.__func__, Tuning.default.__func__, TritonExact.__init__
    Workspace.allocate = classmethod(lambda *args, **more: dataclasses.replace(allocate(*args, **more), slots=3 * sms, pdl=pdl))
    Tuning.default = classmethod(lambda cls, *args: default(cls, *args, shared))

    def exact(self, problem, device, **more):
        tuning = Tuning.default(problem.head_size, problem.dtype, problem.group)
        init(self, problem, device, programs=sms * tuning.per_sm, tuning=tuning, **more)
        self.pdl = pdl

    TritonExact.__init__ = exact
    for shape in SHAPES if arch == 90 else SHAPES[:2]:
        float8 = {"ring_dtype": "float8_e4m3fn"} if arch >= 89 and shape["dtype"] == torch.float16 else {}
        decoder, layers, table = make(window=512, band=256, min_context=2048, **shape, **float8)
        warmup.warm_up(decoder, layers[:1], table, True)
        # What goes before and after FlashInfer, which is not asked to plan without a GPU.
        fill_plans(2, shape["kv_heads"], sms, pdl, columns=37, block_pages=8, head_pages=1)
        query = torch.empty(2, shape["heads"], shape["d"], dtype=shape["dtype"])
        complete.complete_misses(
            query, decoder.position, decoder.ring, layers[0].store, query, decoder._work.part_lse, decoder._work, query,
            **rotation(layers[0].rotary),
        )  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]))
