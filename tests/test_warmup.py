"""What is compiled before serving is what serving launches, and compiling leaves no trace.

Triton's own binder tells the variant of every launch, on any machine: `Variants` asks it for a GPU
of sm90 and launches nothing. So a kernel that comes to depend on something else fails here.
"""

import dataclasses
import os
import random
from types import SimpleNamespace

import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction, create_function_from_signature

from support.decoders import fill_plans, make
from support.devices import DEVICE
from support.tritons import compiles
from vllm_mac import warmup
from vllm_mac.decoder import Decoder
from vllm_mac.kernels import exact, hit
from vllm_mac.kernels.assign import assign
from vllm_mac.kernels.record import record_prefill
from vllm_mac.kernels.workspace import Workspace
from vllm_mac.ring import RingTable
from vllm_mac.rope import Rotary
from vllm_mac.state import Geometry, Seeds

BACKEND = CUDABackend(GPUTarget("cuda", 90, 32))


class Variants:
    """In place of a kernel: notes the variant of each launch."""

    def __init__(self, kernel, found: set):
        names = ("do_not_specialize", "do_not_specialize_on_alignment")
        kept = getattr(kernel, "kwargs", None) or {name: getattr(kernel, name) for name in names}
        function = JITFunction(kernel.fn, **{name: kept[name] for name in names})
        self.name, self.found = kernel.fn.__name__, found
        self.params = function.params
        self.bind = create_function_from_signature(function.signature, function.params, BACKEND)

    def warmup(self, *args, **kwargs):
        """Compiles nothing, so that nobody can find fault with it."""

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            _, specialization, options = self.bind(*args, **kwargs)
            self.found.add((self.name, str(specialization), str(sorted(options.items()))))

        return launch


@pytest.fixture
def variants(monkeypatch):
    found = set()
    allocate = Workspace.allocate.__func__
    as_h200 = lambda *args, **more: dataclasses.replace(allocate(*args, **more), slots=396, pdl=True)
    monkeypatch.setattr(Workspace, "allocate", classmethod(as_h200))
    for module, name in warmup.KERNELS:
        monkeypatch.setattr(module, name, Variants(getattr(module, name), found))
    return found


def caches(geometry: Geometry):
    """KV caches in every layout that vLLM has."""
    p = geometry
    for order in ((0, 1, 2, 3, 4), (0, 1, 3, 2, 4), (0, 2, 1, 3, 4), (1, 0, 2, 3, 4), (1, 0, 3, 2, 4), (1, 2, 0, 3, 4)):
        sizes = (3, 5, p.kv_heads, p.page_size, 2 * p.head_size)
        pool = torch.empty([sizes[i] for i in order], dtype=p.dtype, device=DEVICE)
        yield pool.permute([order.index(i) for i in range(5)])[1]


def serve(decoder: Decoder, layers, table: RingTable) -> None:
    """Batches of all kinds that vLLM makes, given to the kernels as `cuda` gives them."""
    p, draw = decoder.geometry, random.Random(0)
    ints = lambda *size: torch.zeros(size, dtype=torch.int32, device=DEVICE)
    qkv = torch.zeros(600, (p.heads + 2 * p.kv_heads) * p.head_size, dtype=p.dtype, device=DEVICE)
    out = torch.zeros(600, p.heads, p.head_size, dtype=p.dtype, device=DEVICE)
    tables = [ints(p.max_rows, columns) for columns in (1, 37, 64)]
    for rows in range(1, p.max_rows + 1):
        for kv in caches(p):
            blocks = tables[draw.randrange(3)]
            query = draw.choice([qkv[:, : p.heads * p.head_size], out.flatten(1)]).view(600, p.heads, p.head_size)
            held = decoder.rows(blocks[:rows])
            decoder.begin_step(held, kv, audited=bool(layers[0].config.audit) and draw.random() < 0.5)
            for layer in layers:
                decoder.decode(layer, held, query[:rows], kv, out[:rows])
            tokens = draw.randrange(1, 40)
            seeds = Seeds(*ints(3, tokens), decoder.ring, blocks)
            for layer in layers:
                lse = torch.zeros(tokens, p.heads, device=DEVICE)
                record_prefill(layer, seeds, query, kv, out[:tokens], lse, p.scale)
            assign(
                table, ints(p.max_rows + 1)[: rows + 1], ints(rows), ints(rows), ints(rows),
                decoder.position, decoder.ring, decoder.first,
            )  # fmt: skip


LLAMA = dict(rows=70, heads=32, kv_heads=8, d=128, dtype=torch.bfloat16, window=512, band=256, min_context=2048)


