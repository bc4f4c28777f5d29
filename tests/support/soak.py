"""Random requests against an engine, as many as a test wants: they come and go."""

import random
from collections import Counter
from dataclasses import dataclass

from vllm import SamplingParams

from support.scenarios import text


@dataclass
class Request:
    """aborts: after so many of its tokens its client leaves; None where it stays."""

    prompt: list[int]
    new: int
    off: bool
    aborts: int | None

    @property
    def params(self) -> SamplingParams:
        asked = {"mac": "off"} if self.off else None
        return SamplingParams(
            temperature=0.0, max_tokens=self.new, ignore_eos=True, detokenize=False, extra_args=asked
        )  # fmt: skip


class Soak:
    """Random requests against an engine: they come and go.

    said: of each finished request its tokens. seen: what happened, by kind.
    """

    def __init__(self, llm, seed: int, scale: int = 1):
        """scale: how many times as long prompts are as on a CPU."""
        self.llm, self.draw, self.seen, self.scale = llm, random.Random(seed), Counter(), scale
        self.shared = [text(f"shared {i}", scale * (40 + 70 * i)) for i in range(4)]
        self.requests: dict[str, Request] = {}
        self.said: dict[str, list[int]] = {}
        self.running: set[str] = set()
        self.name = seed  # of the next request

    def ask(self) -> Request:
        draw, scale = self.draw, self.scale
        prompt = draw.choice(self.shared)[: scale * draw.randrange(20, 300)] if draw.random() < 0.6 else []
        if self.said and draw.random() < 0.2:  # a conversation goes on
            name = draw.choice(list(self.said)[-20:])
            prompt = (self.requests[name].prompt + self.said[name])[: 400 * scale]
        own = draw.choice((1, 5, 40 * scale, 150 * scale, 330 * scale))
        prompt = prompt + [draw.randrange(256) for _ in range(own)]
        new = draw.choice((1, 3, 10, 25, 60))
        return Request(prompt, new, draw.random() < 0.2, draw.randrange(new) if draw.random() < 0.15 else None)

    def run(self, most: int) -> None:
        """Until so many have come and all are gone."""
        core, came = self.llm.llm_engine, 0
        scheduler = core.engine_core.engine_core.scheduler
        while self.running or came < most:
            while came < most and len(self.running) < 12 and self.draw.random() < 0.4:
                name, came = f"{self.name:07}", came + 1
                self.name += 1
                self.requests[name] = request = self.ask()
                core.add_request(name, {"prompt_token_ids": request.prompt}, request.params)
                self.running.add(name)
                self.seen["off"] += request.off
            if self.draw.random() < 0.003:
                self.seen["resets"] += 1
                self.llm.reset_prefix_cache(reset_running_requests=True)
            for output in core.step():
                self.note(core, output)
            self.seen["steps"] += 1
            self.seen["most at once"] = max(self.seen["most at once"], len(scheduler.running))
        self.seen["requests"] += came

    def note(self, core, output) -> None:
        name, tokens = output.request_id, list(output.outputs[0].token_ids)
        request = self.requests[name]
        if output.finished:
            self.running.discard(name)
            self.said[name] = tokens
            self.seen["tokens"] += len(tokens)
            self.seen["cached tokens"] += output.num_cached_tokens or 0
        elif request.aborts is not None and len(tokens) > request.aborts:
            core.abort_request([name])
            self.running.discard(name)
            self.seen["aborted"] += 1


def preemptions(llm, monkeypatch) -> Counter:
    """How many requests were thrown out of the KV cache, from now on."""
    scheduler, found = llm.llm_engine.engine_core.engine_core.scheduler, Counter()
    schedule = scheduler.schedule

    def watched(*args, **kwargs):
        output = schedule(*args, **kwargs)
        found["preempted"] += len(output.preempted_req_ids or ())
        found["drafted"] += sum(map(len, output.scheduled_spec_decode_tokens.values()))
        return output

    monkeypatch.setattr(scheduler, "schedule", watched)
    return found
