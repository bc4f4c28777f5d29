"""The index of keys: where it lies in a page, the maps, the codes, and what they estimate."""

import math

import pytest
import torch

from vllm_mac import capabilities, key_index, lookup
from vllm_mac.key_index import (
    Lessons,
    Maps,
    Moments,
    PageLayout,
    Scales,
    best_maps,
    directions,
    encode,
    estimate,
    learn,
)

BF16, FP32 = torch.bfloat16, torch.float32


def moments(kv_heads: int, size: int, seed: int = 0) -> Moments:
    """Random ones, with directions of very different weight."""
    draw = torch.Generator().manual_seed(seed)
    root = lambda: torch.randn(kv_heads, size, size, generator=draw) * torch.linspace(2, 0.05, size)
    a, b = root(), root()
    return Moments(a @ a.mT / size, b @ b.mT / size, torch.randn(kv_heads, 1, size, generator=draw))


def drawn(found: Moments, count: int, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries `[K, count, D]` and keys `[K, count, D]` with these moments, in the limit."""
    draw = torch.Generator().manual_seed(seed)
    kv_heads, size, _ = found.second.shape
    factor = lambda x: torch.linalg.cholesky(x + 1e-6 * torch.eye(size))
    normal = lambda: torch.randn(kv_heads, count, size, generator=draw)
    return normal() @ factor(found.second).mT, normal() @ factor(found.spread).mT + found.mean


# Where it lies


@pytest.mark.parametrize("head_major", [True, False])
@pytest.mark.parametrize(
    "kv_heads, size, page, n, dtype", [(2, 64, 16, 48, BF16), (3, 80, 32, 32, FP32), (1, 256, 64, 128, BF16)]
)
def test_views_lie_behind_keys_and_values(kv_heads, size, page, n, dtype, head_major):
    layout, item = PageLayout(kv_heads, size, page, n, dtype.itemsize), dtype.itemsize
    assert layout.padded_bytes % 128 == 0
    assert 0 <= layout.padded_bytes - layout.kv_bytes - layout.code_bytes - kv_heads * size * item < 128
    raw = torch.zeros(5, layout.padded_bytes // item, dtype=dtype)
    memory = raw.view(torch.uint8)
    body = raw[:, : layout.kv_bytes // item]
    kv = body.unflatten(1, (kv_heads, page, 2 * size))
    if not head_major:
        kv = body.unflatten(1, (page, kv_heads, 2 * size)).transpose(1, 2)
    for part in (kv, kv[1:4]):  # also a part of the cache
        codes, means = layout.views(part)
        assert codes.shape == (len(part), kv_heads, page, n // 2) and codes.dtype == torch.uint8
        assert means.shape == (len(part), kv_heads, size) and means.dtype == dtype
        raw.zero_()
        codes.fill_(7)
        first = len(kv) - len(part) - (len(part) == 3)
        assert (memory[first : first + len(part), layout.kv_bytes :][:, : layout.code_bytes] == 7).all()
        assert int((memory == 7).sum()) == codes.numel()
        raw.zero_()
        means.fill_(1)
        behind = raw[first : first + len(part)].flatten(1)[:, (layout.kv_bytes + layout.code_bytes) // item :]
        assert (behind[:, : kv_heads * size] == 1).all() and int((raw == 1).sum()) == means.numel()
        assert not kv.any()


@pytest.mark.parametrize("kv_heads, size, page, n", [(2, 64, 16, 48), (3, 80, 32, 32), (1, 256, 64, 128)])
def test_means_of_an_fp8_cache_are_float16(kv_heads, size, page, n):
    """Behind pages of one byte a number, which vLLM has as bytes; float16 holds the largest number of FP8."""
    layout = PageLayout(kv_heads, size, page, n, 1)
    raw = torch.zeros(4, layout.padded_bytes, dtype=torch.uint8)
    kv = key_index.numbers(raw[:, : layout.kv_bytes].unflatten(1, (kv_heads, page, 2 * size)))
    assert kv.dtype == key_index.FP8 and kv.data_ptr() == raw.data_ptr()
    assert key_index.numbers(kv) is kv
    codes, means = layout.views(kv[1:])
    assert means.dtype == torch.float16 and means.shape == (3, kv_heads, size)
    codes.fill_(7)
    means.fill_(torch.finfo(key_index.FP8).max)
    behind = raw[1:, layout.kv_bytes :]
    assert (behind[:, : layout.code_bytes] == 7).all() and not raw[0].any() and not raw[:, : layout.kv_bytes].any()
    of_means = behind[:, layout.code_bytes : layout.index_bytes].contiguous().view(torch.float16)
    assert of_means.shape == (3, kv_heads * size) and (of_means == 448).all()
    assert not raw[:, layout.kv_bytes + layout.index_bytes :].any()
    assert layout.padded_bytes - 128 < layout.kv_bytes + layout.index_bytes <= layout.padded_bytes


@pytest.mark.parametrize("head_major", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16, key_index.FP8])
@pytest.mark.parametrize(
    "size, n, page, several", [(32, 32, 32, 1), (64, 48, 16, 3), (128, 64, 64, 9), (256, 128, 64, 2)]
)
def test_rows_with_room_are_pages_and_their_index(size, n, page, several, dtype, head_major):
    """Of hybrid models: nothing of a page lies in another, and codes and means lie behind keys and values."""
    width, heads, blocks = key_index.content_bytes(size, n, dtype.itemsize, 16) // dtype.itemsize, 2, 3
    shape = (blocks, heads, page * several, width) if head_major else (blocks, page * several, heads, width)
    raw = torch.zeros(shape).to(dtype)
    kv = key_index.rows(raw if head_major else raw.transpose(1, 2), size, page)
    assert kv.shape == (blocks * several, heads, page, 2 * size)
    layout = PageLayout(heads, size, page, n, dtype.itemsize)
    codes, means = layout.views(kv)
    for one in (1, len(kv) - 1):
        raw.view(torch.uint8).zero_()
        kv.view(torch.uint8)[one] = 1
        codes[one], means.view(torch.uint8)[one] = 2, 3
        page_bytes = raw.view(torch.uint8).flatten().view(blocks * several, -1)
        assert [int((page_bytes[one] == x).sum()) for x in (1, 2, 3)] == [
            layout.kv_bytes, layout.code_bytes, layout.index_bytes - layout.code_bytes
        ]  # fmt: skip
        assert not page_bytes[torch.arange(len(kv)) != one].any()
    plain = torch.zeros(blocks, heads, page, 2 * size).to(dtype)
    assert key_index.rows(plain, size) is plain


def test_blocks_that_are_no_pages_are_refused():
    with pytest.raises(ValueError, match=r"^kv: blocks of 100 tokens, .* are no pages of 64$"):
        key_index.rows(torch.zeros(2, 2, 100, 280), 128, 64)
    assert [capabilities.index_page(block, "cuda") for block in (16, 528, 576)] == [16, 16, 64]
    with pytest.raises(
        ValueError, match="^KV blocks of 528 tokens, and rule: index takes multiples of 32, 64, 128, 256$"
    ):
        capabilities.index_page(528, "cpu")


def test_an_fp8_cache_is_indexed_by_its_keys():
    """Codes are of keys, scaled; means are of what the cache holds, and so are scaled when they are read."""
    draw = torch.Generator().manual_seed(7)
    held = (torch.randn(2, 16, 32, generator=draw) * 8).to(key_index.FP8)
    scales = Scales(torch.tensor(0.25), torch.tensor(3.0))
    maps = Maps.allocate(2, 32, 16, FP32, "cpu", scales)
    plain = maps_of(moments(2, 32), 16)
    assert learn([maps], [moments(2, 32)], making=True) == [True]
    codes, mean = encode(held, held, maps)
    want, _ = encode(held.float() * 0.25, held, plain)
    assert torch.equal(codes, want) and torch.equal(mean, held.float().mean(1))
    assert torch.equal(maps.values(mean), mean * 3)
    parts = {"to_key", "to_query", "shift", "mean", "ready"}
    assert maps.own().keys() == parts | {"moments_second", "moments_spread", "moments_mean"}


def test_pages_without_room_are_refused():
    layout = PageLayout(2, 64, 16, 48, 4)
    with pytest.raises(ValueError, match=f"kv: pages {layout.kv_bytes} bytes apart, choose {layout.padded_bytes}"):
        layout.views(torch.zeros(3, 2, 16, 128))


def test_default_directions():
    sizes = {32: 32, 48: 48, 64: 48, 80: 48, 96: 48, 112: 64, 128: 64, 192: 96, 256: 128}
    assert {size: directions(size) for size in sizes} == sizes


# Maps


def captured(found: Moments, key: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """`E[(q . k - (query^T q) . (key^T k))^2]` of each head, for centred keys."""
    lost = torch.eye(key.shape[1]) - query @ key.mT  # q . k - q^T query key^T k
    return torch.einsum("kij,kjl,kml,kmi->k", lost, found.spread, lost, found.second)


@pytest.mark.parametrize("n", [1, 3, 8])
def test_best_maps_lose_least(n):
    """No maps of rank `n` estimate `q . k` better: not random ones, nor those that gradient descent finds."""
    found = moments(2, 12)
    key, query = (x[..., :n] for x in best_maps(found))
    loss = captured(found, key, query)
    draw = torch.Generator().manual_seed(2)
    for _ in range(20):
        random = torch.linalg.qr(torch.randn(2, 12, n, generator=draw))[0]
        assert (captured(found, random, random) > loss).all()
    near = [
        (x + 0.05 * x.std() * torch.randn(x.shape, generator=draw)).contiguous().requires_grad_() for x in (key, query)
    ]
    solver = torch.optim.LBFGS(near, max_iter=500, line_search_fn="strong_wolfe", tolerance_change=1e-12)

    def step():
        solver.zero_grad()
        total = captured(found, *near).sum()
        total.backward()
        return total

    solver.step(step)
    # `best_maps` adds a ten-thousandth to the queries' moment, which may cost as much.
    whole = torch.einsum("kij,kji->k", found.spread, found.second)
    assert (loss <= captured(found, *near).detach() + 2e-4 * whole).all()


def test_maps_of_full_rank_lose_nothing():
    found = moments(2, 16)
    key, query = best_maps(found)
    assert (query @ key.mT - torch.eye(16)).abs().max() < 1e-3


def maps_of(found: Moments, n: int, dtype=FP32) -> Maps:
    maps = Maps.allocate(*found.second.shape[:2], n, dtype, "cpu")
    assert not maps.ready.any()
    assert learn([maps], [found], making=True) == [True]
    return maps


def test_learn_writes_in_place():
    """Captured graphs and vLLM's sleep know the tensors by their addresses."""
    maps = Maps.allocate(2, 32, 16, BF16, "cpu")
    before = [tensor.data_ptr() for tensor in maps.own().values()]
    learn([maps], [moments(2, 32)], making=True)
    assert [tensor.data_ptr() for tensor in maps.own().values()] == before
    assert maps.ready.tolist() == [1] and maps.ready.dtype == torch.int32
    assert maps.to_key.dtype == maps.to_query.dtype == BF16 and maps.shift.dtype == maps.mean.dtype == FP32
    assert all(tensor.isfinite().all() for tensor in maps.own().values())


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float16])
def test_codes_use_their_levels(dtype):
    """The mean key lies in the middle; few keys lie beyond the ends; a direction without spread is finite."""
    found = moments(2, 32)
    found.spread[:, :, 5], found.spread[:, 5] = 0, 0
    _, key = drawn(found, 4096)
    maps = maps_of(found, 32, dtype)
    codes, _ = encode(key, key, maps)
    code = torch.cat((codes & 15, codes >> 4), 2).float()
    wide = code.std(1) > 2
    assert wide.float().mean() > 0.9
    # Of a Gaussian 2.8 deviations are beyond for 1 in 200, and the last level begins 2.4 from the mean.
    assert ((code == 0) | (code == 15)).float().mean((0, 1)).max() < 0.03
    assert ((code.mean(1) - 7.5).abs() < 0.3)[wide].all()


