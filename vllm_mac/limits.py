"""How near a match must be: a threshold becomes a limit on squared distances.

`tools.calibrate.simulate` repeats `relief` for many settings at once.
"""

from torch import Tensor

from vllm_mac.config import MacConfig


def tightness(threshold: float) -> float:
    """`(1 - threshold)^2`, which limits are proportional to."""
    return (1.0 - threshold) ** 2


def loosest(size: float, config: MacConfig) -> float:
    """The limit at threshold 0 of a summary without mass; times `tightness`, the limit of one at a threshold.

    size: as for `limit`.
    """
    return 2.0 * size * relief(0.0, config)


def limit(size: float, config: MacConfig, slack: float = 1.0) -> float:
    """Squared distance under which a match is accepted: `2 size (1 - threshold)^2`.

    size: `d`, the squared norm of a standard normal query, or with `distance: relative` that of
    the query itself. slack: the most that `(1 - threshold)^2` may be, for a request that asked for a
    threshold of its own. Tensors that broadcast give one of limits.
    """
    own = tightness(config.threshold)
    return 2.0 * size * (slack.clamp(max=own) if isinstance(slack, Tensor) else min(own, slack))


def relief(mass, config: MacConfig):
    """What `limit` is multiplied by for a summary of this mass: `((1 + floor) / (mass + floor))^2`.

    mass: from 0 to 1, a number or a tensor of any shape. The result is 1 at mass 1, and everywhere without a
    `mass_floor`. A wrong summary is wrong in the output by its mass, so that one of little mass may be
    far off; the floor is for the mass that a better summary would have had. Not in the paper.
    """
    if config.mass_floor is None:
        return 1.0
    return ((1.0 + config.mass_floor) / (mass + config.mass_floor)) ** 2
