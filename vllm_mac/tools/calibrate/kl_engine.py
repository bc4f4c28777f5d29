"""The engine of `vllm-mac calibrate --metric kl`: `python -m vllm_mac.tools.calibrate.kl_engine SPEC FD` (see
`engine_entry`).

It replies to all prompts with exact attention. Then it decodes these replies under teacher forcing many times, each time
with other thresholds, and measures the divergence of the next-token distributions. First each layer is tried alone. The
best choice by the sums of their costs is then run as a whole, and made stricter until it is within the budget. The
result is written as JSON to a file that SPEC names.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from vllm.config import VllmConfig

from vllm_mac.metrics import KV_TOKENS, WorkerExtension
from vllm_mac.tools.calibrate import CalibrateError, knapsack
from vllm_mac.tools.calibrate.grid import PAPER
from vllm_mac.tools.calibrate.journal import Journal
from vllm_mac.tools.calibrate.knapsack import Option
from vllm_mac.tools.calibrate.simulation_engine import layers_with_mac
from vllm_mac.tools.engine_entry import read_counters, serve
from vllm_mac.tools.eval import forced
from vllm_mac.tools.eval.statistics import best, kl

HALVES = 2
BEYOND = 4.0  # a layer whose cost alone is this many budgets is not tried with looser thresholds
EXACT = 1.0
# The paper's setting without its shape: rings and bands are fixed when the engine starts.
_PAPER_KEYS = {
    key: getattr(PAPER.setting, key) for key in ("reuse", "lag_weight", "max_chain", "distance", "mass_floor")
}


class DivergenceWorker(WorkerExtension):
    """Extension of vLLM's worker. Methods are called by `collective_rpc`."""

    vllm_config: VllmConfig  # the worker's

    def divergence_layers(self) -> dict:
        """{"layers": [(name, index)], "exact": {reason: layers}, "rings": rings of the layer with the fewest}."""
        from vllm.model_executor.models.utils import extract_layer_index

        from vllm_mac.layers import exact_reasons, mac_layers

        layers = mac_layers(self.vllm_config)
        with_mac = [x for x in layers if x.exact is None]
        names = [str(x.name) for x in with_mac]
        # A layer that uses MAC has a state once the model is loaded.
        rings = min((x.state.store.rings for x in with_mac), default=None)  # pyrefly: ignore[missing-attribute]
        return {
            "layers": [(name, extract_layer_index(name)) for name in names],
            "exact": exact_reasons(layers),
            "rings": rings,
        }

    def divergence_keys(self, keys: dict[str, dict]) -> None:
        """From now on the layers with these names decode with these keys. In eager mode every step reads the keys."""
        from vllm_mac.layers import mac_layers

        for layer in mac_layers(self.vllm_config):
            if layer.name in keys and layer.state is not None:
                config = layer.state.config.model_copy(update=keys[layer.name])
                layer.state = replace(layer.state, config=config)


class Run(NamedTuple):
    """kl: the mean over texts of the mean over a text's tokens, in nats. worst: the largest KL of a token. same: share of
    tokens whose likeliest next token is exact's. read: share of KV tokens read by each layer. tokens: tokens decoded."""

    kl: float
    worst: float
    same: float
    read: list[float]
    tokens: int

    @property
    def reads(self) -> float:
        return sum(self.read) / len(self.read)

    def plain(self) -> dict:
        return {"kl": self.kl, "kl_max": self.worst, "same_best": self.same, "read": self.reads, "tokens": self.tokens}


