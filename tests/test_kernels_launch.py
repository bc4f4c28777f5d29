"""How the hit kernel is launched: one variant for all thresholds, as many registers as it needs, any split, in graphs."""

from types import SimpleNamespace

import pytest
import torch

from support.hit_batches import BF16, Batch, Case, config, observed, tune
from vllm_mac.kernels import hit


def test_every_threshold_runs_the_same_kernel(device):
    """Layers with thresholds of their own share one compiled kernel; the bound is an argument."""
    batch = Batch(Case(lengths=(140,)), config(), device)
    launched = []

    class Kernel:
        warmup = staticmethod(lambda **arguments: None)

        def __getitem__(self, _grid):
            return lambda **arguments: launched.append(arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hit, "hit_kernel", Kernel())
        for batch.config.threshold in (0.0, 0.45, 1.0):
            batch.launch()
    first, *others = launched
    for arguments in others:
        differ = [name for name, was in first.items() if arguments[name] is not was and not same(arguments[name], was)]
        assert differ == ["bound"] and arguments.keys() == first.keys()


def same(a, b):
    return not isinstance(a, torch.Tensor) and type(a) is type(b) and a == b


def test_threads_get_the_registers_that_they_need(device, monkeypatch):
    """The fewest of those to choose from under which none is kept in memory; found once for each variant."""
    asked, launched = [], []

    class Kernel:
        @staticmethod
        def warmup(grid, maxnreg, **arguments):
            asked.append((grid, maxnreg))
            return SimpleNamespace(_init_handles=lambda: None, n_spills=needed > maxnreg)

        def __getitem__(self, grid):
            return lambda maxnreg, **arguments: launched.append((grid, maxnreg))

    monkeypatch.setattr(hit, "hit_kernel", Kernel())
    for wanted, needed, tried, taken in (  # noqa: B007 - Kernel reads `needed`
        (128, 120, [128], 128), (128, 160, [128, 168], 168), (128, 200, [128, 168], 255), (168, 400, [168], 255), (None, 99, [], None),
    ):  # fmt: skip
        batch = Batch(Case(lengths=(140, 140)), config(), device)
        batch.work.tune = tune(1, 1, 16, True) | {"registers": wanted}
        asked.clear(), launched.clear()
        batch.launch(), batch.launch()
        assert [limit for _, limit in asked] == tried and [limit for _, limit in launched] == [taken] * 2
        assert {grid for grid, _ in [*asked, *launched]} == {(1 + batch.case.group, batch.case.kv_heads, 2)}


def test_every_split_gives_the_same(device):
    """However the work of a group is split."""
    outs = []
    for splits, bands, small, halves in (
        (1, 1, 16, True),
        (3, 2, 32, False),
        (8, 8, 16, False),
        (2, 4, 64, True),
    ):
        batch = Batch(Case(lengths=(200, 190)), config(window=50, band=70, sink=9, min_context=81), device)
        batch.work.tune = tune(splits, bands, small, halves)
        assert observed(batch.check()) == "mixed"
        outs.append(batch.out)
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "rows, rings, whole", [(r, *x) for r in (1, 3, 64) for x in ((True, False), (True, True), (False, True))]
)
def test_graph_replay(rows, rings, whole, device):
    """A captured step, replayed on restored rings, gives the same, and follows changed inputs; also without rings."""
    lengths = tuple(2100 + 37 * i for i in range(rows))
    settings = config(window=512, band=256, min_context=1024)
    # Without the entry whose slot the step overwrites: a second step would match what it wrote.
    fresh = dict.fromkeys(range(rows), 511)
    batch = Batch(
        Case(lengths, "mixed", 4, 8, 128, 16, BF16, fresh=fresh, ringless=() if rings else range(rows)),
        settings,
        device,
    )
    names = ("query", "out", "lse", "chain")
    before = [getattr(batch.store, name).clone() for name in names]
    prefix = (
        torch.zeros_like(batch.query),
        torch.full(batch.query.shape[:2], -torch.inf, device=device),
    )

    batch.work.whole = whole

    def step():
        batch.launch()
        batch.finish_at_once() if whole else batch.finish(prefix)

    def state():
        torch.cuda.synchronize()
        parts = batch.out, batch.work.hit[:rows], *(getattr(batch.store, name) for name in names)
        return [part.clone() for part in parts]

    step()
    eager = state()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            step()
    for _ in range(3):
        for name, saved in zip(names, before, strict=True):
            getattr(batch.store, name).copy_(saved)
        batch.out.fill_(torch.nan)
        batch.work.hit.fill_(1)
        graph.replay()
        for got, expected in zip(state(), eager, strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    batch.position[-1] = batch.ring[-1] = -1
    batch.out.fill_(torch.nan)
    graph.replay()
    assert batch.out[-1].isnan().all() and not batch.out[:-1].isnan().any()
