"""Statistics of answers, log-probabilities and counters. Shares and scores are between 0 and 1."""

import math
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import numpy as np

HEAD_HITS = "vllm_mac_audited_head_hits_total"  # {layer, head}: hits of one query head in audited steps
Z = 1.959963984540054  # 97.5th percentile of the normal distribution
# The precision of 1 - (a sum of probabilities, each rounded to float32).
REST = 1e-7
KL_FLOOR = 1e-6  # the precision of `kl`, for log-probabilities rounded to float32

Samples = Iterable[tuple[str, dict[str, str], int]]


def wilson(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a mean of `count` scores between 0 and 1.

    The formula is for scores of 0 or 1. Scores in between vary less, so the interval is wide enough for them.
    """
    centre, spread = mean + Z * Z / (2 * count), Z * math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
    scale = 1 + Z * Z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def paired_interval(differences: Sequence[float], seed: int = 0, resamples: int = 4000) -> tuple[float, float] | None:
    """95 % interval of the mean of paired differences, by percentile bootstrap.

    None where all are equal: such a sample does not show their spread.
    """
    values = np.asarray(differences, dtype=np.float64)
    if (values == values[0]).all():
        return None
    picks = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.percentile(values[picks].mean(1), (2.5, 97.5))
    return float(low), float(high)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that differs; None where all are equal. An end counts as a difference."""
    return next((i for i, (x, y) in enumerate(zip_longest(a, b)) if x != y), None)


def kl(exact_ids, exact_logprobs, ids, logprobs, vocabulary: int) -> np.ndarray:
    """KL(exact || other) of the next token in nats, `[T]` float64, one value for each of T steps.

    The four arrays are `[T, K]`: token ids (repetitions allowed) and their natural log-probabilities. Where both list
    the whole vocabulary, this is the KL divergence. Else it is the divergence over the tokens that both list and one
    bucket for all others. That is a lower bound (to 1e-6): merging outcomes never adds divergence.
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
    """The histogram `name` over all layers: [upper edge, count] pairs, the last edge None. Empty without counts."""
    from vllm_mac.metrics import histograms

    found = list(histograms(samples, name).values())
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in found), strict=True)]
    return [list(pair) for pair in zip([*found[0].edges, None], counts, strict=True)] if any(counts) else []


def layers(samples: Samples) -> dict[str, dict]:
    """For each layer, in the model's order: heads hit, KV tokens read, and the results of audits.

    hit_rate: share of all heads decoded. read_share: share of the tokens that full attention reads. Where hits were
    audited, error_p50, error_p95, error_p99: their relative error, None above the last edge; head_hit_rates: the hit
    rate of each query head, estimated from the audited steps.
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
    found: dict[str, dict] = {}
    for name, some in names.items():
        summary = summarise(some)
        found[name] = {"hit_rate": summary.hit_rate, "read_share": summary.read_share}
        if name in errors and any(errors[name].counts):
            for q in (50, 95, 99):
                value = errors[name].quantile(q / 100)
                found[name][f"error_p{q}"] = None if value is None or math.isinf(value) else value
        total = sum(hits.get(name, {}).values())
        if total and summary.hit_rate is not None:
            # The layer's hit rate, divided among its heads in proportion to their audited hits.
            scale = summary.hit_rate * len(hits[name]) / total
            found[name]["head_hit_rates"] = [scale * hits[name][head] for head in sorted(hits[name])]
    return found
