"""The measurements of a simulation: counts by half of the prompts, layer and candidate, and figures from them.

The prompts with even numbers are half 0, for the choice; those with odd numbers are half 1, to report on. With one
prompt half 1 is empty. Imports neither vLLM nor torch.
"""

import json
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from pathlib import Path

import numpy as np

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.bins import BINS, UPPER
from vllm_mac.tools.calibrate.grid import Candidate, Grid, grid_of

HALVES = 2
QUANTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
METRICS = (*QUANTILES, "mean", "output")


@dataclass(frozen=True, slots=True)
class Measured:
    """counts: arrays `[2, L, C, ...]` by name, see `simulate.tally` and `simulate.output_error`. names, indices: of the L layers.
    tokens: of each prompt, reply included. source: model, prompts, configuration and environment."""

    counts: dict[str, np.ndarray]
    names: tuple[str, ...]
    indices: tuple[int, ...]
    grid: Grid
    paper: bool
    tokens: tuple[int, ...]
    source: dict = field(default_factory=dict)

    @classmethod
    def of(
        cls, sums: list[dict[str, dict]], layers: dict[str, int], grid: dict, paper: bool, tokens: list[int]
    ) -> "Measured":
        """From the sums of each half by layer. A half without prompts gets zeros."""
        first = sums[0]
        counts = {}
        for name in next(iter(first.values())):
            halves = [
                [half[layer][name] if half else np.zeros_like(first[layer][name]) for layer in layers] for half in sums
            ]
            counts[name] = np.array(halves)
        return cls(counts, tuple(layers), tuple(layers.values()), grid_of(grid), paper, tuple(tokens))

    @property
    def candidates(self) -> list[Candidate]:
        return self.grid.candidates(self.paper)

    @property
    def held_out(self) -> bool:
        return len(self.tokens) > 1

    def save(self, path: Path) -> None:
        about = {
            "names": self.names, "indices": self.indices, "grid": self.grid.as_dict(), "paper": self.paper, "tokens": self.tokens,
            "source": self.source,
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        with open(part, "wb") as file:
            np.savez_compressed(file, about=json.dumps(about), **self.counts)  # pyrefly: ignore[bad-argument-type]
        part.replace(path)

    @classmethod
    def load(cls, path: Path) -> "Measured":
        """Read a file that `save` wrote. Raises CalibrateError for any other file."""
        try:
            with np.load(path) as arrays:
                about = json.loads(str(arrays["about"]))
                counts = {name: arrays[name] for name in arrays.files if name != "about"}
                grid = grid_of(about["grid"])
                found = cls(
                    counts,
                    tuple(about["names"]),
                    tuple(about["indices"]),
                    grid,
                    about["paper"],
                    tuple(about["tokens"]),
                    about["source"],
                )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CalibrateError(f"{path}: not a file of measurements ({type(error).__name__}: {error})") from error
        if counts["bins"].shape[1:] != (len(found.names), len(found.candidates), BINS):
            raise CalibrateError(f"{path}: its counts have another shape than this version's")
        return found


def figures(counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Figures of counts with any leading dimensions.

    p50, p95, p99: relative error of heads that hit, NaN without hits; the upper edge of a bin 3.7 %
    wide. mean: over all heads, misses included. output, where it was measured: mean over tokens of the squared error of the
    layer's output after `W_O`, over the squared norm of the residual stream. hits: share of heads that hit with their group.
    matched: share with a match of their own. read: KV tokens over those of full attention. lag, chain:
    means over heads that hit. longest: the longest chain. samples: heads that hit.
    """
    bins = counts["bins"]
    samples = bins.sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = {name: _quantile(bins, share) for name, share in QUANTILES.items()}
        found |= {
            "mean": counts["error"] / counts["steps"],
            "hits": samples / counts["steps"],
            "matched": counts["matched"] / counts["steps"],
            "read": counts["read"] / counts["full"],
            "lag": counts["lag"] / samples,
            "chain": counts["chain"] / samples,
        }
        if "output" in counts:
            found["output"] = counts["output"] / counts["positions"]
    return found | {"longest": counts["longest"], "samples": samples}


def pooled(counts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Counts of several layers added up, without `heads`: layers have different heads."""
    total = {name: reduce(add, [one[name] for one in counts]) for name in counts[0] if name not in ("longest", "heads")}
    return total | {"longest": np.max([one["longest"] for one in counts], axis=0)}


def exact(counts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The counts of the same steps without reuse."""
    kept = ("steps", "full", "positions")
    return {name: value if name in kept else np.zeros_like(value) for name, value in counts.items()} | {
        "read": counts["full"]
    }


def _quantile(bins: np.ndarray, share: float) -> np.ndarray:
    """Upper edge of the bin in which the `share`-th of the counts lies (nearest rank); NaN for none."""
    passed = bins.cumsum(-1)
    total = passed[..., -1:]
    rank = np.ceil(share * total)
    place = np.argmax(passed >= rank, -1)
    return np.where(total[..., 0] > 0, UPPER[place], np.nan)
