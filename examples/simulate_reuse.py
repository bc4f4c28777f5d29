"""Which cheaper attention keeps what a real model says? Many rules decode one text side by side, in plain PyTorch.

    python examples/simulate_reuse.py MODEL PROMPTS.jsonl RULES.json --out simulated.json

MODEL is a Hugging Face folder of Qwen2, Llama or alike (RoPE in halves, no bias after attention). The first rule is
exact attention in float32 and picks the text greedily; every other rule is fed the same tokens but lives in its own
hidden states, its own keys and values of decoded tokens and its own rings. Reported for each rule: KL of the next
token against exact, the share of tokens whose best next token agrees, the bytes read as a share of the whole KV cache
(index, value means, band and lag counted; a miss counts in full), and the squared error that attention adds to the
residual stream, relative to it, mean over layers. The yardstick is exact attention in bf16 by two codes.

RULES.json has the fields of `IndexRule` and `MatchRule` below:
{"index": [{"name": "32 x 4 bits", "threshold": 1e-4}], "match": [{"name": "D2 < 20", "tolerance": 20}]}
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, AutoTokenizer

WINDOW, BAND, RANK, SAMPLE = 512, 256, 32, 16  # entries, newest tokens always read, match dims, key stride
HEAD, SHORT = 4096, 8192  # tokens: of a prompt's head and of random text; at most, of a text of the source `short`
PART = 512  # a long reduction in one piece would occupy two SMs and no more
OWN, RANDOM = ("own", "all", "head"), "random"  # sources, see `IndexRule`
SOURCES = (*OWN, "pool", "short", "one", RANDOM, "true")
CODES = {"cuda": (SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION), "cpu": (SDPBackend.FLASH_ATTENTION,) * 2}


@dataclass(frozen=True)
class IndexRule:
    """Read the tokens whose estimated share of the attention reaches `threshold` (or the `tokens` best), by a narrow
    index of the keys; estimate the rest. With `unread` a head's threshold follows its attention. Blocks of `run`
    adjacent tokens are read together, by their sum.

    `source` says what the maps and scales of the index are learned from:

    own     this prompt's keys and its last WINDOW queries
    all     half of it as `own`, half from its keys and every SAMPLE-th query
    head    keys and every SAMPLE-th query of its first HEAD tokens
    pool    each prompt of another kind as in `all`, all alike; "manual-8000" is of the kind "manual"
    short   of these prompts the ones of at most SHORT tokens
    one     of these prompts the first in the file
    random  HEAD random tokens, as in `all`
    true    nothing: exact logits in place of the index
    """

    name: str
    source: str = "own"
    dims: tuple = ((32, 4),)  # ((dimensions, bits), ...) of a code, leading directions first
    threshold: float = 0.0
    times: float = 0.0  # threshold as a multiple of the average token's share
    tokens: int = 0
    unread: float = 0.0  # each head's threshold: the greatest power of 2 that leaves at most so much of its mass unread
    spread: bool = False  # masses of the rest times exp(half the variance of what the codes leave out of q.k)
    run: int = 1
    score: str = "max"  # over the group's heads: max or sum
    rest: str = "blocks"  # blocks: estimated masses times mean values; drop: left out
    block: int = 64  # tokens to a mean value
    sink: int = 16  # leading tokens always read: their keys are outliers, which the codes clip


@dataclass(frozen=True)
class MatchRule:
    """Reuse the matched query's summary without its heavy tokens, chained, LSE right to first order."""

    name: str
    tokens: int = 512  # heavy tokens read afresh
    run: int = 4
    tolerance: float = math.inf  # of the heads' summed distances: variances of the logits' change over the keys


