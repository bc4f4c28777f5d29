"""The versions that the project supports: from the first of a pair up to, but not including, the second.

`pyproject.toml` says the same to pip, and a test holds the two together.
"""

import re

PYTHON = ((3, 11), (3, 14))
VLLM = ((0, 32), (0, 34))
# The Triton versions that the supported vLLM versions install for CUDA. The kernels are compiled and measured with them.
TRITONS = ((3, 6), (3, 8))


def parsed(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (0, 32, 0) of 0.32.0+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def within(version: str, span: tuple[tuple[int, ...], tuple[int, ...]]) -> bool:
    return span[0] <= parsed(version) and parsed(version)[: len(span[1])] < span[1]


def spelled(span: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    """As pip takes it: >=0.32,<0.34."""
    low, high = (".".join(map(str, bound)) for bound in span)
    return f">={low},<{high}"
