"""`vllm-mac bench`: its command line, and the rows, tables and plots that it writes."""

import io
import re
import subprocess
import sys
from collections import Counter

import pytest
import torch
from rich.console import Console

from support import ROOT
from support.bench_runs import PROVENANCE, invoke
from vllm_mac.tools import cli, environment
from vllm_mac.tools.bench import BenchError, kernel, plots, row_files, row_tables

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
        (["kernel", "--rule", "both"], "--rule: received 'both'; choose from index, match"),
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


@pytest.mark.parametrize(
    "args, rule, page",
    [
        ([], "index", 64),
        (["--rule", "match"], "match", 16),
        (
            ["--mac", '{"rule": "match"}', "--window", "64", "--hit-rate", "1", "--lags", "uniform", "--mean-lag", "9"],
            "match",
            16,
        ),
        (["--mac", '{"rule": "match"}', "--rule", "index"], "index", 64),
        (["--mac", '{"rule": "index"}', "--page", "32"], "index", 32),
        (["--mac", '{"rule": "index"}', "--rule", "match"], "match", 16),
    ],
)
def test_the_rule_and_its_pages(args, rule, page, monkeypatch):
    asked = []
    monkeypatch.setattr(kernel, "require_cuda", lambda: None)
    monkeypatch.setattr(kernel, "run", lambda bench, report: asked.append(bench) or [])
    assert invoke("kernel", *args, "--no-progress").exit_code == 0
    assert (asked[0].config.rule, asked[0].page) == (rule, page)


@pytest.mark.parametrize(
    "option, value", [("hit-rate", "0.5"), ("lags", "uniform"), ("mean-lag", "9"), ("window", "64")]
)
def test_what_only_matches_have_is_refused_with_an_index(option, value, monkeypatch):
    monkeypatch.setattr(kernel, "require_cuda", lambda: None)
    result = invoke("kernel", f"--{option}", value, "--no-progress")
    said = re.sub(r"\s*│?\n│?\s*", " ", result.output)
    assert result.exit_code == 2 and option in said and re.search(f"received '?{value}.* which only rule: match ", said)


@pytest.mark.parametrize("args, said", [(["kernel"], "bandd: unknown key"), (["decode"], "no shape 'gpt'")])
def test_wrong_configurations_end_in_one_line(args, said, monkeypatch):
    monkeypatch.setattr(kernel, "require_cuda", lambda: None)
    extra = ["--mac", '{"bandd": 1}'] if args == ["kernel"] else ["--model", "shape:gpt", "--context", "8"]
    result = invoke(*args, *extra, "--no-progress")
    assert result.exit_code == 2 and said in result.output and "Traceback" not in result.output


# What is written


def kernel_row(**changes):
    row = dict(bench="kernel", engine="MAC", heads="32/8", batch=1, context=1024, hit_rate=1.0, heads_matched=1.0,
               groups_hit=1.0, p20=0.01, p50=0.02, p80=0.03, floor_ms=0.01, speedup=7.0, bound_ms=0.02)  # fmt: skip
    return row | changes | environment.environment(["vllm-mac", "bench", "a b"])


INDEX_ROW = dict(rule="index", head_size=128, note="looked up", read_share=0.14, p20=0.0101, p50=0.02, p80=0.0303,
                 weigh_ms=0.0042, look_ms=0.0137, merge_ms=0.0021)  # fmt: skip
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


def test_rows_of_the_two_rules_have_tables_of_their_own():
    shown = io.StringIO()
    exact = dict(engine="FLASHINFER", rule="index", head_size=128, p50=0.14)
    row_tables.show([kernel_row(**row) for row in (*ROWS, exact, INDEX_ROW)], Console(file=shown, width=300))
    match, index = shown.getvalue().split("kernel on ")[1:]
    assert "0.490" in match and "looked up" not in match
    assert "32/8 heads of 128, batch 1, 1024 tokens" in index
    [row] = [line.split() for line in index.splitlines() if "MAC (looked up)" in line]
    assert row == "MAC (looked up) 0.140 20.0 10.1 30.3 4.2 13.7 2.1 10.0 2.00 7.00".split()


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
        ("i", [kernel_row(engine="FLASHINFER", rule="index", head_size=128), kernel_row(**INDEX_ROW)]),
    ):
        plots.plot(rows, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(BenchError, match="choose files of one benchmark"):
        plots.plot([kernel_row(), decode_row()], tmp_path / "x.png")


def test_a_plot_without_matplotlib_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("decode", "--model", "m", "--context", "8", "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == 2 and "`pip install matplotlib`" in result.output
