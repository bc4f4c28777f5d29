"""The results of a run, from the files that its engines wrote.

A run's results are a dictionary with

    configuration, environment   as in run.json
    totals        a row for each configuration
    rows          a row for each configuration and phase (a group of tasks at one length)
    tasks         a row for each configuration, task and length, without the figures from MAC's counters
    yardstick     null without a yardstick; else `identical`: whether its tokens and distributions equal exact's, null
                  without forced texts
    layers        by configuration and layer: see `statistics.layers`
    histograms    by configuration: audited error, lag and chain as [upper edge, count] pairs; the last edge is null
    divergence    by configuration: for each request the index of the first token that differs from exact's, or null
    errors        by configuration: why it has no results

A row has the keys below. A figure that does not exist is absent: a row without scored requests has no score.

    configuration, group, length
    requests, scored                            prompts, and those of them with answers
    score, score_low, score_high                mean, and its 95 % interval
    difference, difference_low, difference_high from exact's score on the same prompts, and its 95 % interval
    same_answers                                share of requests whose tokens all equal exact's
    agreed_share, agreed_p50                    share of exact's tokens before the first difference; their median number
    hit_rate, read_share                        of decoding
    exact_share                                 by reason, the share of heads that were decoded exactly, the largest first
    tokens_per_s                                tokens generated per second, prefill included; absent where engines shared a GPU
    kl_mean, kl_p50, kl_p99, kl_max             in nats, over kl_tokens forced tokens of kl_texts requests
    kl_times                                    kl_mean over the yardstick's
    same_best                                   share of forced tokens whose likeliest next token is exact's
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vllm_mac.tools.eval import statistics
from vllm_mac.tools.eval.requests import Request, phases

EXACT, YARDSTICK = "exact", "yardstick"
RESULTS = "results.json"


def compared(configuration: dict) -> list[str]:
    """Names of the configurations that are compared with exact attention, in order; the yardstick is one."""
    return [*([YARDSTICK] if configuration.get("yardstick") else []), *configuration["mac"]]


def source(results: dict) -> str:
    """Where a run's results come from, in one line."""
    env = results["environment"]
    model = Path(results["configuration"]["model"]).name
    return f"{model} on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}"


def read_samples(folder: Path) -> list[dict]:
    """The rows of a folder's samples.jsonl. An incomplete last line, left by a stop, is removed from the file."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def left(folder: Path, requests: list[Request], kl: int) -> tuple[int, bool]:
    """The number of unanswered requests of a configuration, and whether its forced texts are still to decode."""
    done = {row["id"] for row in read_samples(folder)}
    return sum(request.id not in done for request in requests), kl > 0 and not (folder / "forced.npz").exists()


def read_counters(folder: Path, phase: str) -> list[tuple[str, dict, float]]:
    """MAC's counters of one phase, from all processes that worked on it."""
    return [
        tuple(sample)
        for path in sorted(folder.glob(f"counters/{phase}.*.json"))
        for sample in json.loads(path.read_text())
    ]


def collect(out: Path, configuration: dict, environment: dict, requests: list[Request], errors: dict[str, str]) -> dict:
    """Collect the results of a finished run and write them to its folder. errors: configurations without results."""
    found: dict = {
        "configuration": configuration, "environment": environment, "totals": [], "rows": [], "tasks": [], "yardstick": None,
        "layers": {}, "histograms": {}, "divergence": {}, "errors": errors,
    }  # fmt: skip
    exact = {row["id"]: row for row in read_samples(out / EXACT)}
    for name in (EXACT, *(name for name in compared(configuration) if name not in errors)):
        folder = out / name
        samples = {row["id"]: row for row in read_samples(folder)}
        forced = _forced(out, name) if configuration["kl"] and name != EXACT else {}
        mac, counters = name in configuration["mac"], []
        for phase, some in phases(requests).items():
            counted = read_counters(folder, phase)
            counters += counted
            label = {"configuration": name, "group": some[0].group, "length": some[0].length}
            own = _figures(some, samples, exact, forced, name) | _speed(some, samples)
            found["rows"].append(label | own | (_reads(counted) if mac else {}))
            for task in dict.fromkeys(request.task for request in some):
                own = [request for request in some if request.task == task]
                found["tasks"].append(label | {"task": task} | _figures(own, samples, exact, forced, name))
        total = _figures(requests, samples, exact, forced, name) | _speed(requests, samples)
        found["totals"].append({"configuration": name} | total | (_reads(counters) if mac else {}))
        if name != EXACT:
            found["divergence"][name] = [_divergence(samples, exact, request) for request in requests]
        if mac:
            found["layers"][name] = statistics.layers(counters)
            found["histograms"][name] = _histograms(counters)
        elif name == YARDSTICK:
            same = all(position is None for position in found["divergence"][name])
            found["yardstick"] = {"identical": same and all(text.equal for text in forced.values()) if forced else None}
    for rows in (found["totals"], found["rows"], found["tasks"]):
        _times(rows)
    _save(found, out / RESULTS)
    if not errors:
        for path in out.glob("*/forced.npz"):  # large, and not needed any more
            path.unlink()
    return found


