"""The findings of the doctor, as text and tables."""

from dataclasses import asdict
from itertools import groupby

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vllm_mac.capabilities import FP8_DTYPES
from vllm_mac.tools.doctor.checks import OK, PROBLEM, UNCHECKED, WARNING, Finding
from vllm_mac.tools.doctor.estimate import LAG, PAYS, RATE, READ, Estimate
from vllm_mac.tools.doctor.model import Examined, groups

COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red", UNCHECKED: "dim"}


def status(findings: list[Finding]) -> int:
    marks = {one.mark for one in findings}
    return 2 if PROBLEM in marks else 1 if WARNING in marks else 0


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def facts(name: str, model: Examined) -> dict:
    """A model's part of the report, as plain data for JSON."""
    ring = dict(zip(("ring_bytes", "rings_that_fit", "rings_wanted"), model.ring, strict=True)) if model.ring else {}
    room = {} if model.index is None else {"index": asdict(model.index)}
    return {
        "name": name, "refused": model.refused, "unbuilt": model.unbuilt, "max_model_len": model.max_model_len,
        "kv_cache_dtype": model.kv_cache_dtype,
        "weight_bytes": model.weight_bytes(1), "notes": model.notes, **ring, **room,
        "layers": [
            {"name": layer.name, "index": layer.index, "state": layer.state, "reason": layer.reason}
            for layer in model.layers
        ],
    }  # fmt: skip


def of_layers(model: Examined) -> list[Finding]:
    place = "model"
    if model.refused is not None:
        return [
            Finding(place, PROBLEM, f"refused: {model.refused}", "see the reason; an engine would fail with it too")
        ]
    if model.unbuilt is not None:
        cure = "look for 'MAC serves' in the log of an engine, which has the weights and the device"
        return [Finding(place, WARNING, f"could not be built here without weights: {model.unbuilt}", cure)]
    found = [Finding(place, OK, f"max_model_len {model.max_model_len}, KV cache {model.kv_cache_dtype}")]
    if model.kv_cache_dtype in FP8_DTYPES:
        text = (
            "an FP8 KV cache rounds to 4 bits, and ends at 448 where the checkpoint has no scales: models with large "
        )
        text += "keys, Qwen2.5 among them, lose accuracy with any backend"
        found.append(Finding(place, WARNING, text, "compare answers of FLASHINFER with fp8 and with bfloat16 first"))
    for state, reason, which, count in groups(model.layers):
        what = {
            "MAC": "MAC",
            "exact": f"exact ({reason})",
            "other": f"another backend's ({reason}), not in the estimate",
        }[state]
        found.append(Finding(place, OK, f"{which}: {what}, {count} of {len(model.layers)}"))
    # Warnings as in an engine's log: rotations that cannot be undone, patterns that match no layer.
    found += [Finding(place, WARNING, note) for note in model.notes if "serves none" not in note]
    if not any(layer.state == "MAC" for layer in model.layers):
        found.append(Finding(place, WARNING, "MAC serves no layer of this model", "leave --attention-backend out"))
    return found


def of_rings(model: Examined) -> list[Finding]:
    if model.ring is None or model.config is None:
        return []
    one, fitting, wanted = model.ring
    gib = model.config.ring_memory_gib
    text = (
        f"one ring takes {one / 2**20:.1f} MiB over all layers of a worker; ring_memory_gib "
        f"{'null' if gib is None else f'{gib:g}'} holds {fitting}, and {wanted} sequences may want one"
    )
    if fitting >= wanted:
        return [Finding("rings", OK, f"{text}: {wanted * one / 2**30:.2f} GiB")]
    needed = wanted * one / 2**30
    return [
        Finding(
            "rings", WARNING, f"{text}: {wanted - fitting} of {wanted} would decode exactly",
            f"raise ring_memory_gib to {needed:.1f}, or lower window (a ring is proportional to it) or --max-num-seqs",
        )
    ]  # fmt: skip


