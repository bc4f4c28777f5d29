"""How a kernel is launched so that no thread keeps registers in memory for want of others.

Threads might, but for ptxas 12.8 and 12.9: in `@P0 IADD3 R10, P0, ...; @P0 STL [R1+0x4], R10` the carry takes the place
of the condition, and what is later loaded from there is garbage, such as an address.
"""

from collections.abc import Sequence

import triton

# Per thread: with so many, four, three and two programs of four warps run at once on a multiprocessor. No thread has more.
REGISTERS = (128, 168, 255)


def layer_kind(store, cos_sin, is_neox: bool = True) -> tuple:
    """What kernels are compiled for in which layers of the same shapes may differ: rings and rotation."""
    rotation = None if cos_sin is None else (cos_sin.dtype, cos_sin.shape[-1])
    return store.query.dtype, store.out.dtype, rotation, is_neox


def enough(kernel, grid: tuple, launch: dict, options: Sequence[dict], found: dict[tuple, dict], kind: tuple) -> dict:
    """The first of `options` under which no thread does, or the last where under all some do.

    Args:
        kernel, grid, launch: what is launched as `kernel[grid](**launch, **option)`.
        options: further arguments, the fastest first.
        found: what was found earlier by `kind`, which says all that may make another variant of the kernel; added to.
    """
    if kind in found:
        return found[kind]
    for option in options[:-1]:
        variant = kernel.warmup(**launch, **option, grid=grid)
        if isinstance(variant, triton.FutureKernel):  # being compiled: see `warmup.compiling`
            return option
        if not _spills(variant):
            break
    else:
        option = options[-1]
    found[kind] = option
    return option


def _spills(variant) -> int:
    """Registers of a thread that a compiled kernel keeps in memory."""
    if variant is None:  # Triton's interpreter compiles nothing
        return 0
    variant._init_handles()  # only the driver tells
    return variant.n_spills
