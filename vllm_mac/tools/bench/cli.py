"""The commands `vllm-mac bench ...`. Importing it imports neither torch nor vLLM."""

import math
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from vllm_mac.tools import ToolError, option_types, terminal
from vllm_mac.tools.option_types import Engine, Json, Mac, Plot, Seed, ShowProgress

app = typer.Typer(
    no_args_is_help=True,
    help="Measure MAC beside exact attention. Each row has GPU, versions, command line and commit. Outside a checkout the "
    "commit is the value of MAC_ATTENTION_COMMIT, or unknown.",
)
_heads = option_types.pairs(
    "/", "query heads/KV heads such as 32/8, the former a multiple of the latter", lambda h, k: h % k == 0
)
RATES, LAGS, MEAN_LAG = "0,0.5,0.75,0.9,0.97,0.99,1", ("geometric", "uniform", "constant"), 64
_shapes = option_types.pairs("x", "requests at once x prompt tokens such as 1x122880")


@app.command()
def kernel(
    batch: Annotated[str, typer.Option(help="Rows that decode together.")] = "1,16,64",
    context: Annotated[str, typer.Option(help="Tokens in each row's KV cache.")] = "131072",
    heads: Annotated[str, typer.Option(help="Query heads/KV heads.")] = "32/8,32/4",
    head_size: Annotated[int, typer.Option(min=32, max=256)] = 128,
    rule: Annotated[
        str | None, typer.Option(help="index or match; by default what --mac says, else MAC's default.")
    ] = None,
    hit_rate: Annotated[
        str | None,
        typer.Option(help=f"match: shares of heads that hit, each head independently; {RATES} by default."),
    ] = None,
    window: Annotated[int | None, typer.Option(help="match: MAC's window; 512 by default.")] = None,
    band: Annotated[int | None, typer.Option(help="MAC's band; 256 by default.")] = None,
    mean_lag: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"match: mean distance to the matched position, before it is clipped; {MEAN_LAG} by default."
        ),
    ] = None,
    lags: Annotated[
        str | None,
        typer.Option(
            help="match: distribution of that distance: geometric, uniform or constant; geometric by default."
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    page: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a KV page; 16 by default, 64 with an index.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Layers in a graph; by default 24, 12 or 5, by batch.")
    ] = None,
    between: Annotated[
        int, typer.Option(min=0, help="MiB of other memory to read between layers, as a model reads its weights.")
    ] = 0,
    baselines: Annotated[
        str, typer.Option(help="Exact engines: FLASHINFER, FLASH_ATTN, or none.")
    ] = "FLASHINFER,FLASH_ATTN",
    mac: Mac = "{}",
    seed: Seed = 0,
    json_path: Json = None,
    plot: Plot = None,
    progress: ShowProgress = True,
) -> None:
    """Time one layer's decode attention in CUDA-graph replay, MAC beside the best exact decode.

    --batch, --context, --heads and --hit-rate take lists separated by commas; every combination is measured. For each
    shape FlashInfer with tensor cores and FlashAttention run first (the faster one is "best exact"), then MAC. Results
    are compared with float32 PyTorch before anything is timed; a wrong result ends the run.

    With --rule index rows are decoded by the index of keys: looked up first, then read whole, which is what rows below
    min_context and small steps cost. Keys spread out less from direction to direction, and an eighth of the tokens weigh
    more than 0.7 times the average one in some head of their KV group. "KV read" counts the index. The table also shows
    what each of the kernels (weigh, look, merge) adds to those before it.

    With --rule match there is a row for each hit rate. The data decide the hits: a head's ring has an entry near its
    query, at a random lag, or it has none. For contexts below MAC's min_context there is one row, without matches.

    A graph holds several layers, each with its own queries, KV and rings, so that the GPU's caches do not help. Times
    are per layer. "begin" is the work of a step that all layers share.

    Layers run back to back, which hides the latency of kernel launches. With --between, each layer follows a read of
    other memory, as in a model (a layer of Llama-3.1-8B has 416 MiB of weights); the time of the read is subtracted.

    With --rule match alone it takes about 3 minutes and 50 GiB on an H200.
    """
    batches, contexts = (
        option_types.parse("--batch", option_types.numbers(int, 1, math.inf), batch),
        option_types.parse("--context", option_types.numbers(int, 2, math.inf), context),
    )
    pairs, rates = (
        option_types.parse("--heads", _heads, heads),
        option_types.parse("--hit-rate", option_types.numbers(float, 0, 1), RATES if hit_rate is None else hit_rate),
    )
    exact = () if baselines == "none" else option_types.names(baselines)
    keys = option_types.parse("--mac", option_types.mapping, mac)
    keys |= {key: value for key, value in (("window", window), ("band", band)) if value is not None}
    if rule is not None:
        option_types.choice("--rule", rule, ("index", "match"))
        keys["rule"] = rule
    option_types.choice("--lags", LAGS[0] if lags is None else lags, LAGS)
    option_types.choice("--dtype", dtype, ("bfloat16", "float16"))
    for name in exact:
        option_types.choice("--baselines", name, ("FLASHINFER", "FLASH_ATTN", "none"))
    with _results(json_path, plot) as rows:
        from vllm_mac.config import resolve
        from vllm_mac.tools.bench.kernel import PAGES, KernelBench, require_cuda, run

        require_cuda()
        config = resolve(keys)
        if config.rule != "match":
            option_types.only_of_match({"--hit-rate": hit_rate, "--mean-lag": mean_lag, "--lags": lags}, "--rule match")
        bench = KernelBench(
            batches=batches, contexts=contexts, heads=pairs, hit_rates=rates, config=config, head_size=head_size,
            dtype=dtype, page=page or PAGES[config.rule], lags=lags or LAGS[0], mean_lag=mean_lag or MEAN_LAG,
            layers=layers, seed=seed, baselines=exact, between=between,
        )  # fmt: skip
        # Two steps more than rows: the read bandwidth, and filling the KV cache.
        with terminal.progress(progress, bench.measurements() + 2) as report:
            for row in run(bench, report):
                rows.append(row)


