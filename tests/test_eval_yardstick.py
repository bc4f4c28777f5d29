"""`vllm-mac eval --yardstick`, figures of tasks without a score, and what tables and plots show of both."""

import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from support.eval_runs import ENVIRONMENT, fake_engine, invoke, made, options
from vllm_mac.tools.eval import EvalError, evaluation, plots, requests, result_tables, statistics
from vllm_mac.tools.eval.yardstick import OWN, ROUNDING, Yardstick, choose

VOCABULARY, STEPS = 50, 40
YARD = Yardstick("FLASH_ATTN instead of FLASHINFER", {"attention_backend": "FLASH_ATTN"}, {"SOME_VARIABLE": "7"})


def logprobs(noise: float) -> np.ndarray:
    """`[STEPS, VOCABULARY]`: exact's where noise is 0, and farther from them the more of it."""
    draw = np.random.default_rng(3)
    logits = draw.normal(0, 3, (STEPS, VOCABULARY)) + noise * draw.normal(0, 1, (STEPS, VOCABULARY))
    return (logits - np.log(np.exp(logits).sum(1, keepdims=True))).astype(np.float32)


def engine(monkeypatch, tmp_path, noise: dict[str, float], dies="False") -> Path:
    """Fake engines whose forced texts are as noisy as told by name; returns the folder of their specs."""
    ids = np.tile(np.arange(VOCABULARY, dtype=np.int32), (STEPS, 1))
    for name, size in noise.items():
        arrays = {f"{r.id}:{kind}": x for r in made() for kind, x in (("ids", ids), ("logprobs", logprobs(size)))}
        np.savez(tmp_path / f"{name}.npz", vocabulary=VOCABULARY, **arrays)
    counters = [["vllm_mac_heads_total", {"layer": "a", "outcome": k}, v] for k, v in (("hit", 6), ("exact", 2))]
    counters += [["vllm_mac_exact_total", {"reason": k}, v] for k, v in (("short_context", 0.5), ("small_step", 1.5))]
    counters += [["vllm_mac_kv_tokens_total", {"layer": "a", "kind": k}, v] for k, v in (("read", 2), ("skipped", 6))]
    fake_engine(
        monkeypatch, dies,
        f"import shutil; work = Path({str(tmp_path)!r})\n"
        "(work / f'{name}.json').write_text(json.dumps(spec['llm'] | {'variable': os.environ.get('SOME_VARIABLE')}))\n"
        "(folder / 'counters').mkdir(exist_ok=True)\n"
        f"if name not in ('exact', 'yardstick'): (folder / 'counters' / 'ruler-99.0.json').write_text({json.dumps(counters)!r})\n"
        "if spec['kl']: shutil.copy(work / f'{name}.npz', folder / 'forced.npz')",
    )  # fmt: skip
    return tmp_path


def done(monkeypatch, tmp_path, noise=None, **changes):
    engine(monkeypatch, tmp_path, {"exact": 0.0, "yardstick": 0.1, "one": 0.3} if noise is None else noise)
    changes = {"yardstick": YARD, "kl": 2, "exact": "FLASHINFER"} | changes
    return evaluation.run(options(tmp_path, **changes), made(), ENVIRONMENT, lambda *_: None)


def shown(found, width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    result_tables.show(found, console)
    return console.file.getvalue()


def test_the_yardstick_is_another_exact_engine_on_the_same_texts(monkeypatch, tmp_path):
    found = done(monkeypatch, tmp_path)
    asked = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("exact", "yardstick", "one")}
    assert [asked[name]["attention_backend"] for name in asked] == ["FLASHINFER", "FLASH_ATTN", "MAC"]
    assert [asked[name]["variable"] for name in asked] == [None, "7", None]
    assert "additional_config" not in asked["yardstick"]
    assert [row["configuration"] for row in found["totals"]] == ["exact", "yardstick", "one"]
    assert found["configuration"]["yardstick"]["said"] == YARD.said and found["yardstick"] == {"identical": False}
    opts = options(tmp_path, yardstick=YARD, kl=2)
    assert evaluation.steps(opts, made()) == 3 * (5 + 2)


