"""`vllm-mac bench`: its command line, the data it plants, what it checks, and what it writes.

Speed itself needs a GPU. Here the kernels run under Triton's interpreter with clocks that
return made-up times, and `bench decode` runs whole engines on the CPU.
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is decorated

from rich.console import Console
from typer.testing import CliRunner

from vllm_mac import paged
from vllm_mac.config import resolve
from vllm_mac.tools import cli, environment
from vllm_mac.tools.bench import BenchError, decode, kernel, plots, row_files, row_tables
from vllm_mac.tools.bench import synthetic_step as data

ROOT = Path(__file__).resolve().parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = resolve({"window": 32, "band": 24, "min_context": 64, "miss_engine": "triton"}, {})
PROVENANCE = {"gpu", "driver", "vllm", "torch", "triton", "flashinfer", "commit", "command", "timestamp"}


def invoke(*args):
    return CliRunner().invoke(cli.app, ["bench", *args], env={"COLUMNS": "300"})


def make(batch=3, context=200, heads=(4, 2), layers=2, config=CONFIG, dtype=torch.float16, seed=0):
    shape = data.Shape(batch, context, *heads, 64, 16, dtype)
    pool = torch.randn(2 * shape.cache_elements, device=DEVICE).to(dtype)
    return data.make_step(shape, config, pool, layers, seed)


# The command line


def test_help_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_mac.tools.cli; print([m for m in ('torch', 'vllm', 'triton', 'matplotlib') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["kernel", "decode", "show"])
def test_help_names_every_option(command):
    result = invoke(command, "--help")
    assert result.exit_code == 0
    import typer

    options = [o for p in typer.main.get_command(cli.app).commands["bench"].commands[command].params for o in p.opts]
    assert len(options) >= 2
    for option in options:
        assert option in result.output or not option.startswith("--")


@pytest.mark.parametrize(
    "args, said",
    [
        (["kernel", "--batch", "1,x"], "--batch: received '1,x'; choose whole numbers of at least 1"),
        (["kernel", "--batch", "0"], "received '0'"),
        (["kernel", "--hit-rate", "0.5,1.5"], "--hit-rate: received '0.5,1.5'; choose numbers from 0 to 1"),
        (["kernel", "--heads", "32/5"], "--heads: received '32/5'; choose query heads/KV heads such as 32/8"),
        (["kernel", "--heads", "32"], "--heads: received '32'"),
        (["kernel", "--lags", "normal"], "received 'normal'; choose from geometric, uniform, constant"),
        (["kernel", "--dtype", "float64"], "received 'float64'; choose from bfloat16, float16"),
        (["kernel", "--baselines", "FA9"], "received 'FA9'; choose from FLASHINFER, FLASH_ATTN, none"),
        (["kernel", "--mac", "[1]"], "--mac: received '[1]'; choose a JSON object"),
        (["decode", "--context", "10"], "Missing option '--model'"),
        (["decode", "--model", "m", "--context", "10", "--engine", "x"], "--engine: received 'x'; not JSON"),
        (["decode", "--model", "m"], "--shapes: choose either --context, with --batch where it is not 1, or --shapes"),
        (["decode", "--model", "m", "--context", "10", "--shapes", "1x10"], "choose either --context"),
        (["decode", "--model", "m", "--batch", "2", "--shapes", "1x10"], "choose either --context"),
        (
            ["decode", "--model", "m", "--shapes", "1x10,8"],
            "--shapes: received '1x10,8'; choose requests at once x prompt tokens",
        ),
        (["decode", "--model", "m", "--shapes", "0x10"], "--shapes: received '0x10'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_value(args, said):
    result = invoke(*args)
    assert result.exit_code == 2
    assert said in re.sub(r"\s*│?\n│?\s*", " ", result.output)


@pytest.mark.cpu
def test_kernel_says_that_it_needs_a_gpu(tmp_path):
    result = invoke("kernel", "--json", str(tmp_path / "rows.json"))
    assert result.exit_code == 2 and "needs an NVIDIA GPU" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("args, said", [(["kernel"], "bandd: unknown key"), (["decode"], "no shape 'gpt'")])
def test_wrong_configurations_end_in_one_line(args, said, monkeypatch):
    monkeypatch.setattr(kernel, "require_cuda", lambda: None)
    extra = ["--mac", '{"bandd": 1}'] if args == ["kernel"] else ["--model", "shape:gpt", "--context", "8"]
    result = invoke(*args, *extra, "--no-progress")
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


# What is planted


@pytest.mark.parametrize("law", data.LAGS)
@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_the_real_match_finds_what_was_planted(rate, law):
    step = make(batch=8, heads=(8, 2), layers=3)
    data.plant(step, rate, law, 6, seed=1)
    data.check_planting(step)
    done = data.realised(step)
    source = torch.stack([layer.source for layer in step.layers])
    # Four standard deviations, for 192 heads in 48 groups; the seed is fixed.
    assert done.heads_matched == pytest.approx(rate, abs=0.15)
    assert done.groups_hit == pytest.approx(rate**4, abs=0.15)
    if rate in (0, 1):
        assert done.heads_matched == done.groups_hit == rate
    if rate == 0:
        assert done.lag is None
        return
    assert done.lag == pytest.approx(6, rel=0.4)
    assert (source[source >= 0] >= int(step.first[0])).all()
    if rate == 1:
        assert done.group_lag == 6 if law == "constant" else done.group_lag > done.lag
    if (rate, law) != (1, "constant"):
        assert not torch.equal(source[0], source[1]), "each layer has a pattern of its own"


def test_planting_follows_its_seed():
    patterns = []
    for seed in (1, 1, 2):
        step = make()
        data.plant(step, 0.5, "geometric", 6, seed)
        patterns.append(step.layers[0].source)
    assert torch.equal(patterns[0], patterns[1]) and not torch.equal(patterns[0], patterns[2])


def test_a_planting_that_the_match_does_not_find_is_an_error():
    step = make()
    data.plant(step, 1.0, "geometric", 6, seed=1)
    layer = step.layers[1]
    layer.source[2, 3] -= 1
    with pytest.raises(BenchError, match="1 of 12 heads of layer 1 match another entry"):
        data.check_planting(step)


def test_lags_have_the_mean_asked_for():
    draw = torch.Generator().manual_seed(0)
    for law in data.LAGS:
        lags = data.draw_lags((20000,), law, 64, 511, draw).double()
        assert lags.min() >= 1 and lags.max() <= 511
        assert lags.mean() == pytest.approx(64, rel=0.02)  # the mean's standard deviation is at most 0.7 %
    assert data.draw_lags((9,), "geometric", 1, 5, draw).tolist() == [1] * 9
    with pytest.raises(BenchError, match="lags: 'normal'"):
        data.draw_lags((1,), "normal", 1, 1, draw)


FLOAT8 = {"ring_dtype": "float8_e4m3fn", "distance": "relative"}


@pytest.mark.parametrize("changes", [{}, {"sink": 5}, {"reuse": "chained"}, {"min_context": 4096}, FLOAT8])
def test_counters_and_bytes_are_those_of_the_method(changes):
    step = make(config=resolve(CONFIG.model_dump(include={"window", "band", "min_context"}) | changes, {}))
    data.plant(step, 0.6, "geometric", 6, seed=3)
    data.check_planting(step)
    layer = step.layers[0]
    position, shape = step.position.long(), step.shape
    with torch.device(DEVICE):
        pre = step.rotary.undo(layer.query, position)
        done = paged.decode(step.rows(), layer.query, pre, layer.kv, layer.store, step.config, step.scale)
    hit, miss, short, no_ring, over, request, read, skipped = data.expected_counts(step, layer)
    assert hit == int(done.hit.sum()) * 2 and read == int(done.read.sum())
    assert hit + miss + short == shape.batch * shape.heads and no_ring == over == request == 0
    assert read + skipped == shape.batch * shape.kv_heads * shape.context
    assert (short > 0) == ("min_context" in changes) and (hit > 0) != (short > 0)
    least = 2 * 64 * 2 * min(sum(data.expected_counts(step, x)[-2:-1]) for x in step.layers)
    assert least < data.realised(step).step_bytes < shape.exact_bytes() + 4 * shape.batch * shape.heads * 32 * 64 * 2


def test_float8_rings_save_a_byte_of_each_element_of_a_query():
    keys = CONFIG.model_dump(include={"window", "band", "min_context"})
    steps = [make(config=resolve(keys | changes, {})) for changes in ({}, FLOAT8)]
    for step in steps:
        data.plant(step, 1.0, "geometric", 6, seed=3)
    saved = data.realised(steps[0]).step_bytes - data.realised(steps[1]).step_bytes
    assert saved == 3 * 4 * 64 * (32 + 1 + 1)  # all entries are read to match, one to reuse it; one is written


def test_replays_find_what_the_first_step_found():
    """What a step records must not be matched when the same step runs again."""
    step = make()
    data.plant(step, 0.5, "geometric", 6, seed=1)
    layer, position = step.layers[0], step.position.long()
    with torch.device(DEVICE):
        for _ in range(2):
            pre = step.rotary.undo(layer.query, position)
            paged.decode(step.rows(), layer.query, pre, layer.kv, layer.store, step.config, step.scale)
    data.check_planting(step)


# What is checked


def test_the_oracles_agree_where_nothing_is_reused():
    step = make()
    data.plant(step, 0.0, "geometric", 6, seed=1)
    layer = step.layers[0]
    before = layer.store.query.clone()
    torch.testing.assert_close(data.reference(step, layer), data.exact_reference(step, layer), rtol=1e-4, atol=1e-5)
    assert torch.equal(before, layer.store.query)


@pytest.mark.parametrize("spoil", [lambda x: x * 1.01, lambda x: x.where(x != x[1, 2, 3], torch.nan)])
def test_a_wrong_output_is_an_error(spoil):
    step = make(batch=2)
    right = torch.randn(2, 4, 64)
    assert data.compare("it", step, right.to(torch.float16), right) < 1e-3
    with pytest.raises(BenchError, match="it is wrong: relative error .* No speed is reported"):
        data.compare("it", step, spoil(right).to(torch.float16), right)


def clocks():
    """Clocks that call what they should time once, and say 1, 2 and 3 ms."""

    def clock(calls):
        for call in calls if isinstance(calls, list) else [calls]:
            call()
        return [3.0, 1.0, 2.0]

    return kernel.Timers(clock, clock, clock)


def torch_exact(step, factor=1.0):
    """A baseline in PyTorch."""

    def call(layer):
        return lambda: layer.out.copy_(factor * data.exact_reference(step, layer))

    yield "slow", [call(layer) for layer in step.layers]


def absent(step):
    raise ImportError("no such engine")
    yield


def options(**changes):
    keys = dict(batches=(2,), contexts=(200,), heads=((4, 2),), hit_rates=(0.5, 1.0), config=CONFIG, head_size=64,
                dtype="float16", lags="geometric", mean_lag=6, layers=1, baselines=("EXACT", "ABSENT"))  # fmt: skip
    return kernel.KernelBench(**keys | changes)


@pytest.fixture
def baselines(monkeypatch):
    pytest.importorskip("triton", reason="Triton kernels")
    monkeypatch.setattr(kernel, "BASELINES", {"EXACT": torch_exact, "ABSENT": absent})
    return kernel.BASELINES


def test_kernel_rows(baselines):
    told, opts = [], options(contexts=(50, 200))
    rows = list(kernel.run(opts, told.append, DEVICE, clocks()))
    assert len(rows) == opts.measurements() == 7
    assert sum("MAC" in what for what in told) == 3
    exact, missing, short = rows[:3]
    assert exact["engine"] == "EXACT" and exact["relative_error"] < 1e-3 and exact["bytes"] > 2 * 50 * 2 * 128 * 2
    assert missing["error"] == "ImportError: no such engine"
    # Below min_context nothing is tried, whatever was asked for.
    assert (short["context"], short["hit_rate"], short["heads_matched"]) == (50, 0.0, 0.0)
    full, half = rows[5:]
    assert (full["hit_rate"], full["groups_hit"], half["hit_rate"]) == (1.0, 1.0, 0.5)
    assert 0 < half["heads_matched"] < 1 and half["bytes"] > full["bytes"]
    for row in (full, half):
        assert (row["p20"], row["p50"], row["p80"], row["begin_host_ms"]) == (1.0, 2.0, 3.0, 2.0)
        assert row["best_exact_ms"] == 2.0 and row["speedup"] == 1.0
        assert row["bound_ms"] == pytest.approx(2.0 + (1 - row["groups_hit"]) * 2.0)
        assert row["lags"] == "geometric, mean 6" and "window=32" in row["config"]


def test_reads_between_layers_are_taken_off(baselines):
    """Made up: a read takes 5 ms and anything else 2, apart from what differs between replays."""
    asked = []

    def clock(calls):
        calls = calls if isinstance(calls, list) else [calls]
        for call in calls:
            call()
        reads = sum(call.__qualname__.startswith("reader") for call in calls)
        asked.append((reads, len(calls)))
        return [(5 * reads + 2 * (len(calls) - reads)) / len(calls) + noise for noise in (-0.5, 0.0, 0.5)]

    timers = kernel.Timers(clock, lambda call: [0.0], lambda call: [0.0])
    rows = list(kernel.run(options(baselines=("EXACT",), layers=3, between=1), lambda _: None, DEVICE, timers))
    assert asked == [(3, 6), (3, 3), (3, 6), (3, 6)], "each layer after a read; so many reads alone only once"
    for row in rows:
        assert (row["p20"], row["p50"], row["p80"]) == pytest.approx((1.0, 2.0, 3.0)) and row["between_mib"] == 1
    shown = io.StringIO()
    row_tables.show([row | environment.environment(["x"]) for row in rows], Console(file=shown, width=200))
    assert "1 MiB read between layers" in shown.getvalue()


@pytest.mark.parametrize("audit, audited", [(0.0, None), (0.5, False), (1.0, True)])
def test_audits_are_timed_where_every_step_is_one(baselines, monkeypatch, audit, audited):
    counted, decode = [], kernel._decode

    def watched(step, decoder, layer):
        decode(step, decoder, layer)
        counted.append(None if layer.audited is None else bool(layer.audited.any()))

    monkeypatch.setattr(kernel, "_decode", watched)
    config = CONFIG.model_copy(update={"audit": audit})
    [row] = kernel.run(options(baselines=(), hit_rates=(1.0,), config=config), lambda _: None, DEVICE, clocks())
    assert row["hit_rate"] == 1.0 and f"audit={audit}" in row["config"] and set(counted) == {audited}


def test_no_speed_of_a_wrong_baseline(baselines):
    baselines["EXACT"] = lambda step: torch_exact(step, 1.01)
    baselines["EXACT"].__name__ = "EXACT"
    rows = kernel.run(options(), lambda _: None, DEVICE, clocks())
    with pytest.raises(BenchError, match="EXACT .* is wrong"):
        list(rows)


@pytest.mark.parametrize(
    "spoil, said", [("out", "MAC is wrong"), ("hits", "counters of layer 0"), ("nan", "unwritten")]
)
def test_no_speed_of_a_wrong_decode(baselines, monkeypatch, spoil, said):
    right = kernel._decode

    def wrong(step, decoder, layer):
        if spoil == "hits":
            layer.store.query.normal_(5.0)
        right(step, decoder, layer)
        if spoil != "hits":
            layer.out[1, 1] = torch.nan if spoil == "nan" else layer.out[1, 1] * 1.02

    monkeypatch.setattr(kernel, "_decode", wrong)
    got = []
    with pytest.raises(BenchError, match=said):
        got.extend(kernel.run(options(baselines=(), hit_rates=(1.0,)), lambda _: None, DEVICE, clocks()))
    assert not got


# What is written


def kernel_row(**changes):
    row = dict(bench="kernel", engine="MAC", heads="32/8", batch=1, context=1024, hit_rate=1.0, heads_matched=1.0,
               groups_hit=1.0, p20=0.01, p50=0.02, p80=0.03, floor_ms=0.01, speedup=7.0, bound_ms=0.02)  # fmt: skip
    return row | changes | environment.environment(["vllm-mac", "bench", "a b"])


ROWS = [
    dict(hit_rate=0.5, heads_matched=0.49, groups_hit=0.1, p50=0.2),
    dict(),
    dict(engine="FLASHINFER", p50=0.3),
    dict(engine="FLASH_ATTN", error="log\nImportError: [bold] none"),
]


def test_rows_carry_where_they_come_from():
    row = kernel_row()
    assert PROVENANCE <= row.keys()
    assert row["command"] == "vllm-mac bench 'a b'" and row["torch"] == torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["timestamp"])
    assert re.fullmatch(r"unknown|[0-9a-f]{12}(-dirty)?", row["commit"])


def test_commit_outside_a_checkout(monkeypatch):
    monkeypatch.setattr(environment, "_output", lambda command: "")
    monkeypatch.delenv(environment.COMMIT_VAR, raising=False)
    assert environment.commit.__wrapped__() == "unknown"
    monkeypatch.setenv(environment.COMMIT_VAR, "abc-dirty")
    assert environment.commit.__wrapped__() == "abc-dirty"


def test_commit_of_a_changed_checkout(monkeypatch):
    said = {"ls-files": "__init__.py", "rev-parse": "0123456789ab", "status": " M x"}
    monkeypatch.setattr(environment, "_output", lambda command: said[command[3]])
    assert environment.commit.__wrapped__() == "0123456789ab-dirty"
    said["status"] = ""
    assert environment.commit.__wrapped__() == "0123456789ab"


def test_quantiles():
    assert row_files.quantiles([5.0]) == {"p20": 5.0, "p50": 5.0, "p80": 5.0}
    assert row_files.quantiles([float(x) for x in range(100, -1, -1)]) == {"p20": 20.0, "p50": 50.0, "p80": 80.0}


def test_json_tables_and_the_show_command(tmp_path):
    rows, path = [kernel_row(**changes) for changes in ROWS], tmp_path / "new" / "rows.json"
    row_files.save(rows, path)
    assert row_files.load(path) == rows and not list(path.parent.glob("*.part"))
    result = invoke("show", str(path), str(path))
    assert result.exit_code == 0
    assert "0.0200" in result.output and "0.490" in result.output and "ImportError: [bold] none" in result.output
    (tmp_path / "other.json").write_text("[]")
    result = invoke("show", str(tmp_path / "other.json"))
    assert result.exit_code == 2 and "no results of vllm-mac bench" in result.output


@pytest.mark.parametrize("name", ["kernel-h200.json", "decode-h200.json"])
@pytest.mark.parametrize("columns", [80, 100, 120])
def test_tables_fit_common_terminals(name, columns):
    """Every figure is there, whole, at every width."""
    rows = row_files.load(ROOT / "examples" / "results" / name)
    shown = []
    for width in (columns, 300):
        console = Console(file=io.StringIO(), width=width)
        row_tables.show(rows, console)
        shown.append(console.file.getvalue())
    assert max(map(len, shown[0].splitlines())) <= columns and "…" not in shown[0]
    figures = [Counter(re.findall(r"\b\d+\.\d+\b", text)) for text in shown]
    assert figures[0] == figures[1] and figures[0].total() > 5 * len(rows)


def decode_row(**changes):
    row = dict(bench="decode", engine="MAC", model="m", context=64, batch=1, p20=1.0, p50=2.0, p80=3.0, ttft_p50=9.0)
    return row | changes | environment.environment([])


def test_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need the extra 'bench'")
    for name, rows in (
        ("k", [kernel_row(**changes) for changes in ROWS]),
        ("d", [decode_row(), decode_row(engine="default")]),
    ):
        plots.plot(rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchError, match="choose files of one benchmark"):
        plots.plot([kernel_row(), decode_row()], tmp_path / "x.png")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("decode", "--model", "m", "--context", "8", "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == 2 and "`pip install matplotlib`" in result.output


# Whole engines


def fake_engine(monkeypatch, body):
    """In place of an engine's process: `body` with `tell(**message)` and `spec`."""
    code = (
        "import json, os, sys, time\nspec, fd = json.load(open(sys.argv[1])), int(sys.argv[2])\n"
        "tell = lambda **m: os.write(fd, (json.dumps(m) + '\\n').encode())\n" + body
    )
    monkeypatch.setattr(decode, "COMMAND", (sys.executable, "-c", code))