@pytest.mark.parametrize("sizes", [
    {}, {"kv_heads": 1, "heads": 4}, {"audit": 0.1, "error_budget": 0.3, "ring_dtype": "float8_e4m3fn"},
    {"sink": 5, "reuse": "chained", "distance": "relative", "dtype": torch.bfloat16}, LLAMA,
])  # fmt: skip
def test_serving_launches_what_was_compiled(variants, sizes):
    decoder, layers, table = make(**sizes)
    warmup.warm_up(decoder, layers, table)
    compiled = set(variants)
    variants.clear()
    serve(decoder, layers, table)
    count = lambda name, found=compiled: sum(x[0] == name for x in found)
    assert variants == compiled, {
        name: (count(name), count(name, variants)) for name in {x[0] for x in variants ^ compiled}
    }
    # Several variants of what depends on the rows, and one of what does not, for each kind of layer.
    assert count("hit_kernel") >= (20 if sizes is LLAMA else 4) and count("prefix_kernel") > 1
    assert count("_record_kernel") == 4 and count("_assign_kernel") == 1
    assert count("_tally_kernel") == int("audit" in sizes)


class Looked(Variants):
    """In place of a kernel whose threads keep nothing in memory: notes which variants it is asked about and launched in."""

    def __init__(self, kernel, asked: list, launched: list):
        super().__init__(kernel, set())
        self.asked, self.launched = asked, launched

    def variant(self, *args, **kwargs) -> tuple:
        _, specialization, options = self.bind(*args, **kwargs)
        return self.name, str(specialization), str(sorted(options.items()))

    def warmup(self, *args, grid, **kwargs):
        self.asked.append(self.variant(*args, **kwargs))
        return SimpleNamespace(_init_handles=lambda: None, n_spills=0)

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.variant(*args, **kwargs))


# What may change between two launches, from either side of it.
CHANGES = {
    "reuse": ("anchored", "chained"), "mass_floor": (None, 0.2), "lag_weight": (0.0, 1.0), "max_chain": (None, 2),
    "distance": ("absolute", "relative"), "threshold": (0.5, 0.7), "min_context": (64, 80), "sink": (0, 5), "band": (24, 16),
}  # fmt: skip


@pytest.mark.parametrize("changed", [
    *CHANGES, "calibrated", "rows", "rotation", "strides", "alignment", "layout", "paused", "ring dtype",
])  # fmt: skip
def test_no_variant_is_launched_that_nobody_looked_at(changed, monkeypatch):
    """Before a variant is launched it is seen that none of its threads keeps registers in memory, once."""
    asked, launched = [], []
    for module, name in ((hit, "hit_kernel"), (exact, "prefix_kernel")):
        monkeypatch.setattr(module, name, Looked(getattr(module, name), asked, launched))
    allocate = Workspace.allocate.__func__
    as_h200 = lambda *args, **more: dataclasses.replace(allocate(*args, **more), slots=396)
    monkeypatch.setattr(Workspace, "allocate", classmethod(as_h200))
    decoder, layers, _ = make()
    p, layer = decoder.geometry, layers[0]
    kvs = list(caches(p))
    query = torch.zeros(p.max_rows, p.heads, p.head_size, dtype=p.dtype, device=DEVICE)
    table = torch.zeros(p.max_rows, 8, dtype=torch.int32, device=DEVICE)
    wide = torch.zeros(p.max_rows, p.heads + 1, p.head_size + 1, dtype=p.dtype, device=DEVICE)
    paused = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    config = layer.config
    plain = dict(layer=layer, rows=decoder.rows(table), query=query, kv=kvs[0], out=torch.zeros_like(query))
    with_rows = lambda n: plain | {"rows": decoder.rows(table[:n]), "query": query[:n], "out": plain["out"][:n]}
    with_layer = lambda **keys: plain | {"layer": dataclasses.replace(layer, **keys)}
    first, other = {
        "calibrated": [with_layer(config=config.model_copy(update=keys)) for keys in (
            {"reuse": "anchored", "mass_floor": 0.2, "lag_weight": 0.0},
            {"reuse": "chained", "mass_floor": None, "lag_weight": 0.5},
        )],
        "rows": [with_rows(1), plain],
        "rotation": [plain, with_layer(rotary=layers[2].rotary)],
        "strides": [plain, plain | {"query": wide[:, : p.heads, : p.head_size]}],
        "alignment": [plain, plain | {"query": wide.flatten()[1 : 1 + query.numel()].view_as(query)}],
        "layout": [plain, plain | {"kv": kvs[2]}],
        "paused": [plain, with_layer(paused=paused)],
        "ring dtype": [plain, with_layer(store=dataclasses.replace(layer.store, query=layer.store.query.float()))],
    }.get(changed) or [with_layer(config=config.model_copy(update={changed: value})) for value in CHANGES[changed]]  # fmt: skip
    decoder.decode(**first), decoder.decode(**other)
    assert set(launched) <= set(asked)
    # The limit of a distance is an argument; a layout's strides are multiples of 16 like another's.
    assert (len(set(launched)) > 2) == (changed not in ("threshold", "layout"))
    asked.clear()
    decoder.decode(**first), decoder.decode(**other)
    assert not asked, "found before"