def test_figures_of_the_yardstick_are_those_of_the_formulas(monkeypatch, tmp_path):
    found = done(monkeypatch, tmp_path)
    ids = np.tile(np.arange(VOCABULARY), (STEPS, 1))
    kl = {
        name: statistics.kl(ids, logprobs(0), ids, logprobs(size), VOCABULARY)
        for name, size in (("yardstick", 0.1), ("one", 0.3))
    }
    best = logprobs(0).argmax(1)
    _, yard, one = found["totals"]
    for row, name, size in ((yard, "yardstick", 0.1), (one, "one", 0.3)):
        # Every forced text is the same here: pooling them changes no mean and no quantile beyond its interpolation.
        assert row["kl_mean"] == pytest.approx(kl[name].mean()) and row["kl_max"] == pytest.approx(kl[name].max())
        assert row["kl_times"] == pytest.approx(kl[name].mean() / kl["yardstick"].mean())
        assert row["same_best"] == pytest.approx((logprobs(size).argmax(1) == best).mean())
        assert row["kl_tokens"] == 5 * STEPS and row["kl_texts"] == 5
        assert min(kl[name]) <= row["kl_p50"] < row["kl_p99"] <= row["kl_max"]
    assert yard["kl_times"] == 1 and one["kl_times"] > 2 and one["same_best"] < yard["same_best"]
    # Its answers: [1, 9] where exact's are [1, 5].
    assert (yard["score"], yard["difference"], yard["same_answers"]) == (0.0, -1.0, 0.0)
    assert (yard["agreed_share"], yard["agreed_p50"]) == (0.5, 1.0) and found["divergence"]["yardstick"] == [1] * 5
    assert "hit_rate" not in yard and one["hit_rate"] == 0.75 and one["read_share"] == 0.25
    assert one["exact_share"] == {"short_context": 0.0625, "small_step": 0.1875}
    for rows in (found["rows"], found["tasks"]):
        assert {row["configuration"] for row in rows} == {"exact", "yardstick", "one"}
        assert all(row["kl_times"] > 0 for row in rows if row["configuration"] != "exact")


def test_every_table_and_plot_has_the_yardstick(monkeypatch, tmp_path):
    found = done(monkeypatch, tmp_path)
    text = result_tables.markdown(found)
    assert "yardstick: FLASH_ATTN instead of FLASHINFER, on the same prompts and forced texts." in text
    assert "one: 25.0% of the heads were decoded exactly: small_step 18.8%, short_context 6.2%." in text
    *tables, layers = text.split("\n## ")[1:]
    assert layers.startswith("By layer") and len(tables) == 6
    for table in tables:
        cells = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")
        ]
        at = cells[0].index("configuration")
        assert {row[at] for row in cells[2:]} >= {"yardstick", "one"}, table
        if "x yardstick" in cells[0]:
            times = {row[at]: row[cells[0].index("x yardstick")] for row in cells[2:]}
            assert times["yardstick"] == "1" and float(times["one"]) > 2
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == found
    labels = lambda figure: {text for axes in figure.axes for text in axes.get_legend_handles_labels()[1]}
    assert labels(plots.scores(found)) == {"exact", "yardstick", "MAC (one)"}
    assert labels(plots.divergence(found)) == labels(plots.by_reads(found)) == {"yardstick", "MAC (one)"}
    reads = next(axes for axes in plots.by_reads(found).axes if axes.get_title().startswith("ruler, 99 tokens"))
    yard = next(row for row in found["rows"] if row["configuration"] == "yardstick" and row["group"] == "ruler")
    line = next(line for line in reads.lines if line.get_label() == "yardstick")
    assert set(line.get_ydata()) == {yard["kl_mean"]}
    written = {path.name for path in result_tables.write(found, tmp_path)}
    assert {"results.md", "scores.png", "reads.png", "divergence.png", "layers.png"} <= written