class Trial:
    """Decodes the same texts under different thresholds.

    rings: how many sequences decode together; one without a ring would decode exactly. keys: the keys of all layers,
    unless `set` gives others. journal: keeps the passes; a pass that it has is not run again.
    """

    def __init__(
        self, llm, layers: list[str], prompts: list[list[int]], texts: list[list[int]], v2: bool, rings: int, keys: dict,
        journal: Journal,
    ):  # fmt: skip
        self.llm, self.layers, self.prompts, self.texts, self.v2 = llm, layers, prompts, texts, v2
        self.rings, self.keys, self.journal = rings, keys, journal
        self.vocabulary = llm.llm_engine.model_config.get_vocab_size()
        self.setting: tuple[dict[str, float], dict | None] = {}, None
        self.exact: list[dict[int, tuple[np.ndarray, np.ndarray]] | None] = [None] * HALVES

    def set(self, thresholds: dict[str, float], others: dict | None = None) -> None:
        """Choose for the next runs. Layers that are not named are exact. others: further keys of all layers."""
        self.setting = thresholds, others

    def distributions(
        self, half: int, thresholds: dict[str, float], others: dict | None
    ) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], list[float]]:
        """The distributions for the texts of a half, and the share of KV tokens that each layer read for them."""
        keys = {name: {**(others or self.keys), "threshold": thresholds.get(name, EXACT)} for name in self.layers}
        self.llm.collective_rpc("divergence_keys", args=(keys,))
        before, found = self._tokens(), {}
        some = list(range(half, len(self.texts), HALVES))
        for k in range(0, len(some), self.rings):
            now = some[k : k + self.rings]
            outputs = self.llm.generate(
                [{"prompt_token_ids": self.prompts[i]} for i in now],
                [forced.params(self.texts[i], self.v2, self.vocabulary) for i in now], use_tqdm=False,
            )  # fmt: skip
            for i, output in zip(now, outputs, strict=True):
                # The first token's distribution comes from the prefill, which is always exact.
                found[i] = tuple(x[1:] for x in forced.distributions(output.outputs[0], self.texts[i]))
        read = [
            (now[0] - then[0]) / max(sum(now) - sum(then), 1) for now, then in zip(self._tokens(), before, strict=True)
        ]
        return found, read

    def run(self, half: int) -> Run:
        """Decode a half with the current setting and compare it with exact attention."""
        made = [*self.setting, half]
        if (known := self.journal.found(made)) is not None:
            return Run(*known)
        if (exact := self.exact[half]) is None:
            exact = self.exact[half] = self.distributions(half, {}, None)[0]
        found, read = self.distributions(half, *self.setting)
        each = [kl(*exact[i], *found[i], self.vocabulary) for i in found]
        same = [best(*exact[i]) == best(*found[i]) for i in found]
        run = Run(
            float(np.mean([x.mean() for x in each])), float(max(x.max() for x in each)), float(np.concatenate(same).mean()), read,
            sum(map(len, each)),
        )  # fmt: skip
        self.journal.put(made, list(run))
        return run

    def _tokens(self) -> list[tuple[int, int]]:
        """KV tokens that each layer has read and skipped so far."""
        counts = {
            (dict(labels)["layer"], dict(labels)["kind"]): value
            for (name, labels), value in read_counters(self.llm).items()
            if name == KV_TOKENS
        }
        return [(counts[name, "read"], counts[name, "skipped"]) for name in self.layers]


def main(spec: dict, send) -> None:
    journal = Journal(Path(spec["keep"]) if spec["keep"] else None, spec["about"])
    send(stage="starting the engine", advance=0)
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    arguments: dict[str, Any] = {
        "worker_extension_cls": "vllm_mac.tools.calibrate.kl_engine.DivergenceWorker",
        **spec["llm"],
    }
    config = EngineArgs(**arguments).create_engine_config()
    v2 = config.use_v2_model_runner
    llm = LLM(**arguments | forced.engine_arguments(v2, config.model_config.get_vocab_size()))
    answers = llm.collective_rpc("divergence_layers")
    exact = {reason: count for answer in answers for reason, count in answer["exact"].items()}
    layers = layers_with_mac(spec["llm"]["model"], answers, exact)
    replies = journal.replies
    if replies is None:
        send(stage="replying with exact attention", advance=0)
        replies = _replies(llm, spec)
        journal.keep_replies(replies)
    elif len(journal):
        send(stage=f"{len(journal)} passes were measured before", advance=0)
    prompts, texts = _texts(spec, replies)
    mac = spec["llm"]["additional_config"]["mac"]
    rings = min(answer["rings"] for answer in answers if answer["rings"] is not None)
    trial = Trial(llm, list(layers), prompts, texts, v2, rings, {key: mac[key] for key in _PAPER_KEYS}, journal)
    result = _calibrate(trial, spec, range(min(HALVES, len(texts))), send)
    result |= {"layers": layers, "exact_layers": exact, "texts": [len(text) - 1 for text in texts]}
    Path(spec["out"]).write_text(json.dumps(result), encoding="utf-8")
    send(done=True)
    llm.llm_engine.engine_core.shutdown()  # at exit it would take many seconds


def _replies(llm, spec: dict) -> list[list[int]]:
    """The greedy reply to each prompt; empty where none is wanted."""
    from vllm import SamplingParams

    wanted = [p for p in spec["prompts"] if p["reply"]]
    params = [SamplingParams(temperature=0.0, max_tokens=p["reply"], detokenize=False) for p in wanted]
    outputs = iter(
        llm.generate([{"prompt_token_ids": p["ids"]} for p in wanted], params, use_tqdm=False) if wanted else []
    )
    return [list(next(outputs).outputs[0].token_ids) if p["reply"] else [] for p in spec["prompts"]]