@app.command()
def decode(
    model: Annotated[
        str, typer.Option(help="A model's folder or name, or shape:llama-3.1-8b for that shape with random weights.")
    ],
    context: Annotated[int | None, typer.Option(min=1, help="Prompt tokens of each request.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Requests that decode together, each with its own prompt; 1 by default.")
    ] = None,
    shapes: Annotated[
        str | None,
        typer.Option(
            help="Instead of both: several pairs BATCHxCONTEXT, such as 1x122880,8x100000, measured one after another."
        ),
    ] = None,
    backends: Annotated[
        str | None,
        typer.Option(
            help="Names of backends; 'default' is vLLM's choice. By default MAC,FLASHINFER,FLASH_ATTN on GPUs, else MAC,default."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Decode steps to time.")] = 64,
    rounds: Annotated[
        int, typer.Option(min=1, help="Engines of each backend, one after another; backends take turns.")
    ] = 1,
    prompt: Annotated[
        str, typer.Option(help="A text file, 'words' (random words) or 'ids' (random tokens).")
    ] = "words",
    load_format: Annotated[str | None, typer.Option(help="vLLM's load_format; dummy for random weights.")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="vLLM's max_model_len; by default just long enough.")
    ] = None,
    eager: Annotated[bool, typer.Option("--eager", help="No CUDA graphs and no compilation.")] = False,
    prefills: Annotated[int, typer.Option(min=1, help="Prefills of the prompts, to time the first token.")] = 1,
    mac: Mac = "{}",
    engine: Engine = "{}",
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds that one stage may take: the start, the warm-up, one prefill of the prompts, the decoding."
        ),
    ] = 1200,
    seed: Seed = 0,
    json_path: Json = None,
    plot: Plot = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show what the engines print.")] = False,
    progress: ShowProgress = True,
) -> None:
    """Time a whole vLLM engine per output token, one backend after another.

    Each backend runs in its own process, with one engine for all shapes; a failure becomes a row with its error. For
    each shape the engine warms up on the first 4096 tokens of each prompt. Then it prefills the prompts PREFILLS times,
    each time with an empty prefix cache, so that every time to first token is of a whole prompt. Decoding continues
    after the last prefill. Only steps in which every request gets a token are timed: the time from one such step to the
    next. The hit rate and the share of KV read are of the timed steps. The command also works on CPUs.

    Steps of a few milliseconds follow the host, and vary from process to process by more than backends differ. With
    --rounds 3 each backend starts three engines, in turns. The table shows the middle one, and how far they lie apart.

    VLLM_* variables reach the engines: VLLM_ENABLE_V1_MULTIPROCESSING=0 keeps each in one process.
    """
    from vllm_mac.tools.bench.decode import OWN, DecodeBench, compare, run

    keys, arguments = (
        option_types.parse("--mac", option_types.mapping, mac),
        option_types.parse("--engine", option_types.mapping, engine),
    )
    if (shapes is None) == (context is None) or (shapes and batch):
        raise typer.BadParameter(
            "choose either --context, with --batch where it is not 1, or --shapes", param_hint="--shapes"
        )
    wanted = ((batch or 1, context),) if context else option_types.parse("--shapes", _shapes, shapes or "")
    with _results(json_path, plot) as rows:
        on_gpu = rows.environment["gpu"] is not None
        names = option_types.names(backends or ("MAC,FLASHINFER,FLASH_ATTN" if on_gpu else f"MAC,{OWN}"))
        bench = DecodeBench(
            model=model, shapes=wanted, tokens=tokens, backends=names, prompt=prompt, seed=seed, load_format=load_format,
            max_model_len=max_model_len, eager=eager, rounds=rounds, prefills=prefills, mac=keys, engine=arguments,
            timeout=timeout, verbose=verbose,
        )  # fmt: skip

        def keep(row: dict) -> None:
            rows.append(row)
            if "error" in row:
                print(
                    f"{row['engine']}, batch {row['batch']}, {row['context']} tokens: {row['error']}", file=sys.stderr
                )

        with terminal.progress(progress, rounds * len(names) * len(wanted), done=True) as report:
            try:
                run(bench, report, keep)
            finally:
                compare(rows)
    if any("error" in row for row in rows):
        raise typer.Exit(1)