@pytest.mark.parametrize("module, name", [(hit, "hit_kernel"), (exact, "prefix_kernel")])
def test_variants_are_told_by_what_triton_tells_them_by(module, name, monkeypatch):
    """So that a new constexpr, or a number that Triton specialises on, cannot be left out of what tells them."""
    kernel, seen = Variants(getattr(module, name), set()), []
    monkeypatch.setattr(module, "launch", lambda *arguments: seen.append(arguments))
    decoder, (layer, *_), _ = make()
    g = decoder.geometry
    query = torch.zeros(1, g.heads, g.head_size, dtype=g.dtype, device=DEVICE)
    rows, kv = decoder.rows(torch.zeros(1, 8, dtype=torch.int32, device=DEVICE)), next(caches(g))
    for rotary in (layer.rotary, Rotary(None)):
        decoder.decode(dataclasses.replace(layer, rotary=rotary), rows, query, kv, query)
    for _, _, pointers, sizes, others, constants, options, _ in seen:
        for option in options:
            assert option.keys() == options[0].keys()
        for param in kernel.params:
            value = others.get(param.name)
            if param.is_constexpr:
                assert param.name in (constants | options[0])
            elif isinstance(value, torch.Tensor):  # nobody else's
                assert any(value is own for owner in (decoder._work, decoder._misses) for own in attributes(owner))
            else:
                assert param.name in (pointers | sizes) or isinstance(value, float) or param.do_not_specialize, (
                    param.name
                )
    assert len(seen) == 2


def attributes(owner) -> list:
    return (
        list(vars(owner).values()) if hasattr(owner, "__dict__") else [getattr(owner, name) for name in owner.__slots__]
    )


def test_every_size_has_few_variants(variants):
    """As many as are worth waiting for."""
    decoder, layers, table = make(**LLAMA | {"rows": 256})
    warmup.warm_up(decoder, layers[:2], table)
    counts = {name: sum(x[0] == name for x in variants) for name in {x[0] for x in variants}}
    print(f"\n{counts}")
    assert counts["hit_kernel"] <= 10 and counts["prefix_kernel"] <= 18 and len(variants) <= 31


def test_flashinfers_plans_have_their_variants(variants):
    """`begin_step` and `attend` of `FlashInferExact` launch these two for so many rows."""
    found = []
    for columns, block_pages, head_pages in ((1, 128, 1), (37, 8, 1), (64, 1, 77)):
        variants.clear()
        fill_plans(70, 8, 264, True, columns, block_pages, head_pages)
        found.append(set(variants))
    assert found[0] == found[1] == found[2] and {x[0] for x in found[0]} == {"_pages_kernel", "_plan_kernel"}


@pytest.mark.parametrize("keys", [{}, {"audit": 0.5, "error_budget": 0.3}])
def test_warming_up_leaves_no_trace(keys):
    decoder, layers, table = make(rows=3, heads=4, columns=12, **keys)
    work, watched = decoder._work, {}
    for field in dataclasses.fields(work):
        value = getattr(work, field.name)
        if isinstance(value, torch.Tensor):
            watched[f"work.{field.name}"] = value
    for i, layer in enumerate(layers):
        watched |= {f"{i}.{field.name}": getattr(layer.store, field.name) for field in dataclasses.fields(layer.store)}
    for name, value in watched.items():
        if name != "work.arrived":
            value.fill_(torch.nan if value.is_floating_point() else 77)
    for i, layer in enumerate(layers):
        layer.counts.add_(torch.arange(len(layer.counts), device=DEVICE))
        watched[f"{i}.counts"] = layer.counts
        if keys:
            layer.audited.add_(5)
            watched |= {f"{i}.audited": layer.audited, f"{i}.paused": layer.paused}
    engines = [decoder._misses] + ([decoder._auditor._exact] if keys else [])
    watched |= {f"arrived {i}": engine._arrived for i, engine in enumerate(engines)}
    watched |= {name: getattr(decoder, name) for name in ("position", "ring", "first", "slack", "spared")}
    before = {name: value.clone().view(torch.uint8) for name, value in watched.items()}
    warmup.warm_up(decoder, layers, table)
    changed = [name for name, value in watched.items() if not torch.equal(value.view(torch.uint8), before[name])]
    assert changed == []
    assert not table.first.any() and not table.last.any(), "a ring was given away"


