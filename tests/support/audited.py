"""A decoder's steps with and without an audit, beside the reference."""

import math
from bisect import bisect_left

import torch

from support.devices import DEVICE
from support.hit_batches import Batch, Case, config
from vllm_mac import audit, reference
from vllm_mac.audit import COUNT_EDGES, ERROR_EDGES


def histogram(edges, values) -> list[int]:
    """What the definition says: bucket i counts `edges[i-1] < value <= edges[i]`, NaN is above."""
    counts = [0] * (len(edges) + 1)
    for value in values:
        counts[len(edges) if math.isnan(value) else bisect_left(edges, value)] += 1
    return counts


def close(edges, got, values, off: float) -> None:
    """`got` is a histogram of errors `values`, where exact and reused results are off by `off` at most."""
    assert sum(got) == len(values) > 0
    for i, edge in enumerate(edges):
        fewest, most = (sum(value + sign * off * (1 + value) <= edge for value in values) for sign in (1, -1))
        assert fewest <= sum(got[: i + 1]) <= most, (edge, fewest, got, most)


# The decoder of GPUs


class Stepper:
    """A decoder of one batch of `hit_batches`, whose rings are as new before each step."""

    def __init__(self, case: Case, dtype_error: float, **changes):
        self.settings = config(audit=0.5, miss_engine="triton", **changes)
        self.batch = batch = Batch(case, self.settings, DEVICE)
        self.off = dtype_error
        self.decoder = batch.decoder(max_rows=len(case.lengths) + 2)
        self.decoder._auditor._out.fill_(torch.nan)
        self.names = ("query", "out", "lse", "chain")
        self.before = [getattr(batch.store, name).clone() for name in self.names]
        self.counts = audit.histograms(case.kv_heads * case.group, DEVICE)
        self.rows = self.decoder.rows(batch.table)

    def decode(self) -> None:
        b = self.batch
        self.decoder.decode(b.layer(audited=self.counts), self.rows, b.query, b.kv, b.out)

    def step(self, audited: bool, run=None):
        """One step, by `decode` or by `run`: output and histograms."""
        for name, saved in zip(self.names, self.before, strict=True):
            getattr(self.batch.store, name).copy_(saved)
        self.batch.out.fill_(torch.nan)
        self.counts.zero_()
        self.decoder.begin_step(self.rows, self.batch.kv, audited)
        (run or self.decode)()
        return self.batch.out.cpu().clone(), self.counts.cpu().clone()

    def expected(self, out):
        """Errors of each head, lags and chain lengths, from the reference and the output, which is checked."""
        batch, case = self.batch, self.batch.case
        for name, saved in zip(self.names, self.before, strict=True):
            getattr(batch.store, name).copy_(saved)
        steps, entries = batch.oracle()
        errors, lags, chains = [[] for _ in range(case.kv_heads * case.group)], [], []
        for (i, k), step in steps.items():
            mine = out[i, k * case.group : (k + 1) * case.group].double()
            assert (mine - step.out).norm() <= self.off * step.out.norm()
            key, value = batch.tokens[i][k].double().chunk(2, -1)
            for j in range(case.group if step.hit else 0):
                h = k * case.group + j
                query = batch.query[i, h].cpu().double()
                true = reference.attend(query, key, value, 0, case.lengths[i], batch.scale).out
                errors[h].append(float((out[i, h].double() - true).norm() / true.norm()))
                lags.append(case.lengths[i] - 1 - step.source[j])
                chains.append(entries[i, k][j].chain)
        return errors, lags, chains

    def check(self, run=None):
        plain, nothing = self.step(False, run)
        assert not nothing.any()
        out, counts = self.step(True, run)
        # Audits change no bit of the output.
        torch.testing.assert_close(out, plain, rtol=0, atol=0, equal_nan=True)
        errors, lags, chains = self.expected(out)
        assert len(lags) >= 4
        for got, one in zip(counts[:-2].tolist(), errors, strict=True):
            if one:
                close(ERROR_EDGES, got, one, self.off)
            else:
                assert not any(got)
        assert counts[-2].tolist() == histogram(COUNT_EDGES, lags)
        assert counts[-1].tolist() == histogram(COUNT_EDGES, chains)
        again, nothing = self.step(False, run)
        assert not nothing.any()
        torch.testing.assert_close(again, plain, rtol=0, atol=0, equal_nan=True)
