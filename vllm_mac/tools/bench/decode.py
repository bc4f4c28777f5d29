"""`vllm-mac bench decode`: time per output token of a whole vLLM engine, one backend after another.

Each backend runs in its own process (`decode_engine`): its memory is free afterwards, and a crash becomes a row with
an error. A process measures one shape of requests after another. This module starts the processes and turns their
messages into rows.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

from vllm_mac.tools.bench import BenchError
from vllm_mac.tools.bench.row_files import middle_rounds, quantiles
from vllm_mac.tools.engine_process import follow

# -P: import the installed package, not a folder of that name in the working directory.
COMMAND = (sys.executable, "-P", "-m", "vllm_mac.tools.bench.decode_engine")
OWN = "default"  # the platform's own choice of backend
SHAPE = "shape:"
# Shapes of models that need no download. Their weights are random, see `dummy_weights`, and they have no tokenizer.
SHAPES = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192},
        "hidden_act": "silu", "bos_token_id": 128000, "eos_token_id": 128001, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "torch_dtype": "bfloat16",
    },
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class DecodeBench:
    """What to measure.

    shapes: requests at once, and prompt tokens of each. tokens: decode steps to time. rounds: engines of each backend, one
    after another; backends take turns. prefills: times that the prompts are prefilled. prompt: `words`, `ids` or a text
    file. mac: inline keys of MAC. engine: further arguments of `vllm.LLM`. timeout: seconds for one stage of a backend.
    """

    model: str
    shapes: tuple[tuple[int, int], ...]
    tokens: int = 64
    rounds: int = 1
    backends: tuple[str, ...] = ("MAC", OWN)
    prompt: str = "words"
    seed: int = 0
    load_format: str | None = None
    max_model_len: int | None = None
    eager: bool = False
    prefills: int = 1
    mac: dict = field(default_factory=dict)
    engine: dict = field(default_factory=dict)
    timeout: float = 1200.0
    verbose: bool = False


def run(bench: DecodeBench, report: Callable[[str, int], None], keep: Callable[[dict], None]) -> None:
    """Measure each shape with each backend.

    report(stage, rows): called when a backend begins a stage, with the number of rows finished since the last call.
    keep(row): called for each row, as soon as it exists. There is one row for each round, backend and shape; it has an
    error where there is no result.
    """
    with tempfile.TemporaryDirectory(prefix="vllm-mac-bench-") as folder:
        spec = _spec(bench, Path(folder))
        for i, backend in product(range(bench.rounds), bench.backends):
            own = {"round": i + 1} if bench.rounds > 1 else {}
            _run_backend(bench, backend, spec, Path(folder), report, lambda row: keep(row | own))


def compare(rows: list[dict]) -> None:
    """Add to each row its speed-up over the fastest of the other backends with the same shape, by their middle rounds."""
    for row in rows:
        of_shape = [r for r in rows if "p50" in r and (r["batch"], r["context"]) == (row["batch"], row["context"])]
        others = [r["p50"] for r in middle_rounds(of_shape) if r["engine"] != row["engine"]]
        if others and "p50" in row:
            row["speedup"] = min(others) / row["p50"]


def _spec(bench: DecodeBench, folder: Path) -> dict:
    """The specification that the processes of all backends share."""
    model, load_format, sharpen = bench.model, bench.load_format, False
    if model.startswith(SHAPE):
        name = model.removeprefix(SHAPE)
        if name not in SHAPES:
            raise BenchError(f"--model: no shape {name!r}, choose from {', '.join(SHAPE + known for known in SHAPES)}")
        model, load_format = str(folder / name), load_format or "dummy"
        sharpen = load_format == "dummy"
        Path(model).mkdir()
        (Path(model) / "config.json").write_text(json.dumps(SHAPES[name]), encoding="utf-8")
    if bench.prompt not in ("words", "ids") and not Path(bench.prompt).is_file():
        raise BenchError(f"--prompt: no file {bench.prompt!r}; choose a text file, words or ids")
    # Requests that are prefilled first decode while the others are prefilled.
    needed = max(context + bench.tokens + batch * (context // 2048 + 2) + 32 for batch, context in bench.shapes)
    llm = {
        "model": model,
        "max_model_len": bench.max_model_len or needed,
        "max_num_seqs": max(batch for batch, _ in bench.shapes),
        "enforce_eager": bench.eager,
        "seed": bench.seed,
        "disable_log_stats": True,
    }
    if load_format is not None:
        llm["load_format"] = load_format
    return {
        "llm": llm | bench.engine,
        "sharpen": sharpen,
        **{k: v for k, v in asdict(bench).items() if k not in ("mac", "engine", "backends")},
    }


def _run_backend(bench: DecodeBench, backend: str, spec: dict, folder: Path, report, keep) -> None:
    llm = dict(spec["llm"])
    if backend != OWN:
        llm["attention_backend"] = backend
    if backend == "MAC":
        llm["additional_config"] = {**llm.get("additional_config", {}), "mac": bench.mac}
    specification = folder / f"{backend}.json"
    specification.write_text(json.dumps(spec | {"llm": llm}), encoding="utf-8")
    made = 0

    def receive(message: dict) -> None:
        nonlocal made
        if "stage" in message:
            report(f"{backend}: {message['stage']}", 0)
        else:
            batch, context = bench.shapes[message["shape"]]
            made += 1
            keep(_row(bench, backend, batch, context, message["result"]))
            report(f"{backend}: batch {batch}, {context} tokens: done", 1)

    error = follow([*COMMAND, str(specification)], folder / f"{backend}.log", receive, bench.timeout, bench.verbose)
    if error is None:
        return
    for i, (batch, context) in enumerate(bench.shapes[made:]):
        # The error that ended the engine in one shape is also why the later shapes have no result.
        why = error if i == 0 else f"not measured: {error.splitlines()[-1]}"
        keep(_row(bench, backend, batch, context, {"error": why}))
        report(f"{backend}: batch {batch}, {context} tokens: no result", 1)


def _row(bench: DecodeBench, backend: str, batch: int, context: int, result: dict) -> dict:
    row = {
        "bench": "decode", "engine": backend, "model": bench.model, "context": context, "batch": batch,
        "seed": bench.seed, "load_format": bench.load_format, "graphs": not bench.eager, "engine_args": bench.engine,
    }  # fmt: skip
    if "error" in result:
        return {**row, "error": result["error"]}
    row |= {"mac": bench.mac} if backend == "MAC" else {}
    steps = result.pop("step_ms")
    row |= quantiles(steps) | {"mean": fmean(steps), "samples": bench.tokens}
    several = {"ttft": result["ttft_ms"], "metadata": result.pop("metadata_ms"), "graph": result.pop("graph_ms")}
    for what, times in several.items():
        row |= {f"{what}_{name}": value for name, value in quantiles(times).items()} if times else {}
    return row | result