@pytest.mark.parametrize(
    "noise, said, times",
    [
        ({"exact": 0.0, "yardstick": 0.0, "one": 0.3}, "Its results are identical to exact's", False),
        (
            {"exact": 0.0, "yardstick": 1e-4, "one": 0.3},
            "not above 1e-06 nats, the precision of KL: no multiples",
            False,
        ),
        ({"exact": 0.0, "yardstick": 0.1, "one": 0.3}, "on the same prompts and forced texts.", True),
    ],
)
def test_a_yardstick_that_measures_nothing_is_said_to(noise, said, times, monkeypatch, tmp_path):
    monkeypatch.setattr(statistics, "first_difference", lambda a, b: None)  # all answers are the same
    found = done(monkeypatch, tmp_path, noise)
    assert said in result_tables.yardstick(found) and ("kl_times" in found["totals"][2]) == times
    assert found["yardstick"]["identical"] == (noise["yardstick"] == 0)


def test_other_answers_are_not_identical_whatever_the_forced_texts(monkeypatch, tmp_path):
    assert done(monkeypatch, tmp_path, {"exact": 0.0, "yardstick": 0.0, "one": 0.3})["yardstick"] == {
        "identical": False
    }


def test_without_forced_texts_nothing_is_said_to_be_identical(monkeypatch, tmp_path):
    found = done(monkeypatch, tmp_path, kl=0)
    assert found["yardstick"] == {"identical": None} and "Without forced texts (--kl 0)" in result_tables.yardstick(
        found
    )
    assert "kl_mean" not in found["totals"][1] and "Next token" not in result_tables.markdown(found)


def test_without_a_yardstick_one_line_says_so(monkeypatch, tmp_path):
    found = done(monkeypatch, tmp_path, yardstick=None)
    assert found["yardstick"] is None and not (tmp_path / "out" / "yardstick").exists()
    assert (
        result_tables.markdown(found).count("No yardstick (--yardstick)")
        == shown(found, 100).count("No yardstick (--yardstick)")
        == 1
    )
    assert "kl_times" not in found["totals"][1] and "kl_mean" in found["totals"][1]


def test_a_yardstick_that_fails_leaves_the_others(monkeypatch, tmp_path):
    engine(monkeypatch, tmp_path, {"exact": 0.0, "yardstick": 0.1, "one": 0.3}, dies="name == 'yardstick'")
    found = evaluation.run(options(tmp_path, yardstick=YARD, kl=2), made(), ENVIRONMENT, lambda *_: None)
    assert [row["configuration"] for row in found["totals"]] == ["exact", "one"] and "out of luck" in found["errors"][
        "yardstick"
    ]
    assert "It has no results." in result_tables.yardstick(found) and "kl_times" not in found["totals"][1]


def test_a_run_goes_on_with_its_own_yardstick_only(monkeypatch, tmp_path):
    done(monkeypatch, tmp_path)
    with pytest.raises(EvalError, match="yardstick: there .*FLASH_ATTN.*, now None"):
        evaluation.run(options(tmp_path, kl=2, exact="FLASHINFER", resume=True), made(), ENVIRONMENT, lambda *_: None)