RESULT = "dict(step_ms=[1.0, 2.0, 4.0], ttft_ms=[7.0], metadata_ms=[0.1], hit_rate=0.5, read_share=0.25)"
EACH = f"""
for i, _ in enumerate(spec["shapes"]):
    tell(shape=i, result={RESULT})
tell(done=True)"""


def decoded(shapes=((1, 100),), **changes):
    """Rows of `decode.run`, and what it reported."""
    rows, told = [], []
    decode.run(decode.DecodeBench("m", shapes, **changes), lambda *said: told.append(said), rows.append)
    return rows, told


def test_each_backend_gets_a_row(monkeypatch):
    fake_engine(
        monkeypatch,
        f"""
name = spec["llm"].get("attention_backend")
tell(stage=f"{{name}} {{spec['llm'].get('additional_config')}} {{spec['llm']['max_num_seqs']}}")
if name == "CRASH":
    print("Traceback\\nValueError: out of luck"); os._exit(9)
{EACH}""",
    )
    rows, told = decoded(((3, 100),), backends=("MAC", "default", "CRASH"), mac={"band": 9})
    assert told == [
        ("MAC: MAC {'mac': {'band': 9}} 3", 0), ("MAC: batch 3, 100 tokens: done", 1),
        ("default: None None 3", 0), ("default: batch 3, 100 tokens: done", 1),
        ("CRASH: CRASH None 3", 0), ("CRASH: batch 3, 100 tokens: no result", 1),
    ]  # fmt: skip
    assert [row["engine"] for row in rows] == ["MAC", "default", "CRASH"]
    assert (rows[0]["p50"], rows[0]["mean"]) == (2.0, pytest.approx(7 / 3))
    assert rows[0]["ttft_p50"] == 7.0 and rows[0]["metadata_p50"] == 0.1 and rows[0]["hit_rate"] == 0.5
    error = rows[2]["error"].splitlines()[-1]
    assert error == "CRASH None 3: the engine ended with code 9 and gave no result: ValueError: out of luck"
    decode.compare(rows)
    assert rows[0]["speedup"] == 1.0 and "speedup" not in rows[2]
    row_tables.show([{**row, **environment.environment()} for row in rows], Console(file=io.StringIO()))


