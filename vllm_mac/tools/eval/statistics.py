"""From answers, log-probabilities and counters to figures. Shares and scores lie between 0 and 1."""

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

HEAD_HITS = "vllm_mac_audited_head_hits_total"  # {layer, head}: hits of one query head in audited steps
Z = 1.959963984540054  # 97.5th percentile of the normal distribution
# 1 - (a sum of probabilities, each rounded to float32) is known to about this.
REST = 1e-7
KL_FLOOR = 1e-6  # what `kl` is known to, for log-probabilities rounded to float32

Samples = Iterable[tuple[str, dict[str, str], float]]


def wilson(mean: float, count: int) -> tuple[float, float]:
    """95 % interval of a mean of `count` scores between 0 and 1.

    Wilson's, as if each score were 0 or 1; scores in between vary less, so it is never too narrow for
    their variance.
    """
    centre, spread = mean + Z * Z / (2 * count), Z * math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
    scale = 1 + Z * Z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_interval(differences: Sequence[float], seed: int = 0, resamples: int = 4000) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences, by percentile bootstrap.

    None where all are equal: such a sample tells nothing about their spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if (values == values[0]).all():
        return None
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs, an end counted as a difference; None where all are equal."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def kl(exact_ids, exact_logprobs, ids, logprobs, vocabulary: int) -> np.ndarray:
    """KL(exact || other) of the next token in nats, `[T]` float64, one value for each of T steps.

    The four arrays are `[T, K]`: token ids (repetitions allowed) and their natural log-probabilities.
    Where a step lists the whole vocabulary in both, this is the KL divergence. Else it is that of the
    tokens both list and one bucket for all others, which is a lower bound (to 1e-6): merging outcomes
    never adds divergence.
    """
    steps = zip(exact_ids, exact_logprobs, ids, logprobs, strict=True)
    return np.array([_kl_step(*step, vocabulary) for step in steps], dtype=np.float64)


def _kl_step(exact_ids, exact_logprobs, ids, logprobs, vocabulary: int) -> float:
    exact_ids, at_exact = np.unique(exact_ids, return_index=True)
    ids, at = np.unique(ids, return_index=True)
    common, i, j = np.intersect1d(exact_ids, ids, assume_unique=True, return_indices=True)
    p, q = (
        np.asarray(exact_logprobs, dtype=np.float64)[at_exact[i]],
        np.asarray(logprobs, dtype=np.float64)[at[j]],
    )
    seen = np.isfinite(p)
    total = float((np.exp(p[seen]) * (p[seen] - q[seen])).sum())
    if len(common) < vocabulary:
        p_rest, q_rest = (max(1.0 - float(np.exp(x).sum()), REST) for x in (p, q))
        total += p_rest * math.log(p_rest / q_rest)
    return max(total, 0.0)  # rounding


def best(ids, logprobs) -> np.ndarray:
    """The likeliest token of each step, `[T]`; arrays as in `kl`."""
    return np.asarray(ids)[np.arange(len(ids)), np.asarray(logprobs).argmax(1)]


def quantiles(values: Sequence[float], at: Sequence[float]) -> dict[str, float]:
    """{"p50": ...} for each percentage in `at`, interpolated linearly; empty for no values."""
    return {f"p{q:g}": float(np.percentile(values, q)) for q in at} if len(values) else {}


def pooled(samples: Samples, name: str) -> list[list]:
    """The histogram `name` over all layers: [upper edge, count] pairs, the last edge None. Empty where nothing was counted."""
    from vllm_mac.metrics import histograms

    found = list(histograms(samples, name).values())
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in found), strict=True)]
    return [list(pair) for pair in zip([*found[0].edges, None], counts, strict=True)] if any(counts) else []


def layers(samples: Samples) -> dict[str, dict]:
    """For each layer, in the model's order: heads hit, KV tokens read, and what audits counted.

    hit_rate: over all heads decoded; read_share: over what full attention reads. Where hits were audited,
    error_p50, error_p95, error_p99: their relative error, None where it is above all edges; head_hit_rates:
    the hit rate of each query head, as exact as the audited share is large.
    """
    from vllm_mac.metrics import ERROR, HEADS, KV_TOKENS, histograms, summarise

    samples = list(samples)
    errors = histograms(samples, ERROR)
    names: dict[str, list] = {}
    hits: dict[str, dict[int, float]] = {}
    for sample in samples:
        if sample[0] in (HEADS, KV_TOKENS):
            names.setdefault(sample[1]["layer"], []).append(sample)
        elif sample[0] == HEAD_HITS:
            own, head = hits.setdefault(sample[1]["layer"], {}), int(sample[1]["head"])
            own[head] = own.get(head, 0) + sample[2]
    found = {}
    for name, some in names.items():
        summary = summarise(some)
        found[name] = {"hit_rate": summary.hit_rate, "read_share": summary.read_share}
        if name in errors and any(errors[name].counts):
            at = {q: errors[name].quantile(q / 100) for q in (50, 95, 99)}
            found[name] |= {f"error_p{q}": None if math.isinf(value) else value for q, value in at.items()}
        if total := sum(hits.get(name, {}).values()):
            # A layer's hits, shared out among its heads as audits saw them.
            scale = summary.hit_rate * len(hits[name]) / total
            found[name]["head_hit_rates"] = [scale * hits[name][head] for head in sorted(hits[name])]
    return found