# Codes and estimates


def test_encode_packs_two_halves_and_averages_values():
    draw = torch.Generator().manual_seed(3)
    key, value = (torch.randn(2, 16, 32, generator=draw) for _ in range(2))
    maps = maps_of(moments(2, 32), 16)
    codes, mean = encode(key, value, maps)
    place = key.double() @ maps.to_key.double() - maps.shift.double()[:, None]
    want = place.floor().clamp(0, 15).int()
    sure = (place - place.round()).abs() > 1e-4
    assert sure.float().mean() > 0.99 and codes.shape == (2, 16, 8)
    low, high = (codes & 15).int(), (codes >> 4).int()
    assert (low == want[..., :8])[sure[..., :8]].all() and (high == want[..., 8:])[sure[..., 8:]].all()
    assert (mean.double() - value.double().mean(1)).abs().max() < 1e-6


def test_free_slots_that_are_no_number_have_a_code():
    key = torch.full((1, 16, 32), math.nan)
    key[:, :5] = 1
    key[:, 5] = math.inf
    codes, mean = encode(key, key, maps_of(moments(1, 32), 16))
    assert (codes[:, 6:] == 0).all() and mean.isnan().all()


def errors(n: int, found: Moments) -> float:
    query, key = drawn(found, 256)
    maps = maps_of(found, n)
    got = estimate(query, encode(key, key, maps)[0], maps)
    return float((got - query @ key.mT).square().mean().sqrt() / (query @ key.mT).std())