SHAPES = ((1, 4000), (8, 100), (2, 50))


def test_an_engine_measures_several_shapes(monkeypatch, tmp_path):
    starts = tmp_path / "starts"
    fake_engine(
        monkeypatch,
        f"""
open({str(starts)!r}, "a").write(str(spec["llm"]["max_num_seqs"]) + " " + str(spec["llm"]["max_model_len"]) + "\\n")
own = "attention_backend" not in spec["llm"]
for i, (batch, context) in enumerate(spec["shapes"]):
    tell(stage=f"batch {{batch}}, {{context}} tokens: decoding")
    if batch == 8 and own:
        tell(shape=i, result=dict(error="RuntimeError: the KV cache is too small"))
    else:
        tell(shape=i, result={RESULT} | dict(step_ms=[batch * (1.0 + own)]))
tell(done=True)""",
    )
    rows, told = decoded(SHAPES, tokens=10)
    assert starts.read_text() == "8 4045\n8 4045\n"  # 4000 prompt tokens, 10 generated, room to wait for others
    assert [(row["engine"], row["batch"], row["context"]) for row in rows] == [
        (engine, *shape) for engine in ("MAC", "default") for shape in SHAPES
    ]
    assert sum(done for _, done in told) == 6 and ("MAC: batch 8, 100 tokens: decoding", 0) in told
    decode.compare(rows)
    assert [row.get("speedup") for row in rows] == [2.0, None, 2.0, 0.5, None, 0.5]
    assert rows[4]["error"] == "RuntimeError: the KV cache is too small" and "p50" not in rows[4]