@pytest.mark.parametrize(
    "text, exact, on_gpu, said",
    [
        (
            "FLASH_ATTN",
            OWN,
            False,
            "--yardstick: received 'FLASH_ATTN'; on CPUs vLLM has no second exact backend. Choose chunks",
        ),
        ("", OWN, False, "--yardstick: received ''; on CPUs"),
        (
            "FLASHINFER",
            "FLASHINFER",
            True,
            "the backend that is compared with; choose another exact backend, such as FLASH_ATTN, TRITON_ATTN",
        ),
        (
            "MAC",
            "FLASHINFER",
            True,
            "received 'MAC'; choose another exact backend of vLLM's, such as FLASH_ATTN, TRITON_ATTN",
        ),
        (
            "FLASHATTN",
            "FLASH_ATTN",
            True,
            "received 'FLASHATTN'; choose another exact backend of vLLM's, such as FLASHINFER, TRITON_ATTN",
        ),
        ("chunks", "FLASHINFER", True, "received 'chunks'; choose another exact backend"),
    ],
)
def test_what_is_no_yardstick_is_refused(text, exact, on_gpu, said):
    with pytest.raises(EvalError) as caught:
        choose(text, exact, on_gpu)
    assert said in str(caught.value)


def test_what_is_a_yardstick():
    assert choose("chunks", OWN, False) is ROUNDING["chunks"]
    assert choose("FLASH_ATTN", "FLASHINFER", True).llm == {"attention_backend": "FLASH_ATTN"}
    assert choose("FLASH_ATTN", OWN, True).said == "FLASH_ATTN instead of the backend that vLLM chooses"


@pytest.mark.cpu
def test_a_wrong_yardstick_ends_before_anything_begins(tmp_path):
    code, output = invoke("--model", tmp_path, "--out", tmp_path / "out", "--yardstick", "FLASH_ATTN")
    assert code == 2 and "--yardstick: received 'FLASH_ATTN'; on CPUs" in output and not (tmp_path / "out").exists()


# Without a score


def test_what_has_no_right_answer_has_no_score(monkeypatch, tmp_path):
    """The prompts of made() are of two groups, of which one has answers."""
    found = done(monkeypatch, tmp_path)
    row = next(row for row in found["rows"] if row["group"] == "prompts" and row["configuration"] == "one")
    assert row["scored"] == 0 and not {"score", "difference", "score_low"} & row.keys() and row["agreed_p50"] == 1
    assert [row["scored"] for row in found["totals"]] == [4, 4, 4]
    assert "| prompts | - | one | 1 | no score | - | 0.0 | 50.0 | 1 |" in result_tables.markdown(found)
    assert "5 (4 scored)" in shown(found, 100)
    unscored = [requests.Request(f"prompts/{i}", "prompts", "prompts", None, (i,), 5, "go on") for i in range(3)]
    found = evaluation.run(options(tmp_path / "2", out=tmp_path / "2"), unscored, ENVIRONMENT, lambda *_: None)
    assert plots.scores(found) is None and "score" not in found["totals"][0]
    assert "| exact | 3 | no score | - | - | - | - |" in result_tables.markdown(found)


@pytest.mark.parametrize("width", [80, 100])
def test_tables_fit_the_terminal(width, monkeypatch, tmp_path):
    """No cell is cut short, and no word is broken."""
    found = done(monkeypatch, tmp_path, {"exact": 0.0, "yardstick": 0.1, "one-limit": 0.3}, mac={"one-limit": {}})
    for row in (*found["totals"], *found["rows"]):
        if "score" in row:
            row |= {"score": 0.963, "score_low": 0.941, "score_high": 0.981}
        if "difference" in row:
            row |= {"difference": -0.0213, "difference_low": -0.0331, "difference_high": -0.0104}
        if row.get("group") == "ruler":
            row |= {"length": 131072}
    text = shown(found, width)
    assert "…" not in text and max(map(len, text.splitlines())) <= width
    for title, columns, rows in result_tables.tables(found)[: result_tables.SHOWN]:
        following = [
            other for other, *_ in result_tables.tables(found) if other != title and text.find(other) > text.find(title)
        ]
        part = text.partition(title)[2].partition(following[0] if following else result_tables.NOTE[:20])[0]
        columns = [column for column in columns if column not in result_tables.WHERE]
        cells = Counter(word for _, read in columns for row in rows for word in result_tables.cell(read, row).split())
        assert cells <= Counter(part.split()) and {word for name, _ in columns for word in name.split()} <= set(
            part.split()
        ), title