def load(out: Path) -> dict | None:
    """The results of a run that is complete, else None."""
    path = out / RESULTS
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return stored if stored and not stored["errors"] else None


def _save(found: dict, path: Path) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(path)


def _figures(requests, samples: dict, exact: dict, forced: dict, name: str) -> dict:
    row: dict = {"requests": len(requests)} | _scores(requests, samples, exact, name)
    if name == EXACT:
        return row
    differ = [_divergence(samples, exact, request) for request in requests]
    lengths = [len(exact[request.id]["tokens"]) for request in requests]
    agreed = [length if at is None else at for at, length in zip(differ, lengths, strict=True)]
    row |= {
        "same_answers": differ.count(None) / len(requests),
        "agreed_p50": statistics.quantiles(agreed, (50,))["p50"],
    }
    if any(lengths):
        row["agreed_share"] = sum(agreed) / sum(lengths)
    texts = [forced[request.id] for request in requests if request.id in forced]
    if texts:
        kl, same = [value for text in texts for value in text.kl], [value for text in texts for value in text.same]
        row |= {
            "kl_texts": len(texts),
            "kl_tokens": len(kl),
            "kl_mean": math.fsum(kl) / len(kl),
            "same_best": sum(same) / len(same),
        }
        row |= {f"kl_{key}": value for key, value in statistics.quantiles(kl, (50, 99)).items()} | {"kl_max": max(kl)}
    return row


def _speed(requests, samples: dict) -> dict:
    rows = [samples[request.id] for request in requests]
    if not all("seconds" in row for row in rows):
        return {}
    return {"tokens_per_s": sum(len(row["tokens"]) for row in rows) / math.fsum(row["seconds"] for row in rows)}


def _reads(counters: list) -> dict:
    from vllm_mac.metrics import summarise

    summary = summarise(counters)
    exact = {"exact_share": summary.exact_share} if summary.exact_share else {}
    return {"hit_rate": summary.hit_rate, "read_share": summary.read_share} | exact


def _times(rows: list[dict]) -> None:
    """Add kl_times wherever the yardstick's mean, for the same group, length and task, exceeds the precision of KL."""
    place = lambda row: tuple(row.get(key) for key in ("group", "length", "task"))
    yard = {place(row): row.get("kl_mean", 0.0) for row in rows if row["configuration"] == YARDSTICK}
    for row in rows:
        if "kl_mean" in row and yard.get(place(row), 0.0) > statistics.KL_FLOOR:
            row["kl_times"] = row["kl_mean"] / yard[place(row)]


def _scores(requests, samples: dict, exact: dict, name: str) -> dict:
    scores = [(samples[r.id]["score"], exact[r.id]["score"]) for r in requests if r.answers]
    if not scores:
        return {"scored": 0}
    mean = math.fsum(own for own, _ in scores) / len(scores)
    low, high = statistics.wilson(mean, len(scores))
    row = {"scored": len(scores), "score": mean, "score_low": low, "score_high": high}
    if name != EXACT:
        differences = [own - other for own, other in scores]
        row["difference"] = math.fsum(differences) / len(differences)
        if interval := statistics.paired_interval(differences):
            row["difference_low"], row["difference_high"] = interval
    return row


def _divergence(samples: dict, exact: dict, request: Request) -> int | None:
    return statistics.first_difference(exact[request.id]["tokens"], samples[request.id]["tokens"])


class Text(NamedTuple):
    """A forced text. kl, same: at each token, the KL divergence from exact's distribution, and whether both have the same
    likeliest token. equal: all distributions equal exact's to the last bit."""

    kl: list[float]
    same: list[bool]
    equal: bool


def _forced(out: Path, name: str) -> dict[str, Text]:
    """The forced texts of a configuration, by request."""
    from vllm_mac.tools.eval import forced

    (exact, vocabulary), (own, _) = forced.load(out / EXACT / "forced.npz"), forced.load(out / name / "forced.npz")
    found = {}
    for id, there in exact.items():
        kl = statistics.kl(*there, *own[id], vocabulary)
        same = statistics.best(*there) == statistics.best(*own[id])
        found[id] = Text(kl.tolist(), same.tolist(), all(map(np.array_equal, there, own[id])))
    return found


def _histograms(counters: list) -> dict[str, list]:
    from vllm_mac.metrics import CHAIN, ERROR, LAG

    found = {
        name: statistics.pooled(counters, metric) for name, metric in (("error", ERROR), ("lag", LAG), ("chain", CHAIN))
    }
    return {name: pairs for name, pairs in found.items() if pairs}