def test_what_was_measured_before_a_crash_is_kept(monkeypatch):
    fake_engine(
        monkeypatch,
        f"""
tell(shape=0, result={RESULT})
tell(stage="batch 8, 100 tokens: decoding")
print("AssertionError: no more"); os._exit(3)""",
    )
    rows, told = decoded(SHAPES, backends=("MAC",))
    assert "error" not in rows[0] and sum(done for _, done in told) == 3
    said = "batch 8, 100 tokens: decoding: the engine ended with code 3 and gave no result: AssertionError: no more"
    assert rows[1]["error"].splitlines()[-1] == said and rows[2]["error"] == f"not measured: {said}"


WARNED = """WARNING 11-22 00:00:00 [base.py:377] Chat template warmup failed
WARNING 11-22 00:00:00 [base.py:377] Traceback (most recent call last):
WARNING 11-22 00:00:00 [base.py:377] ValueError: Tokenizer not available when `skip_tokenizer_init=True`
(EngineCore_DP0 pid=17) WARNING 11-22 00:00:00 [x.py:1] RuntimeError: not so bad"""


def test_a_late_stage_is_named_and_no_warning_blamed(monkeypatch):
    fake_engine(
        monkeypatch,
        f"""
print({WARNED!r}, flush=True)
tell(stage="starting the engine"); time.sleep(1.2)
tell(stage="batch 1, 4000 tokens: warming up"); time.sleep(1.2)
tell(shape=0, result={RESULT})
tell(stage="batch 8, 100 tokens: reading the prompts, 1 of 1"); time.sleep(60)""",
    )
    rows, _ = decoded(SHAPES, backends=("MAC",), timeout=2.0)  # for each stage: the first two take longer together
    assert "error" not in rows[0]
    last = rows[1]["error"].splitlines()[-1]
    assert re.fullmatch(
        r"batch 8, 100 tokens: reading the prompts, 1 of 1: the engine was stopped because this had taken 2 s, "
        r"[45] s after it was started", last
    ), last  # fmt: skip
    assert rows[2]["error"] == f"not measured: {last}"


