"""How far attention in floating point may be from the exact result: bounds from rounding alone.

`u` is the unit roundoff (float32: 2^-24, bfloat16: 2^-8). Terms in u^2 are dropped. Errors of
outputs are in units of the largest |value| V, and errors of LSEs absolute. Weights of a
softmax or of a merge add up to 1, so errors of their inputs are averaged, never amplified.

n: keys. d: head size. sigma: largest scale * sum_i |q_i k_i| over these keys, so that scores
lie within [-sigma, sigma] and |lse| <= sigma + ln n. Summation may be in any order.
"""

from math import log
from typing import NamedTuple

from torch import Tensor

FLOAT32, BFLOAT16 = 2.0**-24, 2.0**-8


class Error(NamedTuple):
    out: float  # in units of V
    lse: float


def largest_score(query: Tensor, key: Tensor, scale: float) -> float:
    """sigma of queries `[..., d]` and keys `[T, d]`."""
    return float((query.double().abs() @ key.double().abs().T).max()) * scale


def attend_error(n: int, d: int, sigma: float, u: float = FLOAT32) -> Error:
    """One evaluation of A over n keys.

    Score: d products and sums and the scale, (d+2) u sigma.
    LSE: that, the shift by the largest score (2 u sigma), exp (2u), the sum (n u), log
        (2 u ln n), and the shift back (u |lse|).
    Output: weights exp(score - lse) carry both, the subtraction (u (2 sigma + ln n)) and exp
        (2u); their product with n values adds n u.
    """
    score = (d + 2) * u * sigma
    lse = score + u * (2 * sigma + 2 + n + 2 * log(n)) + u * (sigma + log(n))
    return Error(score + lse + u * (2 * sigma + log(n) + 2 + n), lse)


def merge_error(a: Error, b: Error, share: float, lse: float, u: float = FLOAT32) -> Error:
    """One merge, where `a` has the share `share` of the weight and the result this LSE.

    LSE: a and b's by their shares, then log1p(exp) (5u) and the final sum (u |lse|): eta.
    Output: both by their shares; the two weights, w_i exp(delta_i - delta): 2 w_a w_b
        (delta_a + delta_b) + eta; their arguments (u sum w_i |l_i - l| <= u ln 2), exp (2u),
        product and sum (2u).
    """
    eta = u * (abs(lse) + 5)
    weights = 2 * share * (1 - share) * (a.lse + b.lse) + eta + 5 * u
    return Error(share * a.out + (1 - share) * b.out + weights, share * a.lse + (1 - share) * b.lse + eta)


def decode_error(n: int, d: int, sigma: float, chain: int, u: float = FLOAT32) -> float:
    """Output of a decode step whose summary is `chain` merges old: chain + 2 merges of parts.

    Each part is at most as wrong as one evaluation over all n keys, and 2 w_a w_b <= 1/2.
    """
    part, lse, merges = attend_error(n, d, sigma, u), sigma + log(n), chain + 2
    return part.out + merges * (part.lse + merges * u * (lse + 5) + u * (lse + 10))