@app.command()
def show(
    files: Annotated[list[Path], typer.Argument(help="Files written by --json.")],
    plot: Plot = None,
) -> None:
    """Print the tables of earlier results together, and plot them."""
    from vllm_mac.tools.bench import plots, row_tables
    from vllm_mac.tools.bench.row_files import load

    try:
        rows = [row for path in files for row in load(path)]
        row_tables.show(rows, terminal.console())
        if plot is not None:
            plots.plot(rows, plot)
    except ToolError as error:
        terminal.fail(error)


class _Rows(list):
    """Rows; each gets the facts of the environment when it is added."""

    def __init__(self, environment: dict):
        self.environment = environment

    def append(self, row: dict) -> None:
        super().append({**row, **self.environment})


@contextmanager
def _results(json_path: Path | None, plot: Path | None):
    """A list to add rows to. They are shown, saved and plotted at the end, also after Ctrl-C or an error."""
    from vllm_mac.config import MacConfigError
    from vllm_mac.tools.bench import plots, row_tables
    from vllm_mac.tools.bench.row_files import save
    from vllm_mac.tools.environment import environment
    from vllm_mac.tools.plotting import require_matplotlib

    code, rows = 0, None
    try:
        if plot is not None:
            require_matplotlib()  # better now than after the measurements
        rows = _Rows(environment())
        yield rows
    except (ToolError, MacConfigError, ImportError) as error:
        code = terminal.complain(error)
    except KeyboardInterrupt:
        print("interrupted; the measurements made until then follow", file=sys.stderr)
        code = 130
    finally:
        if rows:
            row_tables.show(rows, terminal.console())
            if json_path is not None:
                save(rows, json_path)
                print(f"{len(rows)} rows in {json_path}", file=sys.stderr)
            if plot is not None:
                try:
                    plots.plot(rows, plot)
                except ToolError as error:
                    code = code or terminal.complain(error)
    if code:
        raise typer.Exit(code)
