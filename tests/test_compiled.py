"""Every kernel compiles for the GPUs that are supported, by each Triton that users have there, into what it was cut for; no
GPU is needed."""

import functools

import pytest

from support import tritons
from support.compiled import GPUS
from support.tritons import compiles

KERNELS = {
    "hit_kernel", "prefix_kernel", "_complete_kernel", "_tally_kernel", "_record_kernel", "_assign_kernel",
    "_pages_kernel", "_plan_kernel",
}  # fmt: skip
INDEXED = {"encode_kernel", "append_kernel", "weigh_kernel", "look_kernel", "merge_kernel"}  # before sm100
# Each GPU with the Triton of one supported vLLM: 3.6 of 0.32, 3.8 of 0.33. The GPU that runs them with both, and the next.
RUNS = [(80, "3.8.0"), (89, "3.6.0"), (90, "3.8.0"), (90, "3.6.0"), (90, "3.9.0"), (100, "3.8.0")]
MEASURED = RUNS[2]  # what the kernels are cut for was measured on this GPU, whose users install this Triton
OTHERS = RUNS[3:5]  # which compile a few shapes


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """`compiled(arch, triton)`: the rows of `compiled.py`, those of `MEASURED` and `OTHERS` with their instructions."""

    @functools.cache
    def rows(arch, triton):
        others = (arch, triton) in OTHERS
        words = ["sass"] * (others or (arch, triton) == MEASURED) + ["few"] * others
        command = ["-m", "support.compiled", str(arch), *words]
        return compiles(tmp_path_factory.mktemp("cache"), *command, first=tritons.folder(triton))

    return rows


@pytest.mark.parametrize("arch, triton", RUNS)
def test_kernels_compile_and_fit(arch, triton, compiled):
    found, few = compiled(arch, triton), (arch, triton) in OTHERS
    assert {row["triton"] for row in found} == {triton}
    every = KERNELS - ({"_tally_kernel"} if few else set())  # a few shapes, which audit nothing
    assert {row["kernel"] for row in found} == every | (INDEXED if arch < 100 else set()) and len(found) >= 10
    assert all(row["shared"] <= GPUS[arch][0] for row in found), found
    assert max(row["shared"] for row in found) > 0
    # No register may spill: ptxas 12.8 and 12.9 lose some of those, see `launch`.
    assert all(row["stack"] == 0 for row in found), found
    at_once = {row["launch"]["T"] for row in found if row["kernel"] == "look_kernel"}
    assert at_once == {80: {1, 4}, 89: {1}, 90: {1, 4}, 100: set()}[arch]
    read = {row["itemsize"][0] for row in found if row["kernel"] == "look_kernel"}  # FP8 caches too
    assert read == {80: {2}, 100: set()}.get(arch, {2} if few else {1, 2})


def test_loops_read_ahead_and_16_bytes_at_a_time(compiled):
    for row in compiled(*MEASURED):
        if row["kernel"] in LOOPS:
            ahead, at_once = LOOPS[row["kernel"]](row["launch"], *row["itemsize"])
            assert row["copies"] == ahead and row["copies"] + row["loads"] >= ahead + at_once, (row, ahead, at_once)


def hit_loops(launch: dict, kv: int, ring: int) -> tuple[int, int]:
    """Instructions that read blocks into shared memory ahead of their turn, and those that read them when it comes.

    A pipeline of so many stages has a copy of the reading for each: in the loop, and before it for the turns ahead.
    """
    n, ahead, at_once = launch, 0, 0
    scanned = n["BW"] * n["BD"] * ring
    if n["HALVES"]:
        scanned //= 2
        at_once += scanned // _at_once(n)  # the second half, where the first says so
    for size, stages in (
        (2 * n["BT"] * n["BD"] * kv, n["NEAR_STAGES"]), (2 * n["BN"] * n["BD"] * kv, n["BAND_STAGES"]), (scanned, n["SCAN_STAGES"]),
    ):  # fmt: skip
        if stages > 1:
            ahead += stages * size // _at_once(n)
        else:
            at_once += size // _at_once(n)
    return ahead, at_once


def prefix_loops(launch: dict, kv: int, ring: int | None = None) -> tuple[int, int]:
    """As `hit_loops`; see `exact.Tuning.default` for the stages."""
    return (launch["STAGES"] - 2) * 2 * launch["BN"] * launch["BD"] * kv // _at_once(launch), 0


LOOPS = {"hit_kernel": hit_loops, "prefix_kernel": prefix_loops}


def _at_once(launch: dict) -> int:
    """Bytes that all threads of a program read by one instruction."""
    return 16 * 32 * launch["num_warps"]


# Of `look_kernel`, by head size, directions and bytes of the cache's elements: instructions to mark 128 tokens, to list 1,024,
# to read 16 of a list, and 16 near ones.
LOOK = {(128, 64, 2): (572, 366, 237, 233), (128, 64, 1): (566, 367, 448, 452), (64, 48, 2): (586, 358, 132, 155)}


def test_loops_of_look_take_no_more_instructions(compiled):
    found = {}
    for row in compiled(*MEASURED):
        n = row["launch"]
        if row["kernel"] == "look_kernel" and n["T"] == n["num_warps"] == 1:
            mark, listing, *_, read, near = (sum(loop.values()) for loop in row["loops"])
            found[n["D"], n["N"], row["itemsize"][0]] = mark, listing, read, near
    for kind, counts in LOOK.items():
        assert all(now <= 1.05 * then for now, then in zip(found[kind], counts, strict=True)), (kind, found)


@pytest.mark.parametrize("arch, triton", OTHERS)
def test_no_triton_makes_far_more_of_a_kernel_than_another(arch, triton, compiled):
    """By a quarter more they would be at odds about how to do something: 3.7 once made 64 loads of 24 copies."""
    counts = [
        {(row["kernel"], str(row["launch"]), str(row["itemsize"])): row["instructions"] for row in found if "instructions" in row}
        for found in (compiled(*MEASURED), compiled(arch, triton))
    ]  # fmt: skip
    both = counts[0].keys() & counts[1].keys()
    assert {kernel for kernel, *_ in both} == LOOPS.keys() | {"look_kernel"}
    far = {kind: found for kind in both if 4 * max(found := [x[kind] for x in counts]) > 5 * min(found)}
    assert far == {}


def test_as_many_programs_run_at_once_as_were_meant_to(compiled):
    """The fastest way to launch a kernel leaves its threads enough registers; but for an index as wide as heads are."""
    wide = lambda launch: launch.get("N") == launch["D"]
    assert [row for row in compiled(*MEASURED) if row["passed_over"] and not wide(row["launch"])] == []