def of_index(model: Examined) -> list[Finding]:
    if model.index is None:
        return []
    room, served = model.index, [layer for layer in model.layers if layer.state == "MAC"]
    index, kv = sum(layer.index_bytes for layer in served), sum(layer.kv_bytes for layer in served)
    sizes = " and ".join(map(str, room.directions))
    text = (
        f"keys are indexed in {sizes} directions, in pages of {room.page} tokens: {index:.0f} bytes a token over all layers "
        f"of a worker that use MAC, {index / kv:.1%} of their keys and values. There are no rings; the KV cache holds "
        f"{1 - room.plain / room.padded:.1%} fewer tokens"
    )
    return [Finding("index", OK, text)]


def of_estimates(model: Examined, rows: list[Estimate], judged: bool) -> list[Finding]:
    """judged: whether the bandwidth is that of a GPU, so that a gain means something."""
    place = "estimate"
    found = [
        Finding(
            place, WARNING, f"context {context} is beyond max_model_len {model.max_model_len}",
            "give --engine '{\"max_model_len\": N}', or another --context",
        )
        for context in dict.fromkeys(row.context for row in rows)
        if context > model.max_model_len
    ]  # fmt: skip
    if not judged:
        return [
            *found,
            Finding(
                place,
                UNCHECKED,
                "speed: on CPUs MAC is slower than vLLM's own attention, although it reads fewer bytes",
            ),
        ]
    for row in rows:
        where = f"context {row.context}, batch {row.batch}"
        cure = "a longer context or more rows"
        if row.hit_rate is not None:
            where += f", hit rate {row.hit_rate:g}"
            cure = "a longer context, more rows or more hits; measure the hit rate with vllm_mac_heads_total"
        if row.pays:
            found.append(Finding(place, OK, f"{where}: {row.gain:.2f}x at best"))
        else:
            found.append(
                Finding(
                    place, WARNING, f"{where}: MAC will not pay, {row.gain:.2f}x before its launches", cure,
                )
            )  # fmt: skip
    return found


def show(findings: list[Finding], facts: dict, console: Console) -> None:
    for section, lines in groupby(findings, lambda one: one.section):
        console.print(Text(f"\n{section}", style="bold"))
        for one in lines:
            console.print(Text.assemble(("  " + one.mark.ljust(12), COLOURS[one.mark]), one.text), soft_wrap=True)
            if one.cure:
                console.print(Text(f"              do: {one.cure}"), soft_wrap=True)
    if "estimates" in facts:
        _show_estimates(facts["estimates"], facts["bandwidth"], console)


def _show_estimates(rows: list[dict], bandwidth: dict, console: Console) -> None:
    table = Table(
        title=f"One token at {bandwidth['bytes_per_second'] / 1e9:.0f} GB/s ({bandwidth['how']})", title_justify="left"
    )
    index = any(row["hit_rate"] is None for row in rows)
    rate, title, kept = ([], "index GB", "index_bytes") if index else (["hit rate"], "rings GB", "ring_bytes")
    for name in (
        "context", "batch", *rate, "weights GB", "KV GB, exact", "KV GB, MAC", title, "exact ms", "MAC ms", "gain",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        size = (f"{row[key] / 1e9:.3f}" for key in ("weight_bytes", "exact_kv_bytes", "mac_kv_bytes", kept))
        hits = [] if index else [f"{row['hit_rate']:g}"]
        table.add_row(
            str(row["context"]), str(row["batch"]), *hits, *size,
            f"{row['exact_ms']:.2f}", f"{row['mac_ms']:.2f}", f"{row['gain']:.2f}x",
        )  # fmt: skip
    console.print(table)
    if index:
        what = f"The index is read, and {READ:.0%} of the KV tokens, at {RATE:.0%} of the bandwidth, as measured on one model"
        yours = "share of KV tokens read: kind=read of vllm_mac_kv_tokens_total over its sum, which includes the index."
    else:
        what, yours = f"A hit reads band + {LAG} tokens", "hit rate: outcome=hit of vllm_mac_heads_total over its sum."
    console.print(
        f"Bytes / bandwidth, for one worker. {what}; launches, sampling and the host are left "
        f"out, so below {PAYS}x MAC does not pay. Measure your own {yours}",
        soft_wrap=True,
    )