def _texts(spec: dict, replies: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Of each prompt, the tokens to prefill and the text to decode: the reply, or without a reply the prompt's end.

    The token before the text is decoded too, so that the first distribution is also MAC's.
    """
    prompts, texts = [], []
    for p, text in zip(spec["prompts"], replies, strict=True):
        whole, size = p["ids"] + text, (len(text) or spec["steps"]) + 1
        prompts.append(whole[:-size])
        texts.append(whole[-size:])
    return prompts, texts


def _calibrate(trial: Trial, spec: dict, halves: range, send) -> dict:
    thresholds, budget, share = sorted(spec["thresholds"], reverse=True), spec["budget"], spec["saving"]
    # The passes that are certain. A search adds its passes when it makes them.
    total = (len(trial.layers) + 1) * len(thresholds) + bool(spec["paper"])

    def begin(stage: str, advance: int = 1, further: int = 0) -> None:
        nonlocal total
        total += further
        send(stage=stage, advance=advance, total=total)

    options: list[list[Option]] = []
    for name in trial.layers:
        mine = [Option(None, 1.0, 0.0)]
        for i, threshold in enumerate(thresholds):
            begin(f"{name} alone, threshold {threshold:g}")
            trial.set({name: threshold})
            run = trial.run(0)
            read = run.read[trial.layers.index(name)]
            if 1 - read >= spec["min_saving"]:
                mine.append(Option(threshold, read, run.kl))
            if budget is not None and run.kl > BEYOND * budget:
                begin(f"{name}: looser thresholds cost more", len(thresholds) - i - 1)
                break
        options.append(mine)
    if all(len(mine) == 1 for mine in options):
        raise CalibrateError(
            f"no layer saves {spec['min_saving']:.0%} of its KV reads at any threshold; lower --thresholds, or use longer prompts"
        )
    exact, choices = tuple(mine[0] for mine in options), knapsack.path(options)
    if choices[0] != exact:  # a choice that seems to cost nothing is measured as a whole too
        choices.insert(0, exact)

    tried: dict[tuple[int, int], Run] = {}

    def run(i: int, half: int = 0) -> Run:
        if (i, half) not in tried:
            choice = choices[i]
            begin(f"the choice that reads {sum(o.read for o in choice) / len(choice):.1%}", further=1)
            trial.set(
                {name: o.threshold for name, o in zip(trial.layers, choice, strict=True) if o.threshold is not None}
            )
            tried[i, half] = trial.run(half)
        return tried[i, half]

    if share is not None:
        at = _saving(choices, share, run)
    else:
        at = _within(choices, budget, run)
        if at == 0:
            raise CalibrateError(
                f"--budget: received {budget:g}; no choice that saves KV reads was measured to be within it. The least that a layer "
                f"costs by itself: {min(o.cost for mine in options for o in mine[1:]):.3g}"
            )
    reached = run(at)
    last = halves[-1]
    curve = []
    for i in sorted({at, *np.linspace(1, len(choices) - 1, min(8, len(choices) - 1)).round().astype(int).tolist()}):
        curve.append(run(i, last).plain() | {"chosen": i == at})
    singles = []
    for threshold in thresholds:
        begin(f"all layers, threshold {threshold:g}")
        trial.set(dict.fromkeys(trial.layers, threshold))
        singles.append({"threshold": threshold} | trial.run(last).plain())
    paper = None
    if spec["paper"]:
        begin("the paper's setting")
        trial.set(dict.fromkeys(trial.layers, PAPER.threshold), _PAPER_KEYS)
        paper = trial.run(last).plain()
    return {
        "thresholds": [o.threshold for o in choices[at]], "predicted": sum(o.cost for o in choices[at]),
        "chosen": reached.plain(), "chosen_read": reached.read,
        "held_out": next(c for c in curve if c["chosen"]) if last else None, "curve": curve, "singles": singles, "paper": paper,
        "options": [[o._asdict() for o in mine] for mine in options],
    }  # fmt: skip


def _within(choices, budget: float, run) -> int:
    """Index of the choice with the fewest reads whose measured KL is within the budget; 0, all exact, where none is."""
    aim, low, high = budget, 0, len(choices)
    while high - low > 1:
        # Try the choice at which the sums of costs reach the aim; once it is measured, halve the interval.
        at = knapsack.within(choices, aim)
        at = at if low < at < high else (low + high) // 2
        cost = run(at).kl
        low, high = (at, high) if cost <= budget else (low, at)
        aim *= budget / max(cost, budget / 16)
    return low


def _saving(choices, share: float, run) -> int:
    """Index of the first choice that was measured to save `share` of the reads. Raises CalibrateError where none does."""
    if (most := 1 - run(len(choices) - 1).reads) < share:
        raise CalibrateError(
            f"--saving: received {share:g}; the thresholds save {most:.1%} of KV reads at most. Lower --thresholds"
        )
    low, high = 0, len(choices) - 1
    while high - low > 1:
        at = knapsack.saving(choices, share) or 0
        at = at if low < at < high else (low + high) // 2
        low, high = (low, at) if 1 - run(at).reads >= share else (at, high)
    return high


if __name__ == "__main__":
    serve(main)