class Decoder:
    """The model's layers as functions of hidden states [n, E]."""

    def __init__(self, folder: Path, device: str):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
        config, self.layers, self.device = self.model.config, self.model.model.layers, device
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.size = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.embed = self.model.get_input_embeddings()

    def qkv(self, i: int, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotated queries [n, H, d], rotated keys and values [n, K, d] of x at positions [n] (or [1] for all)."""
        h, a = self.layers[i].input_layernorm(x), self.layers[i].self_attn
        cos, sin = (t[0][:, None] for t in self.model.model.rotary_emb(x, positions[None]))
        q, k, v = (proj(h).view(len(x), -1, self.size) for proj in (a.q_proj, a.k_proj, a.v_proj))
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        return q, k, v

    def after(self, i: int, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """The rest of layer i: attention outputs [n, H d] into the residual, then the MLP."""
        x = x + self.layers[i].self_attn.o_proj(out)
        return x + self.layers[i].mlp(self.layers[i].post_attention_layernorm(x))

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(x)).float()

    def prefill(self, ids: torch.Tensor, code: SDPBackend) -> tuple:
        """Hidden states [T, E]; of each layer keys and values [K, T, d], the last WINDOW queries and every SAMPLE-th
        [*, H, d]."""
        x, cache, queries = self.embed(ids), [], []
        positions = torch.arange(len(ids), device=self.device)
        for i in range(len(self.layers)):
            q, k, v = self.qkv(i, x, positions)
            k, v = k.transpose(0, 1).contiguous(), v.transpose(0, 1).contiguous()
            wide = (t.repeat_interleave(self.heads // self.groups, 0)[None] for t in (k, v))
            with sdpa_kernel(code):
                out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], *wide, is_causal=True)[0]
            x = self.after(i, x, out.transpose(0, 1).reshape(len(ids), -1))
            cache.append((k, v))
            queries.append((q[-WINDOW:].clone(), q[::SAMPLE].clone()))
        return x, cache, queries


# Letters: K KV groups, V rules, G heads of a group, T tokens, T0 of them the prompt's, S decoded, W ring entries,
# d the head size, R directions. A rule's own decoded keys and values are [K, V, S, d]; the prompt's are shared.


def product(w: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """w [K, M, T] @ x [K, T, n], the reduction in parts of PART."""
    k, m, n = *w.shape[:2], w.shape[2] // PART
    if w.device.type == "cpu" or n < 2:
        return w @ x
    parts = w[..., : n * PART].reshape(k, m, n, PART).transpose(1, 2) @ x[:, : n * PART].view(k, n, PART, -1)
    return parts.sum(1) + w[..., n * PART :] @ x[:, n * PART :]


def by_run(score: torch.Tensor, run: int) -> torch.Tensor:
    """Each token's score becomes its block's sum; score [K, V, T]."""
    sums = F.pad(score, (0, -score.shape[2] % run)).unflatten(2, (-1, run)).sum(-1)
    return sums.repeat_interleave(run, 2)[..., : score.shape[2]]


def quantise(x: torch.Tensor, deviation: torch.Tensor, bits: int) -> torch.Tensor:
    """Mid-rise codes with one scale a channel, a multiple of its deviation; x [K, T, n], deviation [K, 1, n]."""
    top = 2 ** (bits - 1) - 0.5
    step = deviation.clamp(min=1e-9) * {2: 1.5, 3: 2.2, 4: 2.8, 8: 6.0}[bits] / top
    return ((x / step - 0.5).round() + 0.5).clamp(-top, top) * step


def covariance(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Covariance [K, d, d] and mean [K, 1, d] of every SAMPLE-th key of [K, T, d]."""
    some = keys[:, ::SAMPLE]
    centred = some - some.mean(1, keepdim=True)
    return centred.transpose(1, 2) @ centred / some.shape[1], some.mean(1, keepdim=True)


@dataclass(frozen=True)
class Moments:
    """What maps are made of: the queries' second moment and the keys' covariance [K, d, d], the mean key [K, 1, d]."""

    second: torch.Tensor
    spread: torch.Tensor
    mean: torch.Tensor

    @classmethod
    def of(cls, queries: torch.Tensor, keys: torch.Tensor) -> "Moments":
        """queries [n, H, d], keys [K, T, d], both after RoPE."""
        rows = queries.view(len(queries), len(keys), -1, keys.shape[2]).permute(1, 0, 2, 3).flatten(1, 2)
        return cls(rows.transpose(1, 2) @ rows / rows.shape[1], *covariance(keys))

    @classmethod
    def pooled(cls, parts: list["Moments"]) -> "Moments":
        """Of texts that weigh alike."""
        mean = torch.stack([m.mean for m in parts]).mean(0)
        spread = [m.spread + (m.mean - mean).transpose(1, 2) @ (m.mean - mean) for m in parts]
        return cls(torch.stack([m.second for m in parts]).mean(0), torch.stack(spread).mean(0), mean)


def logit_basis(m: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """Maps that keep most of q.k: for keys [K, d, d] and for queries [K, d, d].

    With C_q = L L^T the queries' second moment and C the keys' covariance, the eigenvectors B of L^T C L give the best
    form of each rank: (k - mean) L B against q L^-T B.
    """
    eye = torch.eye(m.second.shape[1], device=m.second.device)
    second = m.second + 1e-4 * m.second.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * eye
    value, vector = torch.linalg.eigh(second)
    root = value.clamp(min=1e-9).sqrt()[:, None]
    left = vector * root
    b = torch.linalg.eigh(left.transpose(1, 2) @ m.spread @ left)[1]
    return left @ b.flip(2), vector / root @ b.flip(2)


class KeyIndex:
    """Codes of one layer's prompt keys, and the logits that they stand for."""

    def __init__(self, keys: torch.Tensor, moments: Moments):
        """moments: those that give the basis and the scales."""
        self.keys, self.mean = keys, moments.mean
        self.to_key, self.to_query = logit_basis(moments)
        variance = (self.to_key * (moments.spread @ self.to_key)).sum(1, keepdim=True)
        self.deviation = variance.clamp(min=0).sqrt()
        self.codes, self.lost = {}, {}

    def logits(self, q: torch.Tensor, rule: IndexRule) -> torch.Tensor:
        """Estimated q.k of the prompt's tokens [K, V, G, T0] for queries q [K, V, G, d], not scaled."""
        width = sum(n for n, _ in rule.dims)
        if rule.dims not in self.codes:
            sizes = [n for n, _ in rule.dims]
            coded = ((self.keys - self.mean) @ self.to_key[..., :width]).split(sizes, -1)
            scales = self.deviation[..., :width].split(sizes, -1)
            parts = [quantise(x, scale, bits) for x, scale, (_, bits) in zip(coded, scales, rule.dims, strict=True)]
            self.codes[rule.dims] = torch.cat(parts, -1)
            lost = self.keys - self.mean - self.codes[rule.dims] @ self.to_query[..., :width].transpose(1, 2)
            self.lost[rule.dims] = lost.transpose(1, 2) @ lost / lost.shape[1]
        narrow = (q @ self.to_query[:, None, :, :width]).flatten(1, 2)
        narrow = (narrow @ self.codes[rule.dims].transpose(1, 2)).view(*q.shape[:3], -1)
        return narrow + q @ self.mean[:, None].transpose(2, 3)

    def variance(self, q: torch.Tensor, rule: IndexRule) -> torch.Tensor:
        """Of q.k less its estimate, over the prompt's keys, [K, V, G, 1] for queries [K, V, G, d]; after `logits`."""
        return ((q @ self.lost[rule.dims][:, None]) * q).sum(-1, keepdim=True)


def levels(share: torch.Tensor, unread: float) -> torch.Tensor:
    """Which shares [K, V, G, T] reach their head's threshold: the greatest 2^-n, n up to 31, below which at most
    `unread` lies in all."""
    # A share in (2^-n - 1, 2^-n] is at n, one above 2^-n at n - 1.
    n = (-share.clamp(min=2.0**-40).log2()).ceil().clamp(0, 31).long()
    mass = torch.zeros(*share.shape[:3], 32, device=share.device).scatter_add_(3, n, share)
    rest = mass.flip(3).cumsum(3).flip(3)  # what lies in n and beyond
    first = (rest > unread).sum(3, keepdim=True)  # rest falls with n: levels before `first` have to be read
    return n < first


def other_texts(source: str, name: str, prompts: dict[str, list[int]]) -> list[str]:
    """Names of the texts, of all but this prompt's kind, that maps of `source` are learned from; none of its own."""
    if source == RANDOM:
        return [RANDOM]
    others = [other for other in prompts if other.split("-")[0] != name.split("-")[0]]
    short = [other for other in others if len(prompts[other]) <= SHORT]
    return {"pool": others, "short": short, "one": others[:1]}.get(source, [])


class Own:
    """Keys and values of one layer: the prompt's [K, T0, d], shared, and each rule's decoded ones [K, V, S, d]."""

    def __init__(self, keys, values, rules: int, steps: int):
        self.keys, self.values, self.t0, self.scale = keys, values, keys.shape[1], keys.shape[2] ** -0.5
        self.k, self.v = (keys.new_zeros(keys.shape[0], rules, steps, keys.shape[2]) for _ in range(2))
        self.at = torch.arange(self.t0 + steps, device=keys.device)

    def append(self, k, v, p: torch.Tensor) -> None:
        for kept, new in ((self.k, k), (self.v, v)):
            kept.index_copy_(2, p - self.t0, new[:, :, None].contiguous())

    def logits(self, q: torch.Tensor) -> torch.Tensor:
        """[K, V, G, T] of queries [K, V, G, d]."""
        prompt = (q.flatten(1, 2) @ self.keys.transpose(1, 2)).view(*q.shape[:3], -1)
        return torch.cat((prompt, q @ self.k.transpose(2, 3)), -1) * self.scale

    def sum(self, w: torch.Tensor, of: str = "values", rows: slice = slice(None)) -> torch.Tensor:
        """Weights w [K, V, G, T] of the rules `rows` on values or keys -> [K, V, G, d]."""
        shared, own = (self.values, self.v) if of == "values" else (self.keys, self.k)
        prompt = product(w[..., : self.t0].flatten(1, 2), shared).view(*w.shape[:3], -1)
        return prompt + w[..., self.t0 :] @ own[:, rows]


class IndexLayer:
    """One layer under all index rules; the first row is exact attention."""

    def __init__(self, rules: list[IndexRule], queries, keys, values, steps: int, others: dict):
        """queries: the last WINDOW, and a sample of all. others: moments of other texts by source."""
        self.rules, self.own = rules, Own(keys, values, len(rules) + 1, steps)
        own, every = (Moments.of(q, keys) for q in queries)
        head = Moments.of(queries[1][: HEAD // SAMPLE], keys[:, :HEAD])
        sources = dict(zip(OWN, (own, Moments.pooled([own, every]), head), strict=True)) | others
        self.index = {name: KeyIndex(keys, m) for name, m in sources.items() if any(r.source == name for r in rules)}
        sizes, d = {r.block for r in rules}, keys.shape[2]
        padded = {b: F.pad(values, (0, 0, 0, -values.shape[1] % b)) for b in sizes}  # what is padded is in the band
        self.means = {b: t.unflatten(1, (-1, b)).mean(2) for b, t in padded.items()}
        code = [(r.source != "true") * sum(n * b for n, b in r.dims) / 8 / (4 * d) for r in rules]
        mean = [(r.rest == "blocks") / (2 * r.block) for r in rules]
        self.fixed = [self.own.t0 * (a + b) for a, b in zip(code, mean, strict=True)]  # bytes, in tokens of KV

    def step(self, q, k, v, p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs [K, V, G, d], tokens read [K, V] and exact outputs, for position p [1]."""
        own, t0 = self.own, self.own.t0
        own.append(k, v, p)
        logits = own.logits(q).masked_fill(own.at > p, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        e = (logits - top).exp()
        exact = own.sum(e) / e.sum(-1, keepdim=True)
        out, read = exact.clone(), (p + 1).float().expand(q.shape[:2]).clone()
        for i, rule in enumerate(self.rules, 1):
            row = slice(i, i + 1)
            old = (own.at < p + 1 - BAND) & (own.at >= rule.sink)
            near = logits[:, row, :, :t0]
            if rule.source != "true":
                near = self.index[rule.source].logits(q[:, row], rule) * own.scale
            mass = (near - top[:, row]).clamp(max=30).exp() * old[:t0]
            certain = e[:, row] * ~old
            if rule.spread:
                more = 0.5 * own.scale**2 * self.index[rule.source].variance(q[:, row], rule)
                mass = mass * more.clamp(max=1).exp()
            share = mass / (mass.sum(-1, keepdim=True) + certain.sum(-1, keepdim=True))
            if rule.unread:
                chosen = levels(share, rule.unread).any(2) & old[:t0]
            else:
                score = by_run(share.amax(2) if rule.score == "max" else share.sum(2), rule.run)
                floor = score.new_full((1,), rule.threshold) if rule.threshold else rule.times / (p + 1)
                if rule.tokens:
                    floor = score.topk(min(rule.tokens, t0), -1, sorted=False).values.amin(-1, keepdim=True)
                chosen = (score >= floor) & old[:t0]
            w = certain
            w[..., :t0] += e[:, row, :, :t0] * chosen[:, :, None]
            number, weight = own.sum(w, rows=row), w.sum(-1, keepdim=True)
            if rule.rest == "blocks":
                left = mass * ~chosen[:, :, None]
                left = F.pad(left, (0, -t0 % rule.block)).unflatten(-1, (-1, rule.block)).sum(-1)
                number = number + product(left.flatten(1, 2), self.means[rule.block]).view_as(number)
                weight = weight + left.sum(-1, keepdim=True)
            out[:, row] = number / weight
            read[:, i] = chosen.sum(-1)[:, 0] + BAND + rule.sink + self.fixed[i - 1]
        return out, read, exact


def merge(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """LSE (base e) of two parts [K, V, G], and their weights [K, V, G, 1]; an empty part has -inf."""
    both = torch.logaddexp(a, b)
    return both, (a - both).exp().nan_to_num()[..., None], (b - both).exp().nan_to_num()[..., None]


class MatchLayer:
    """One layer's rings under all match rules: entries of the last WINDOW positions, seeded by the prompt's queries."""

    def __init__(self, rules: list[MatchRule], queries, keys, values, steps: int):
        k, t0, d = keys.shape
        g, dev, v = queries.shape[1] // k, keys.device, len(rules)
        self.own, self.runs = Own(keys, values, v, steps), [r.run for r in rules]
        self.most = max(r.tokens for r in rules)
        value, vector = torch.linalg.eigh(covariance(keys)[0])
        self.metric = vector.flip(2)[..., :RANK] * value.flip(1)[:, None, :RANK].clamp(min=0).sqrt()
        self.tokens = torch.tensor([r.tokens for r in rules], device=dev)
        self.tolerance = torch.tensor([r.tolerance for r in rules], device=dev)
        shapes = {"z": (g, RANK), "list": (self.most,), "at": (), "lse": (g,)}
        shapes |= dict.fromkeys(("q", "out", "kbar"), (g, d))
        kinds = {"list": torch.int32, "at": torch.long}
        self.ring = {name: torch.zeros(k, v, WINDOW, *shape, device=dev, dtype=kinds.get(name, torch.float32))
                     for name, shape in shapes.items()}  # fmt: skip
        for p in range(t0 - WINDOW, t0):  # each seed is exact
            at, q = torch.tensor([p], device=dev), queries[p - t0].view(k, 1, g, d).expand(-1, v, -1, -1)
            self.store(self.read(q, *self.masses(q, at), at), at)

    def masses(self, q, p) -> tuple[torch.Tensor, torch.Tensor]:
        """exp of the logits up to p less their largest, and that one."""
        logits = self.own.logits(q).masked_fill(self.own.at > p, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        return (logits - top).exp(), top

    def attend(self, e, top, mask) -> tuple[torch.Tensor, ...]:
        """Output, LSE (base e) and mean key of the tokens in mask [K, V, T]."""
        w = e * mask[:, :, None]
        weight = w.sum(-1, keepdim=True).clamp(min=1e-30)
        return self.own.sum(w) / weight, (weight.log() + top)[..., 0], self.own.sum(w, "keys") / weight

    def mask(self, ids: torch.Tensor) -> torch.Tensor:
        """Lists [K, V, n] of token numbers, T for none -> [K, V, T]."""
        wide = torch.zeros(*ids.shape[:2], len(self.own.at) + 1, dtype=torch.bool, device=ids.device)
        return wide.scatter_(2, ids.long(), True)[..., :-1]

    def read(self, q, e, top, p) -> dict[str, torch.Tensor]:
        """What an exact read of the prefix leaves: the summary without the heavy tokens, and their list."""
        old = self.own.at < p + 1 - BAND
        share = (e / e.sum(-1, keepdim=True)).sum(2) * old  # [K, V, T]
        best = torch.cat([by_run(share[:, i : i + 1], r) for i, r in enumerate(self.runs)], 1).topk(self.most, -1)
        keep = (torch.arange(self.most, device=q.device) < self.tokens[:, None]) & (best.values > 0)
        ids = best.indices.where(keep, len(self.own.at))
        out, lse, kbar = self.attend(e, top, old & ~self.mask(ids))
        z, at = q @ self.metric[:, None], p.expand(q.shape[:2])
        return {"z": z, "list": ids, "at": at, "lse": lse, "q": q, "out": out, "kbar": kbar}

    def store(self, entry: dict[str, torch.Tensor], p) -> None:
        for name, ring in self.ring.items():
            ring.index_copy_(2, p % WINDOW, entry[name].to(ring.dtype)[:, :, None].contiguous())

    def step(self, q, k, v, p: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs, tokens read, exact outputs and hits [K, V], for position p [1]."""
        own, s = self.own, self.own.scale
        own.append(k, v, p)
        e, top = self.masses(q, p)
        exact, miss = own.sum(e) / e.sum(-1, keepdim=True), self.read(q, e, top, p)
        best, pick = ((self.ring["z"] - miss["z"][:, :, None]).pow(2).sum((-1, -2)) * s * s).min(2, keepdim=True)
        hit = best[..., 0] < self.tolerance

        wide = {n: pick.view(*pick.shape, *[1] * (t.dim() - 3)) for n, t in self.ring.items()}
        old = {n: t.gather(2, wide[n].expand(-1, -1, 1, *t.shape[3:]))[:, :, 0] for n, t in self.ring.items()}
        begin, recent = (old["at"] + 1 - BAND)[..., None], own.at >= p + 1 - BAND
        middle, middle_lse, middle_key = self.attend(e, top, (own.at >= begin) & ~recent)
        lse, a, b = merge(old["lse"] + ((q - old["q"]) * old["kbar"]).sum(-1) * s, middle_lse)
        # Along a chain the reused part stays one affine function of the query; z and list stay the anchor's.
        kept = {"q": q, "at": p.expand(hit.shape), "lse": lse, "out": a * old["out"] + b * middle}
        kept = old | kept | {"kbar": a * old["kbar"] + b * middle_key}
        fresh, fresh_lse, _ = self.attend(e, top, self.mask(old["list"]) | recent)
        _, a, b = merge(lse, fresh_lse)
        out = torch.where(hit[..., None, None], a * kept["out"] + b * fresh, exact)
        self.store({name: torch.where(hit.view(*hit.shape, *[1] * (t.dim() - 2)), kept[name].to(t.dtype), t)
                    for name, t in miss.items()}, p)  # fmt: skip
        read = torch.minimum(self.tokens + BAND + (p - old["at"]), p + 1)
        return out, torch.where(hit, read, p + 1).float(), exact, hit


def repeat(token: Callable[[], None], steps: int, device: str) -> None:
    """Decode `steps` tokens, three at least; on a GPU two warm the libraries up, and the third is captured and replayed."""
    token(), token()
    if device == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token()
        token = graph.replay
    for _ in range(2, steps):
        token()


def compare(base: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """Of log probabilities [S, vocabulary]: KL(base, other) and how often the best token agrees."""
    kl, same = (base.exp() * (base - other)).sum(-1), base.argmax(-1) == other.argmax(-1)
    return {"kl": kl.mean().item(), "kl_p99": kl.quantile(0.99).item(), "same": same.float().mean().item()}


def simulate(model: Decoder, ids: list[int], index: list, match: list, steps: int, others, stop: list[int]) -> dict:
    """Decode `steps` tokens after the prompt under every rule; -> a record with one row a rule.

    others: of each layer the moments of other texts by source. stop: tokens that the text does not take.
    """
    model.model.float()
    dev, prompt = model.device, torch.tensor(ids, device=model.device)
    cut, n = 1 + len(index), 1 + len(index) + len(match)
    x, cache, queries = model.prefill(prompt, CODES[dev][0])
    first = [IndexLayer(index, queries[i], *cache[i], steps, others[i]) for i in range(len(model.layers))]
    rings = [MatchLayer(match, queries[i][0], *cache[i], steps) for i in range(len(model.layers)) if match]
    logits = model.logits(x[-1:])[0].clone()
    barred = torch.zeros_like(logits)
    barred[stop] = -1e9  # the reply goes on to the last step
    p, j, text = (torch.tensor(t, device=dev) for t in ([len(ids)], [0], [0] * steps))
    base, kl, same = (torch.zeros(steps, m, device=dev) for m in (len(logits), n, n))
    read, hits, error = (torch.zeros(len(model.layers), n, device=dev) for _ in range(3))

    def token() -> None:
        best = (logits + barred).argmax()[None]
        text.index_copy_(0, j, best)
        x = model.embed(best).expand(n, -1)
        for i in range(len(model.layers)):
            q, k, v = model.qkv(i, x, p)
            q, k, v = (t.transpose(0, 1) for t in (q.view(n, model.groups, -1, model.size), k, v))
            mine = (q[:, :cut].contiguous(), k[:, :cut], v[:, :cut])
            out, tokens, exact = first[i].step(*mine, p)  # noqa: F821 - deleted below
            if match:
                more = rings[i].step(q[:, cut:].contiguous(), k[:, cut:], v[:, cut:], p)  # noqa: F821
                out, tokens, exact = (torch.cat(pair, 1) for pair in zip((out, tokens, exact), more, strict=False))
                hits[i, cut:] += more[3].float().mean(0)
            wrong = model.layers[i].self_attn.o_proj((out - exact).transpose(0, 1).reshape(n, -1))
            error[i] += wrong.pow(2).sum(-1) / x.pow(2).sum(-1)
            read[i] += tokens.mean(0) / (p + 1)
            x = model.after(i, x, out.transpose(0, 1).reshape(n, -1))
        logp = model.logits(x).log_softmax(-1)
        logits.copy_(logp[0])
        agree = (logp.argmax(-1) == logp[0].argmax()).float()
        for kept, new in ((base, logp[0]), (kl, (logp[0].exp() * (logp[0] - logp)).sum(-1)), (same, agree)):
            kept.index_copy_(0, j, new[None])
        p.add_(1), j.add_(1)

    started = time.perf_counter()
    repeat(token, steps, dev)
    kl = kl.cpu()
    seconds, whole = time.perf_counter() - started, torch.cat((prompt, text))
    del first, rings, cache
    model.model.bfloat16()
    codes = [model.logits(model.prefill(whole, c)[0][-steps:]).log_softmax(-1) for c in CODES[dev]]
    return {
        "tokens": len(ids), "steps": steps, "seconds": seconds, "text": text.tolist(),
        "yardstick": {"two bf16 codes": compare(*codes), "bf16 against float32": compare(base, codes[0])},
        "rows": [
            {"name": name, "kl": kl[:, i].mean().item(), "kl_p99": kl[:, i].quantile(0.99).item(),
             "same": same[:, i].mean().item(), "hits": hits[:, i].mean().item() / steps,
             "read": (read[:, i] / steps).tolist(), "error": (error[:, i] / steps).tolist()}  # by layer
            for i, name in enumerate(["exact", *(r.name for r in (*index, *match))])
        ],
    }  # fmt: skip


def learn(model: Decoder, ids: torch.Tensor) -> list[Moments]:
    """Of each layer what the source `all` takes from a text; ids [T]."""
    _, cache, queries = model.prefill(ids.to(model.device), CODES[model.device][0])
    return [Moments.pooled([Moments.of(q, k) for q in both]) for both, (k, _) in zip(queries, cache, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("prompts", type=Path, help="JSON lines with `name` and `prompt`")
    parser.add_argument("rules", type=Path, help="JSON file, see above")
    parser.add_argument("--steps", type=int, default=192, help=f"tokens decoded, 3 to {BAND} (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("simulated.json"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not 2 < args.steps <= BAND:
        parser.error(f"--steps: received {args.steps}; choose 3 to {BAND} (the index holds the prompt only)")
    torch.set_grad_enabled(False)
    tokenizer, model = AutoTokenizer.from_pretrained(args.model), Decoder(args.model, args.device)
    given = json.loads(args.rules.read_text())
    index = [IndexRule(**r | {"dims": tuple(map(tuple, r.get("dims", [(32, 4)])))}) for r in given["index"]]
    match = [MatchRule(**r) for r in given["match"]]
    prompts, seen = {}, {}
    for entry in map(json.loads, filter(str.strip, args.prompts.read_text().splitlines())):
        message = [{"role": "user", "content": entry["prompt"]}]
        chat = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        prompts[entry["name"]] = chat["input_ids"]
    texts = {n: {r.source: other_texts(r.source, n, prompts) for r in index} for n in prompts}
    for rule in index:
        if rule.source not in SOURCES:
            parser.error(f"source: received {rule.source!r}; choose {', '.join(SOURCES)}")
        for name, of in texts.items():
            if rule.source not in (*OWN, "true") and not of[rule.source]:
                parser.error(f"source: received {rule.source!r}; no other prompt has maps for {name}")
    # Up to 100,000: rare tokens and the marks of chat templates come last in a vocabulary.
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(100_000, model.model.config.vocab_size), (HEAD,), generator=random)
    model.model.float()
    for name in {text for of in texts.values() for names in of.values() for text in names}:
        seen[name] = learn(model, tokens if name == RANDOM else torch.tensor(prompts[name]))
    device = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    record = {"model": args.model.name, "device": device, "torch": torch.__version__, "steps": args.steps}
    record |= {"rules": [asdict(r) for r in (*index, *match)], "cases": {}}
    stop = [t for t in (tokenizer.eos_token_id, tokenizer.pad_token_id) if t is not None]
    for name, ids in prompts.items():
        others = [
            {source: Moments.pooled([seen[n][i] for n in names]) for source, names in texts[name].items() if names}
            for i in range(len(model.layers))
        ]
        case = record["cases"][name] = simulate(model, ids, index, match, args.steps, others, stop)
        args.out.write_text(json.dumps(record, indent=1) + "\n")
        yard = case["yardstick"]["two bf16 codes"]
        print(f"{name}: {case['tokens']} tokens, {case['seconds']:.0f} s; yardstick KL {yard['kl']:.5f}, "
              f"p99 {yard['kl_p99']:.4f}, same {yard['same']:.4f}")  # fmt: skip
        for r in case["rows"]:
            read, error = (sum(r[n]) / len(r[n]) for n in ("read", "error"))
            print(f"  {r['name']:40s} read {read:6.1%}  hits {r['hits']:5.1%}  KL {r['kl']:.5f}  p99 "
                  f"{r['kl_p99']:.4f}  same {r['same']:.4f}  error {1e3 * error:.4f}e-3", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
