"""The grid of values to try, and its candidates: each is a full setting of MAC for one layer.

Imports neither vLLM nor torch.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, NamedTuple


class Setting(NamedTuple):
    """The keys that all layers of a model share."""

    band: int
    sink: int
    reuse: str
    lag_weight: float
    max_chain: int | None
    distance: str
    mass_floor: float | None

    def __str__(self) -> str:
        cap = "" if self.max_chain is None else f", max_chain {self.max_chain}"
        relative = ", relative" if self.distance == "relative" else ""
        mass = "" if self.mass_floor is None else f", mass_floor {self.mass_floor:g}"
        return f"band {self.band}, sink {self.sink}, {self.reuse}, lag_weight {self.lag_weight:g}{cap}{relative}{mass}"


class Candidate(NamedTuple):
    """A setting with the threshold of one layer."""

    setting: Setting
    threshold: float


# The setting of the paper (arXiv 2604.00235), whose window is 512.
PAPER = Candidate(Setting(256, 0, "chained", 0.0, None, "absolute", None), 0.45)
PAPER_WINDOW = 512


@dataclass(frozen=True, slots=True)
class Grid:
    """The values to try of each key, in every combination. `window` and `min_context` are fixed.

    steps: positions to decode at the end of each prompt.
    """

    window: int
    min_context: int
    steps: int
    thresholds: tuple[float, ...]
    bands: tuple[int, ...]
    sinks: tuple[int, ...]
    lag_weights: tuple[float, ...]
    reuse: tuple[str, ...]
    max_chains: tuple[int | None, ...]
    distances: tuple[str, ...]
    mass_floors: tuple[float | None, ...]

    def candidates(self, paper: bool) -> list[Candidate]:
        """Candidates in order of their settings, with rising thresholds. paper: add the paper's setting and threshold."""
        settings = {
            Setting(*keys)
            for keys in product(
                self.bands, self.sinks, self.reuse, self.lag_weights, self.max_chains, self.distances, self.mass_floors
            )
        }
        thresholds = set(self.thresholds)
        if paper:
            settings.add(PAPER.setting)
            thresholds.add(PAPER.threshold)
        ordered = sorted(settings, key=lambda s: tuple(-1 if value is None else value for value in s))
        return [Candidate(setting, threshold) for setting in ordered for threshold in sorted(thresholds)]

    def least(self, paper: bool = False) -> int:
        """The fewest tokens of a prompt: its first step must try a match, and no ring entry may have an empty prefix."""
        band = max(*self.bands, PAPER.setting.band) if paper else max(self.bands)
        return self.steps + max(self.window + band + max(self.sinks), self.min_context)

    def as_dict(self) -> dict:
        return asdict(self)


def grid_of(values: dict) -> Grid:
    """The inverse of `as_dict`, also after JSON."""
    fields: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return Grid(**fields)


def settings_of(candidates: Iterable[Candidate]) -> list[Setting]:
    """Each setting once, in order."""
    return list(dict.fromkeys(candidate.setting for candidate in candidates))
