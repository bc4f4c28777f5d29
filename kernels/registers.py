"""How a kernel is launched so that no thread keeps registers in memory for want of others.

Threads might, but for ptxas 12.8 and 12.9: in `@P0 IADD3 R10, P0, ...; @P0 STL [R1+0x4], R10` the carry takes the place
of the condition, and what is later loaded from there is garbage, such as an address.
"""

from collections.abc import Sequence

import triton

# Per thread: with so many, four, three and two programs of four warps run at once on a multiprocessor. No thread has more.
REGISTERS = (128, 168, 255)


def launch(
    kernel, grid: tuple, pointers: dict, sizes: dict, others: dict, constants: dict, options: Sequence[dict], found: dict
) -> None:  # fmt: skip
    """Launch a kernel under the first of `options` under which no thread does, or the last where under all some do.

    Args:
        pointers, sizes, constants: the arguments by which Triton tells variants of the kernel: tensors or None; integers;
            what is compiled in: every constexpr that is no option, and what `kernel[grid]` takes beside arguments.
        others: those by which it tells none: numbers that it does not specialise on, and buffers of whoever keeps `found`.
        options: further arguments, the fastest first, which says what the others are.
        found: what was found earlier of each variant; added to.
    """
    # Of an integer Triton looks at whether it is 1 or a multiple of 16. A finer key costs one more question, to which
    # Triton has the answer.
    variant = (
        *options[0].values(),
        *constants.values(),
        *sizes.values(),
        *[x if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in pointers.values()],
    )
    option = found.get(variant)
    if option is None:
        option = _enough(kernel, grid, pointers | sizes | others | constants, options, found, variant)
    kernel[grid](**pointers, **sizes, **others, **constants, **option)


def power_of_two(least: int) -> int:
    """The smallest that is no less than `least`, 1 or more. Triton's function takes microseconds, and launches several."""
    return 1 << (least - 1).bit_length()


def _enough(kernel, grid: tuple, arguments: dict, options: Sequence[dict], found: dict, variant: tuple) -> dict:
    for option in options[:-1]:
        compiled = kernel.warmup(**arguments, **option, grid=grid)
        if isinstance(compiled, triton.FutureKernel):  # being compiled: see `warmup.compiling`
            return option
        if not _spills(compiled):
            break
    else:
        option = options[-1]
    found[variant] = option
    return option


def _spills(compiled) -> int:
    """Registers of a thread that a compiled kernel keeps in memory."""
    if compiled is None:  # Triton's interpreter compiles nothing
        return 0
    compiled._init_handles()  # only the driver tells
    return compiled.n_spills