def test_the_error_falls_with_directions():
    error = [errors(n, moments(2, 64)) for n in (16, 32, 48, 64)]
    assert error == sorted(error, reverse=True) and error[-1] < error[0] / 2 and error[-1] < 0.15


def test_estimates_of_all_directions_are_off_by_half_steps_at_most():
    """Where no code is clamped, each direction is off by half a level, so `q . k` by half the sum of `|to_query^T q|`."""
    found = moments(2, 32)
    query, key = drawn(found, 512)
    maps = maps_of(found, 32)
    place = key.double() @ maps.to_key.double() - maps.shift.double()[:, None]
    inside = ((place >= 0) & (place < 16)).all(2)
    assert inside.float().mean() > 0.5
    off = (estimate(query, encode(key, key, maps)[0], maps) - query @ key.mT).abs()
    # On top of it the maps are inverse to each other but for float32's rounding, which their condition magnifies.
    size = query.norm(dim=2)[..., None] * key.norm(dim=2)[:, None]
    bound = 0.5 * (query @ maps.to_query).abs().sum(2)[..., None] + 1e-3 * size
    assert (off <= bound)[inside[:, None].expand_as(off)].all()
    assert off.max() > 0.05 * bound.max()  # it is not loose by orders


# Learning


def test_layers_that_learn_together_learn_as_each_alone(monkeypatch):
    """Also where their maps are made a few at a time, and one of them cannot have any."""
    found = [moments(2, 32, seed) for seed in range(5)]
    found[3].spread[1, 0, 0] = math.inf
    alone = [Maps.allocate(2, 32, 16, BF16, "cpu") for _ in found]
    together = [Maps.allocate(2, 32, 16, BF16, "cpu") for _ in found]
    monkeypatch.setattr(key_index, "AT_ONCE", 2 * 2 * 32 * 32 + 1)
    for making in (False, True):
        said = learn(together, found, making)
        assert said == [learn([maps], [one], making)[0] for maps, one in zip(alone, found, strict=True)]
        assert said == [True, True, True, False, True]
        assert [int(maps.ready) for maps in together] == [making and one for one in said]
        for maps, same in zip(together, alone, strict=True):
            assert all(torch.equal(tensor, same.own()[name]) for name, tensor in maps.own().items())
    assert not any(tensor.any() for tensor in together[3].own().values())


