"""The choice: for each setting the thresholds with the fewest KV reads that keep every layer within a budget; of the
settings, the one with the fewest KV reads.

Reads within SLACK of the fewest count as equal. Then the smaller error decides: a layer's error between thresholds, the
error of all layers between settings. Imports neither vLLM nor torch.
"""

from dataclasses import dataclass

import numpy as np

from vllm_mac.tools.calibrate import CalibrateError
from vllm_mac.tools.calibrate.grid import Candidate, Setting, settings_of
from vllm_mac.tools.calibrate.measured import Measured, exact, figures, pooled

SLACK = 0.02


@dataclass(frozen=True, slots=True)
class Rule:
    """metric: the figure of every layer that must be at most the budget. A layer stays exact where it saves a smaller
    share of its KV reads than min_saving, or has fewer heads that hit than min_samples."""

    metric: str
    min_saving: float = 0.05
    min_samples: int = 200


@dataclass(frozen=True, slots=True)
class Choice:
    """thresholds: one for each layer, None for an exact layer. read: share of KV tokens read, over all layers."""

    setting: Setting
    thresholds: tuple[float | None, ...]
    read: float


class Chooser:
    """Chooses on one half of the prompts. Raises CalibrateError for a metric that was not measured."""

    def __init__(self, measured: Measured, rule: Rule, half: int = 0):
        self.measured, self.rule, self.half = measured, rule, half
        self.candidates = measured.candidates
        self.settings = settings_of(self.candidates)
        counts = {name: value[half] for name, value in measured.counts.items()}
        found = figures(counts)
        if rule.metric not in found:
            raise CalibrateError(
                f"--metric: received {rule.metric!r}, which these measurements lack; measure with --metric {rule.metric}"
            )
        self.error, self.read = found[rule.metric], found["read"]
        self.allowed = (found["samples"] >= rule.min_samples) & (1 - self.read >= rule.min_saving)
        self.full = counts["full"][:, 0]
        self.members = {
            s: np.array([i for i, c in enumerate(self.candidates) if c.setting == s]) for s in self.settings
        }

    def within(self, budget: float, setting: Setting) -> Choice:
        """The fewest reads of this setting within the budget; all layers are exact where nothing fits."""
        some = self.members[setting]
        fits = self.allowed[:, some] & (self.error[:, some] <= budget)
        read = np.where(fits, self.read[:, some], 1.0)
        few = fits & (read <= (1 + SLACK) * read.min(1, keepdims=True))
        best = np.where(few, self.error[:, some], np.inf).argmin(1)
        thresholds = tuple(
            self.candidates[some[k]].threshold if fits[layer, k] else None for layer, k in enumerate(best.tolist())
        )
        share = float((read[np.arange(len(read)), best] * self.full).sum() / self.full.sum())
        return Choice(setting, thresholds, share)

    def ranking(self, budget: float) -> list[Choice]:
        """Each setting's choice, the best first."""
        choices = sorted((self.within(budget, setting) for setting in self.settings), key=lambda choice: choice.read)
        few = [choice for choice in choices if choice.read <= (1 + SLACK) * choices[0].read]
        few.sort(key=lambda choice: np.nan_to_num(outcome(self.measured, choice, self.half)[self.rule.metric]))
        return few + choices[len(few) :]

    def best(self, budget: float) -> Choice:
        """The best choice. Raises CalibrateError, with the nearest figure, where every layer would stay exact."""
        choice = self.ranking(budget)[0]
        if any(threshold is not None for threshold in choice.thresholds):
            return choice
        layer, nearest = self._nearest()
        if nearest is None:
            raise CalibrateError(
                f"no layer saves {self.rule.min_saving:.0%} of its KV reads under any candidate, with {self.rule.min_samples} heads that "
                "hit; lower --thresholds, raise --steps, or use longer or more prompts"
            )
        raise CalibrateError(
            f"--budget: received {budget:g}; no layer stays within it on {self.rule.metric} while it saves "
            f"{self.rule.min_saving:.0%} of its KV reads. Nearest: {self.rule.metric} {self.error[layer, nearest]:.3g} in "
            f"{self.measured.names[layer]}, which then reads {self.read[layer, nearest]:.1%} (threshold "
            f"{self.candidates[nearest].threshold:g}, {self.candidates[nearest].setting})"
        )

    def saving(self, share: float) -> tuple[Choice, float]:
        """The smallest budget that saves this share of KV reads, and the choice at it.

        Raises CalibrateError, with the largest possible saving, where no budget does.
        """
        budgets = np.unique(self.error[self.allowed & np.isfinite(self.error)])
        if not len(budgets) or 1 - self.ranking(budgets[-1])[0].read < share:
            most = 1 - self.ranking(budgets[-1])[0].read if len(budgets) else 0.0
            raise CalibrateError(
                f"--saving: received {share:g}; the candidates save {most:.1%} of KV reads at most. Lower --thresholds or --bands"
            )
        low, high = 0, len(budgets) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if 1 - self.ranking(budgets[middle])[0].read >= share else (middle + 1, high)
        return self.ranking(budgets[low])[0], float(budgets[low])

    def _nearest(self) -> tuple[int, int | None]:
        error = np.where(self.allowed & np.isfinite(self.error), self.error, np.inf)
        layer, candidate = np.unravel_index(int(error.argmin()), error.shape)
        return int(layer), int(candidate) if np.isfinite(error[layer, candidate]) else None


def chosen_counts(measured: Measured, choice: Choice, half: int) -> list[dict[str, np.ndarray]]:
    """Counts of each layer under a choice, in one half of the prompts."""
    index = {candidate: i for i, candidate in enumerate(measured.candidates)}
    found = []
    for layer, threshold in enumerate(choice.thresholds):
        at = index[Candidate(choice.setting, threshold)] if threshold is not None else 0
        counts = {name: value[half, layer, at] for name, value in measured.counts.items()}
        found.append(counts if threshold is not None else exact(counts))
    return found


def single(measured: Measured, candidate: Candidate) -> Choice:
    """One threshold for all layers. `read` is NaN; see `outcome` for it."""
    return Choice(candidate.setting, (candidate.threshold,) * len(measured.names), float("nan"))


def outcome(measured: Measured, choice: Choice, half: int) -> dict[str, float]:
    """`figures` of all layers together under a choice, in one half of the prompts."""
    return {name: float(value) for name, value in figures(pooled(chosen_counts(measured, choice, half))).items()}
