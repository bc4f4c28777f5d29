"""The numbers of an FP8 cache, float8_e4m3fn: a scale makes keys and values of them, and them of keys and values.

Device code. A scale is a pointer to one float32, since vLLM may write it anew. Without one, None, nothing is compiled in.
"""

import triton
import triton.language as tl

from vllm_mac.kernels.entry import narrow


@triton.jit
def scaled(x, p_scale):
    """`x`, or that times the scale."""
    if p_scale is not None:
        x *= tl.load(p_scale)
    return x


@triton.jit
def held(x, p_scale, p_kv):
    """A key's or value's numbers as the cache of `p_kv` holds them: rounded as vLLM rounds those of a prompt, so what FP8
    does not reach becomes its largest, and NaN stays."""
    if p_scale is not None:
        x = tl.div_rn(x.to(tl.float32), tl.load(p_scale))
        x = tl.where(x == x, narrow(x, p_kv), x.to(p_kv.dtype.element_ty))
    return x