def test_a_warning_is_not_why_an_engine_ended(monkeypatch):
    fake_engine(monkeypatch, f"print({WARNED!r}, flush=True); os._exit(1)")
    (row,), _ = decoded(backends=("MAC",))
    assert row["error"].splitlines()[-1] == "the engine ended with code 1 and gave no result"
    fake_engine(monkeypatch, f"print('KeyError: 7'); print({WARNED!r}, flush=True); os._exit(1)")
    (row,), _ = decoded(backends=("MAC",))
    assert row["error"].splitlines()[-1] == "the engine ended with code 1 and gave no result: KeyError: 7"


def test_a_backend_that_hangs_is_stopped_with_all_its_processes(monkeypatch, tmp_path):
    note = tmp_path / "pid"
    fake_engine(
        monkeypatch,
        f"""
import subprocess
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(note)!r}, "w").write(str(child.pid)); time.sleep(60)""",
    )
    (row,), _ = decoded(backends=("MAC",), timeout=2.0)
    assert row["error"] == "the engine was stopped because this had taken 2 s"
    time.sleep(0.2)
    state = Path(f"/proc/{note.read_text()}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_measured(number, tmp_path):
    """The second backend never ends; the first one's row is written."""
    begun, script = tmp_path / "begun", tmp_path / "run.py"
    body = f"if 'attention_backend' not in spec['llm']:\n    open({str(begun)!r}, 'w')\n    time.sleep(60)\n{EACH}"
    script.write_text(
        "import signal, sys, pytest\nsys.path.insert(0, sys.argv.pop(1))\nimport test_bench, vllm_mac.tools.cli\n"
        # A shell starts what it runs in the background with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"test_bench.fake_engine(pytest.MonkeyPatch(), {body!r})\nvllm_mac.tools.cli.main()\n"
    )
    rows = tmp_path / "rows.json"
    args = ["bench", "decode", "--model", "m", "--context", "9", "--backends", "MAC,default", "--json", str(rows)]
    process = subprocess.Popen(
        [sys.executable, str(script), str(ROOT / "tests"), *args], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not begun.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "interrupted" in err and "Traceback" not in err
    assert [row["engine"] for row in json.loads(rows.read_text())["rows"]] == ["MAC"]


def test_the_built_in_shape_is_what_transformers_takes():
    transformers = pytest.importorskip("transformers", reason="comes with vLLM")
    config = transformers.LlamaConfig.from_dict(decode.SHAPES["llama-3.1-8b"])
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (
        32,
        32,
        8,
        128,
    )
    rope = getattr(config, "rope_parameters", None) or config.rope_scaling
    assert rope["rope_type"] == "llama3" and rope["factor"] == 8.0


@pytest.mark.cpu
def test_decode_on_a_real_engine(tmp_path):
    pytest.importorskip("vllm", reason="whole engines")
    from tiny_models import write

    model, rows = write("llama", tmp_path / "models"), tmp_path / "rows.json"
    keys = {"window": 32, "band": 16, "min_context": 64}
    engine = {"block_size": 32, "dtype": "float32", "max_num_batched_tokens": 256, "kv_cache_memory_bytes": 32 << 20}
    # Engines of other tests leave their choice of runner in the environment.
    quick = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1",
             "TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | quick
    code = "from vllm_mac.tools.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", "decode", "--model", str(model), "--shapes", "2x500,1x900,2x700,1x300",
         "--max-model-len", "800", "--tokens", "12", "--prefills", "2", "--eager", "--mac", json.dumps(keys), "--engine", json.dumps(engine),
         "--json", str(rows), "--no-progress"],
        capture_output=True, text=True, env=env, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr  # 900 tokens are too many
    every = row_files.load(rows)
    assert [(row["engine"], row["batch"], row["context"]) for row in every] == [
        (engine, *shape) for engine in ("MAC", "default") for shape in ((2, 500), (1, 900), (2, 700), (1, 300))
    ]
    for row in every:
        assert PROVENANCE <= row.keys()
        if row["context"] == 900:
            assert row["error"].startswith(
                "ValueError: --max-model-len: 800 has no room for 900 prompt tokens and 17 generated"
            )
            continue
        assert (
            0 < row["p20"] <= row["p50"] <= row["p80"]
            and row["start_s"] == every[0 if row["engine"] == "MAC" else 4]["start_s"]
        )
        assert row["samples"] == 12 and row["speedup"] > 0 and row["prompt"] == "random words, seed 0"
        assert len(row["ttft_ms"]) == 2 * row["batch"] and row["cached_prompt_tokens"] == 0
        assert 0 < row["metadata_p50"] < row["p80"]
        if row["engine"] == "MAC":
            assert 0 < row["hit_rate"] < 1 and 0 < row["read_share"] < 1
        else:
            assert "hit_rate" not in row
