"""What the engines of a run wrote, as figures.

A run's results are a dictionary with

    configuration, environment   as in run.json
    totals    a row for each configuration
    rows      a row for each configuration and phase (a group of tasks at one length)
    tasks     a row for each configuration, task and length, without what only MAC's counters tell
    yardstick whether its tokens and distributions are `identical` to exact's, null without forced texts; null where
              there is no yardstick
    layers    by configuration and layer: see `statistics.layers`
    histograms    by configuration: error, lag and chain, where audits counted them, as [upper edge, count]
                  pairs, the edge null for what lies above the others
    divergence    by configuration: for each request the first token that is not exact's, or null
    errors    by configuration: why an engine gave no figures

Rows have: configuration, group, length; requests, and scored, how many of them have answers; score with score_low and
score_high, its 95 % interval; difference from exact's score on the same prompts, with difference_low and
difference_high; same_answers, the share of requests whose tokens are all exact's; agreed_share, the share of exact's
tokens before the first that differs, and agreed_p50, their number in the median request; hit_rate and read_share of
decoding; tokens_per_s, tokens generated per second, the time that prompts take to read included; kl_mean, kl_p50,
kl_p99 and kl_max in nats over kl_tokens forced tokens of kl_texts requests, kl_times, the mean in the yardstick's,
and same_best, the share of them at which the likeliest next token is exact's. Figures that a row has not got are
absent: a row without scored requests has no score.
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
    """Names of what is compared with exact attention, in order."""
    return [*([YARDSTICK] if configuration.get("yardstick") else []), *configuration["mac"]]


def source(results: dict) -> str:
    """Where a run's figures come from, in one line."""
    env = results["environment"]
    model = Path(results["configuration"]["model"]).name
    return f"{model} on {env['gpu'] or 'CPU'}, vLLM {env['vllm']}, torch {env['torch']}, commit {env['commit']}"


def read_samples(folder: Path) -> list[dict]:
    """The rows of a folder's samples.jsonl; a last line that a stop cut short is left out of the file too."""
    path = folder / "samples.jsonl"
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        text = text[: text.rfind("\n") + 1]
        path.write_text(text, encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def left(folder: Path, requests: list[Request], kl: int) -> tuple[int, bool]:
    """How many requests of a configuration are unanswered, and whether its forced texts are still to do."""
    done = {row["id"] for row in read_samples(folder)}
    return sum(request.id not in done for request in requests), kl > 0 and not (folder / "forced.npz").exists()


def read_counters(folder: Path, phase: str) -> list[tuple[str, dict, float]]:
    """MAC's counters of one phase, of all processes that worked on it."""
    return [
        tuple(sample)
        for path in sorted(folder.glob(f"counters/{phase}.*.json"))
        for sample in json.loads(path.read_text())
    ]


def collect(out: Path, configuration: dict, environment: dict, requests: list[Request], errors: dict[str, str]) -> dict:
    """The results of a finished run, written to its folder. errors: configurations without figures."""
    found = {
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
        for path in out.glob("*/forced.npz"):  # large, and used up
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
    """Absent where an answer is of a version that did not count."""
    rows = [samples[request.id] for request in requests]
    if not all("seconds" in row for row in rows):
        return {}
    return {"tokens_per_s": sum(len(row["tokens"]) for row in rows) / math.fsum(row["seconds"] for row in rows)}


def _reads(counters: list) -> dict:
    from vllm_mac.metrics import summarise

    summary = summarise(counters)
    return {"hit_rate": summary.hit_rate, "read_share": summary.read_share}


def _times(rows: list[dict]) -> None:
    """Adds kl_times wherever the yardstick's mean at the same place is more than what KL is known to."""
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
    """A forced text. At each token: KL divergence from exact, and whether the likeliest token is the same. equal: all
    distributions are exact's to the last bit."""

    kl: list[float]
    same: list[bool]
    equal: bool


def _forced(out: Path, name: str) -> dict[str, Text]:
    """By request."""
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