@pytest.mark.gpu
def test_maps_made_on_a_gpu_lose_as_much_as_those_made_on_a_cpu():
    """Their eigenvectors are found by several threads."""
    found, threads = moments(19, 64), torch.get_num_threads()
    there = Moments(*(tensor.cuda() for tensor in found.tensors()))
    lost = [captured(found, *(x.cpu()[..., :48] for x in best_maps(one))) for one in (found, there)]
    torch.testing.assert_close(lost[1], lost[0], rtol=1e-3, atol=0)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("length, every", [(133, 1), (512, 1), (2048, 4), (9000, 16)])
def test_a_row_is_sampled(length, every):
    """Of its keys every 16th, of a short one 512; of the queries the last 512 and every 16th: as if moments were given."""
    draw = torch.Generator().manual_seed(4)
    blocks = torch.randperm(length // 32 + 3, generator=draw)[: length // 32 + 1].int()
    kv = torch.full((length // 32 + 3, 2, 32, 128), math.nan)
    key = torch.randn(2, length, 64, generator=draw)
    for t in range(length):
        kv[blocks[t // 32], :, t % 32, :64] = key[:, t]
    query = torch.randn(100, 6, 64, generator=draw)
    maps = Maps.allocate(2, 64, 48, FP32, "cpu")
    found = key_index.moments_of(maps, query, kv, key_index.sampled_keys(blocks, length, 32))
    want = Moments.of(torch.cat((query, query[::16])), key[:, ::every])
    assert all(torch.equal(one, same) for one, same in zip(found.tensors(), want.tensors(), strict=True))
    assert len(key_index.sampled_queries(torch.zeros(1000, 1, 1))) == 512 + 63


def test_maps_of_an_fp8_cache_are_learned_from_its_keys():
    """And not from what it holds."""
    draw = torch.Generator().manual_seed(8)
    kv = (torch.randn(4, 2, 16, 64, generator=draw) * 16).to(key_index.FP8)
    query, blocks = torch.randn(80, 4, 32, generator=draw), torch.tensor([3, 1, 0])
    maps = Maps.allocate(2, 32, 32, FP32, "cpu", Scales(torch.tensor(0.125), torch.tensor(9.0)))
    same = Maps.allocate(2, 32, 32, FP32, "cpu")
    keys = key_index.sampled_keys(blocks, 48, 16)
    found = key_index.moments_of(maps, query, kv, keys)
    want = key_index.moments_of(same, query, torch.cat([kv.float()[..., :32] * 0.125] * 2, -1), keys)
    assert all(torch.equal(one, same) for one, same in zip(found.tensors(), want.tensors(), strict=True))


def test_moments_are_of_each_kv_head():
    draw = torch.Generator().manual_seed(5)
    query, key = torch.randn(10, 6, 32, generator=draw), torch.randn(2, 7, 32, generator=draw) + 3
    found = Moments.of(query, key)
    for head in range(2):
        rows = query[:, 3 * head : 3 * head + 3].reshape(-1, 32)
        second = rows.mT @ rows / 30
        assert torch.allclose(found.second[head], second / second.diagonal().mean(), atol=1e-5)
        assert torch.allclose(found.spread[head], torch.cov(key[head].mT, correction=0), atol=1e-5)
        assert torch.allclose(found.mean[head, 0], key[head].mean(0), atol=1e-6)


def test_moments_of_two_texts_are_as_of_one_with_all_their_keys():
    draw = torch.Generator().manual_seed(6)
    query, key = torch.randn(10, 6, 32, generator=draw), torch.randn(2, 40, 32, generator=draw)
    key[:, 10:] = 2 * key[:, 10:] + 5
    joined = Moments.of(query, key[:, :10]).joined(Moments.of(query, key[:, 10:]), 0.75)
    for name in Moments.__slots__:
        found, want = (getattr(x, name) for x in (joined, Moments.of(query, key)))
        assert torch.allclose(found, want, rtol=1e-4, atol=1e-4), name


def test_no_text_outweighs_others_by_the_size_of_its_queries():
    draw = torch.Generator().manual_seed(7)
    query, key = torch.randn(10, 6, 32, generator=draw), torch.randn(2, 40, 32, generator=draw)
    assert torch.allclose(Moments.of(query, key).second, Moments.of(query * 1e6, key).second, rtol=1e-4)


@pytest.mark.parametrize(
    "lessons, length, worth, makes, after",
    [
        (Lessons(), 64, True, True, Lessons(1, 64, 64)),
        (Lessons(1, 1000, 1000), 1240, True, False, Lessons(2, 2240, 1000)),
        (Lessons(1, 1000, 1000), 1250, True, True, Lessons(2, 2250, 1250)),
        (Lessons(3, 3000, 1000), 100, True, True, Lessons(4, 3100, 1000)),
        (Lessons(7, 7000, 1000), 100, True, False, Lessons(8, 7100, 1000)),
        (Lessons(15, 15000, 1000), 1100, True, True, Lessons(16, 16100, 1100)),
        (Lessons(16, 15100, 1000, 14), 1240, False, False, Lessons(17, 16340, 1000)),
        (Lessons(16, 15100, 1000, 15), 1240, True, False, Lessons(17, 16340, 1000)),
        (Lessons(16, 15100, 1000), 1250, True, True, Lessons(17, 16350, 1250)),
        (Lessons(63, 63000, 1000, 15), 900, True, True, Lessons(64, 63900, 1000)),
        (Lessons(longest=9000), 100, True, True, Lessons(1, 100, 100)),  # the longest was of other weights
    ],
)
def test_texts_that_teach(lessons, length, worth, makes, after):
    assert (lessons.worth(length), lessons.makes(length)) == (worth, makes)
    assert lessons.after(length) == after


def taught(texts: list[tuple], kv: torch.Tensor, table: torch.Tensor) -> tuple[Maps, list]:
    """Maps learned from `texts`, each its queries and its length, whose pages are rows of `table`. Of each whether it made
    maps, None where nothing was learned."""
    maps, lessons, said = Maps.allocate(2, 32, 32, torch.float16, "cpu"), Lessons(), []
    for (query, length), blocks in zip(texts, table, strict=True):
        found = key_index.moments_of(maps, query, kv, key_index.sampled_keys(blocks, length, kv.shape[2]))
        making = lessons.makes(length)
        (learned,) = learn([maps], [found], making, lessons.weight(length))
        said.append(making if learned else None)
        lessons = lessons.after(length) if learned else lessons
    return maps, said


def test_texts_count_by_their_tokens_and_maps_are_made_when_they_are_due():
    draw = torch.Generator().manual_seed(9)
    kv, table = torch.randn(20, 2, 16, 64, generator=draw), torch.arange(20).view(5, 4)
    query = [torch.randn(80, 4, 32, generator=draw) for _ in range(5)]
    maps, said = taught([(x, 48) for x in query[:3]], kv, table[:3])
    assert said == [True, False, False]
    one, _ = taught([(query[0], 48)], kv, table[:1])
    assert torch.equal(maps.to_key, one.to_key)
    key = torch.cat([kv[row].transpose(0, 1).flatten(1, 2)[:, :48, :32] for row in table[:3]], 1)
    assert torch.allclose(maps.moments.mean[:, 0], key.mean(1), atol=1e-5)
    maps, said = taught([(x, 48) for x in query[:4]], kv, table[:4])
    assert said[-1] is True and not torch.equal(maps.to_key, one.to_key)
    _, said = taught([(query[0], 48), (query[1], 60)], kv, table[:2])
    assert said == [True, True]


@pytest.mark.parametrize("scale", [math.nan, 1e-20, 1e18, 3e19, 1e30])
def test_a_text_that_teaches_nothing_leaves_no_trace(scale):
    """Its numbers are not finite, or its maps are none that the dtype holds, or its share makes moments overflow."""
    draw = torch.Generator().manual_seed(10)
    kv, table = torch.randn(12, 2, 16, 64, generator=draw), torch.arange(12).view(3, 4)
    kv[4:8] = (kv[4:8] + 1) * scale
    query = torch.randn(80, 4, 32, generator=draw)
    sound = {"first": [(query, 48)], "later": [(query, 48), (query, 48)]}
    refused, said = taught([(query, 30)], kv, table[[1]])
    assert said == [None] and not any(tensor.any() for tensor in refused.own().values())
    if scale == 1e-20:
        return  # keys that are almost all the same are no harm beside others
    maps, said = taught([(query, 48), (query, 64)], kv, table[:2])
    one, _ = taught(sound["first"], kv, table[[0]])
    assert said == [True, None]
    assert all(torch.equal(tensor, one.own()[name]) for name, tensor in maps.own().items())
    maps, said = taught([(query, 48), (query, 64), (query, 48)], kv, table)
    assert said == [True, None, False]
    same, _ = taught(sound["later"], kv, table[[0, 2]])
    assert all(torch.equal(tensor, same.own()[name]) for name, tensor in maps.own().items())


def test_maps_of_one_key_and_query_are_finite():
    """As warming up makes them, of noughts: no direction has any spread."""
    found = Moments.of(torch.zeros(1, 4, 32), torch.zeros(2, 1, 32))
    maps = maps_of(found, 32)
    assert all(tensor.isfinite().all() for tensor in maps.own().values())
    assert (
        estimate(torch.ones(2, 2, 32), encode(torch.zeros(2, 4, 32), torch.zeros(2, 4, 32), maps)[0], maps)
        .isfinite()
        .all()
    )


def test_write_pages_writes_those_pages_alone():
    layout = PageLayout(2, 32, 16, 32, 4)
    raw = torch.zeros(4, layout.padded_bytes // 4)
    kv = raw[:, : layout.kv_bytes // 4].unflatten(1, (2, 16, 64))
    kv.normal_(generator=torch.Generator().manual_seed(6))
    maps, before = maps_of(moments(2, 32), 32), raw.clone()
    lookup.write_pages(kv, torch.tensor([2, 0]), layout, maps)
    codes, means = layout.views(kv)
    for page in (0, 2):
        code, mean = encode(*kv[page].chunk(2, -1), maps)
        assert torch.equal(codes[page], code) and torch.equal(means[page], mean)
    assert torch.equal(raw[[1, 3]], before[[1, 3]])
