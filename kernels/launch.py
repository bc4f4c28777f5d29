"""Launch a kernel with the fastest options under which no register spills.

ptxas 12.8 and 12.9 can lose a spilled register. In `@P0 IADD3 R10, P0, ...; @P0 STL [R1+0x4], R10` the carry of the
addition overwrites the predicate `P0`, so the store may not happen. The thread later loads garbage, such as an address. Spills
may be allowed once no Triton that a supported vLLM installs brings these ptxas.
"""

from collections.abc import Sequence

import triton

# Registers of a thread. An SM runs four, three and two programs of four warps at once with these; no thread has more.
REGISTER_LIMITS = (128, 168, 255)


def launch(
    kernel, grid: tuple, pointers: dict, sizes: dict, others: dict, constants: dict, options: Sequence[dict], found: dict
) -> None:  # fmt: skip
    """Launch a kernel with the first of `options` under which no register spills, or the last where all spill.

    Args:
        pointers: tensors or None, which Triton specialises on.
        sizes: integers that Triton specialises on.
        constants: every constexpr that is not in `options`, and what else `kernel[grid]` takes.
        others: arguments without specialisation: numbers, and buffers of the owner of `found`.
        options: further arguments, the fastest first. All have the same keys.
        found: the option chosen for each variant of the kernel so far; added to.
    """
    # Triton specialises on whether an integer is 1 or a multiple of 16. This key is finer: a new value costs one call of
    # `warmup`, which finds the variant compiled.
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


def by_kind(arguments: dict, plain: Sequence[str]) -> tuple[dict, dict, dict, dict]:
    """`pointers`, `sizes`, `others` and `constants` of `launch`, told by their names: `p_`, `s_`, those of `plain`, others."""
    kinds: tuple[dict, dict, dict, dict] = ({}, {}, {}, {})
    for name, value in arguments.items():
        kind = 2 if name in plain else 0 if name.startswith("p_") else 1 if name.startswith("s_") else 3
        kinds[kind][name] = value
    return kinds


def power_of_two(least: int) -> int:
    """The smallest power of two that is at least `least`, 1 or more. Triton's own function takes microseconds a call."""
    return 1 << (least - 1).bit_length()


def _enough(kernel, grid: tuple, arguments: dict, options: Sequence[dict], found: dict, variant: tuple) -> dict:
    for option in options[:-1]:
        compiled = kernel.warmup(**arguments, **option, grid=grid)
        if isinstance(compiled, triton.FutureKernel):  # still compiling, see `warmup.compiling`
            return option
        if not _spills(compiled):
            break
    else:
        option = options[-1]
    found[variant] = option
    return option


def _spills(compiled) -> int:
    """Registers of a thread that a compiled kernel spills."""
    if compiled is None:  # Triton's interpreter compiles nothing
        return 0
    compiled._init_handles()  # only the driver knows
    return compiled.n_spills
