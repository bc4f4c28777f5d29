"""Figures of `vllm-mac eval`: intervals, divergence, counters."""

import random

import numpy as np
import pytest

from vllm_mac.tools.eval import (
    statistics,
)


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    cases = {(81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605), (0, 20): (0, 0.1611), (1, 29): (0.0061, 0.1718)}
    for (hits, count), interval in cases.items():
        assert statistics.wilson(hits / count, count) == pytest.approx(interval, abs=5e-5)
    assert statistics.wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def test_paired_interval():
    draw = random.Random(0)
    values = [draw.gauss(0.1, 0.2) for _ in range(400)]
    low, high = statistics.paired_interval(values)
    mean, error = np.mean(values), np.std(values) / 20
    # 4000 resamples place a percentile to about 4 % of the standard error.
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.15 * error)
    assert statistics.paired_interval([0.0] * 9) is None and statistics.paired_interval([0.5]) is None


@pytest.mark.parametrize(
    "a, b, position", [([], [], None), ([1, 2], [1, 2], None), ([1, 2], [1, 3], 1), ([1, 2], [1], 1), ([], [4], 0)]
)
def test_first_difference(a, b, position):
    assert statistics.first_difference(a, b) == statistics.first_difference(b, a) == position


def distributions(steps=5, vocabulary=300, scale=3.0, seed=0):
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, scale, (2, steps, vocabulary))
    logits[1] = logits[0] + 0.3 * (logits[1] - logits[0])
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def listed(logprobs, count, draw):
    """The likeliest tokens of each step in random order, one of them twice, as engines give them."""
    ids = np.argsort(-logprobs, 1)[:, :count]
    ids = np.stack([draw.permutation(row) for row in ids])
    ids = np.concatenate([ids[:, -1:], ids], 1)
    return ids.astype(np.int32), np.take_along_axis(logprobs, ids, 1).astype(np.float32)


def test_kl_of_whole_vocabularies_is_the_definition():
    p, q = distributions()
    draw = np.random.default_rng(1)
    got = statistics.kl(*listed(p, 300, draw), *listed(q, 300, draw), 300)
    wanted = (np.exp(p) * (p - q)).sum(1)
    # Log-probabilities of up to 32 in size, rounded to float32, on both sides.
    np.testing.assert_allclose(got, wanted, atol=2 * 32 * 2**-24, rtol=0)
    assert wanted.min() > 0.01


@pytest.mark.parametrize("count", [1, 10, 100])
def test_kl_of_the_likeliest_tokens_is_that_of_the_merged_distributions(count):
    p, q = distributions()
    draw = np.random.default_rng(1)
    got = statistics.kl(*listed(p, count, draw), *listed(q, count, draw), 300)
    whole = (np.exp(p) * (p - q)).sum(1)
    for step, value in enumerate(got):
        both = sorted(set(np.argsort(-p[step])[:count]) & set(np.argsort(-q[step])[:count]))
        merged = [np.append(np.exp(x[step][both]), 1 - np.exp(x[step][both]).sum()) for x in (p, q)]
        assert value == pytest.approx((merged[0] * np.log(merged[0] / merged[1])).sum(), abs=1e-5)
    assert (got <= whole + 1e-6).all()
    assert count < 100 or (got > 0.5 * whole).all()


def test_kl_of_equal_distributions_is_zero():
    (p, _), draw = distributions(), np.random.default_rng(1)
    for count in (300, 20):
        ids, logprobs = listed(p, count, draw)
        assert not statistics.kl(ids, logprobs, ids, logprobs, 300).any()
    assert (statistics.best(ids, logprobs) == p.argmax(1)).all()


def counters(layer, hit, miss, read, skipped, errors=()):
    samples = [("vllm_mac_heads_total", {"layer": layer, "outcome": k}, v) for k, v in (("hit", hit), ("miss", miss))]
    samples += [
        ("vllm_mac_kv_tokens_total", {"layer": layer, "kind": k}, v) for k, v in (("read", read), ("skipped", skipped))
    ]
    return samples + [("vllm_mac_error_bucket", {"layer": layer, "le": le}, n) for le, n in errors]


def test_figures_by_layer():
    samples = counters("a", 3, 1, 10, 30, [("0.1", 50), ("0.2", 90), ("+Inf", 100)]) + counters("b", 0, 0, 0, 0)
    samples += counters("a", 1, 3, 30, 10, [("0.1", 50), ("0.2", 90), ("+Inf", 100)])  # a second worker
    samples += [
        (statistics.HEAD_HITS, {"layer": "a", "head": head}, count) for head, count in (("0", 1), ("1", 3), ("1", 0))
    ]
    found = statistics.layers(samples)
    assert list(found) == ["a", "b"] and found["b"] == {"hit_rate": None, "read_share": None}
    assert found["a"] == {
        "hit_rate": 0.5, "read_share": 0.5, "error_p50": pytest.approx(0.1), "error_p95": None, "error_p99": None,
        "head_hit_rates": [0.25, 0.75],
    }  # fmt: skip
    assert statistics.pooled(samples, "vllm_mac_error") == [[0.1, 100], [0.2, 80], [None, 20]]
    assert statistics.pooled(samples, "vllm_mac_lag") == []