def test_a_decoder_is_warmed_up_once(variants):
    decoder, layers, table = make(rows=2)
    warmup.warm_up(decoder, layers, table)
    assert variants
    variants.clear()
    warmup.warm_up(decoder, layers, table)
    assert not variants


def test_where_flashinfer_plans_on_the_host_steps_are_left_out(variants, monkeypatch):
    decoder, layers, table = make(rows=2)
    monkeypatch.setattr(Decoder, "plans_on_host", True)
    warmup.warm_up(decoder, layers, table)
    assert {x[0] for x in variants} == {"_record_kernel", "_assign_kernel"}


def test_compilations_are_counted_and_others_still_told():
    from triton import knobs

    told = []
    own = lambda **facts: told.append(facts["cache_hit"])
    knobs.compilation.listener = own
    try:
        with warmup.compilations() as found:
            for there in (True, False):
                knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=there)
        assert found == told == [True, False] and knobs.compilation.listener is own
    finally:
        knobs.compilation.listener = None


class Launched(JITFunction):
    """A kernel of which a launch takes nothing but the registers that its variant keeps in memory."""

    def run(self, *, grid, warmup, n):
        return SimpleNamespace(n_spills=n)


def test_registers_kept_in_memory_are_told(monkeypatch, caplog):
    """Of what is launched: a variant that was found wanting and left is nobody's concern."""

    def steps(*_):
        for n in (0, 22, 5):
            hit.hit_kernel[(1,)](n=n)
        hit.hit_kernel.warmup(grid=(1,), n=99)
        exact.prefix_kernel[(1,)](n=0)

    monkeypatch.setattr(hit, "hit_kernel", Launched(hit.hit_kernel.fn))
    monkeypatch.setattr(exact, "prefix_kernel", Launched(exact.prefix_kernel.fn))
    monkeypatch.setattr(warmup, "KERNELS", ((hit, "hit_kernel"), (exact, "prefix_kernel")))
    for name in ("_assign", "_prefill", "_decode"):
        monkeypatch.setattr(warmup, name, steps if name == "_decode" else lambda *args: None)
    monkeypatch.setattr(Decoder, "all_triton", False)  # no pass that only compiles
    with caplog.at_level("WARNING", "vllm.mac"):
        warmup.warm_up(make(rows=2)[0], [], None)
    (record,) = caplog.records
    assert "8/2 heads of size 64 spill registers, up to 22 a thread in hit_kernel." in record.message
    assert "run" not in vars(hit.hit_kernel), "what watched is gone"


def test_threads_compile_before_anything_is_launched(tmp_path):
    """Every variant of a small server's kernels, for a GPU that is not there: a launch would fail."""
    (found,) = compiles(tmp_path, "-c", THREADS)
    cores = len(os.sched_getaffinity(0))
    assert min(found["ahead"], cores) >= found["threads"] >= min(2, cores)
    # Each once: all but what follows from how many registers a variant turned out to need.
    assert found["ahead"] > 3 and found["variants"] == found["ahead"] + found["more"]
    assert found["registers"] == [[], [168]] and found["more"] > 0


THREADS = """
import contextlib, json, threading
import triton
from support.compiled import Driver
from support.decoders import make
from triton.runtime import driver
from vllm_mac import warmup
from vllm_mac.kernels import launch

driver.set_active(Driver(90))
launch._spills = lambda variant: max(0, 160 - (variant.metadata.maxnreg or 255))  # only a GPU tells
threads, limits = [], []
triton.knobs.compilation.listener = lambda **facts: threads.append(threading.get_ident())
decoder, layers, table = make(rows=9, d=32)

@contextlib.contextmanager
def instead(kernels):
    limits.append(sorted({option["maxnreg"] for option in decoder._work.options.values()}))
    ahead.extend(threads)
    with warmup._running(kernels, warmup._compile):  # in place of launches
        yield {}
    limits.append(sorted({option["maxnreg"] for option in decoder._work.options.values()}))

ahead, warmup.watching = [], instead
warmup.warm_up(decoder, layers[:1], table)
variants = sum(len(getattr(module, name).device_caches[0][0]) for module, name in warmup.KERNELS)
print(json.dumps({
    "variants": variants, "ahead": len(ahead), "more": len(threads) - len(ahead), "threads": len(set(ahead)),
    "registers": limits,
}))
"""
