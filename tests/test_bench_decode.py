"""`vllm-mac bench decode`: engines in processes of their own, and one whole run on the CPU."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from support import ROOT
from support.bench_runs import EACH, PROVENANCE, RESULT, fake_engine
from vllm_mac.tools import environment
from vllm_mac.tools.bench import decode, row_files, row_tables
from vllm_mac.tools.bench.decode_engine import of_whole_batch


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
    assert rows[0]["ttft_p50"] == 7.0 and rows[0]["metadata_p50"] == 0.1 and rows[0]["graph_p50"] == 0.5
    assert rows[0]["hit_rate"] == 0.5
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


def test_backends_take_turns_and_the_middle_round_is_shown(monkeypatch, tmp_path):
    """Each round is another process; a round without a result leaves the others."""
    log = tmp_path / "log"
    fake_engine(
        monkeypatch,
        f"""
name = spec["llm"]["attention_backend"]
made = open({str(log)!r}, "a+"); made.write(name + "\\n"); made.seek(0)
turn = made.read().split().count(name)
if (name, turn) == ("SLOW", 2):
    os._exit(9)
step = {{"MAC": [3.0, 1.0, 2.0], "SLOW": [8.0, 0.0, 6.0]}}[name][turn - 1]
for i, _ in enumerate(spec["shapes"]):
    tell(shape=i, result={RESULT} | dict(step_ms=[step + i]))
tell(done=True)""",
    )
    rows, told = decoded(((1, 100), (2, 50)), backends=("MAC", "SLOW"), rounds=3)
    assert log.read_text().split() == ["MAC", "SLOW"] * 3 and sum(done for _, done in told) == len(rows) == 12
    assert [row["round"] for row in rows] == [1] * 4 + [2] * 4 + [3] * 4
    decode.compare(rows)
    first = {(row["engine"], row["round"]): row for row in rows if row["batch"] == 1}
    assert [first["MAC", i]["speedup"] for i in (1, 2, 3)] == [2.0, 6.0, 3.0]  # of the middle one of SLOW's, 6.0 ms
    assert first["SLOW", 1]["speedup"] == 0.25 and "error" in first["SLOW", 2]
    shown = row_files.middle_rounds(rows)
    assert [(row["engine"], row["batch"], row.get("p50"), row.get("rounds")) for row in shown] == [
        ("MAC", 1, 2.0, [1.0, 2.0, 3.0]), ("MAC", 2, 3.0, [2.0, 3.0, 4.0]),
        ("SLOW", 1, 6.0, [6.0, 8.0]), ("SLOW", 2, 7.0, [7.0, 9.0]),
        ("SLOW", 1, None, None), ("SLOW", 2, None, None),
    ]  # fmt: skip
    told = io.StringIO()
    every = {"ttft_p50": 12345.6, "graph_p50": 12.345, "metadata_p50": 0.123}
    wide = [{**row, **environment.environment(), **every} for row in rows if "error" not in row]
    row_tables.show(wide, Console(file=told, width=80))
    text = " ".join(told.getvalue().split())
    assert "rounds" in text and max(map(len, told.getvalue().splitlines())) <= 80 and "…" not in text
    assert {"1.000", "3.000", "6.000", "8.000", "12346", "12.345"} <= set(text.split())


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
        "import signal, sys, pytest\nsys.path.insert(0, sys.argv.pop(1))\nfrom support import bench_runs\nimport vllm_mac.tools.cli\n"
        # A shell starts what it runs in the background with this signal ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"bench_runs.fake_engine(pytest.MonkeyPatch(), {body!r})\nvllm_mac.tools.cli.main()\n"
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
    from support.tiny_models import write

    model, rows = write("llama", tmp_path / "models"), tmp_path / "rows.json"
    keys = {"rule": "match", "window": 32, "band": 16, "min_context": 64}
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


@pytest.mark.parametrize(
    "graphs, taken", [("a" * 24, 24), ("a" * 9 + "b" * 15, 9), ("a" * 7 + "b" * 17, 0), ("abc" * 8, 0), ("", 0)]
)
def test_graphs_are_timed_until_a_request_ends(graphs, taken):
    """Of a smaller batch another one is replayed; pieces of steps, or a drafter's beside them, are none of a step."""
    assert of_whole_batch([(graph, i, i + 1) for i, graph in enumerate(graphs)]) == [
        ("a", i, i + 1) for i in range(taken)
    ]
