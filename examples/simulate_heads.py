"""Whether heads should have tolerances of their own: what each KV head's costs and saves alone, and the best of all mixtures.

    python examples/simulate_heads.py MODEL --out heads.json --plot heads.png

Decodes texts of `vllm-mac eval`'s tasks under many tolerances side by side, in float32 PyTorch, as `simulate_reuse.py`
does and with its parts. Every row is fed the tokens that exact attention picks. First each KV head alone is looked up at
each tolerance and the others are exact: the KL of the next token from exact's is what it costs. Then mixtures read a
given share of the KV for the least sum of such costs, found on this text (`own`) or on texts of the other kinds
(`other`). In place of the KL the cost may be the squared error after the output projection relative to the residual, or
of the layer's outputs relative to them, which a server could measure by itself. `uniform` is one tolerance for all.

Maps of the index are made of one other text of each kind and length, as a server has learned them. With --maps these are
compared with a text's own, and with those of a single text of another kind.
"""

import argparse
import json
import math
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from simulate_reuse import BAND, CODES, Decoder, IndexRule, KeyIndex, Moments, Own, learn, product, repeat
from transformers import AutoTokenizer

from vllm_mac.tools.eval.requests import Encoder, generated

SINK, PAGE, AT_ONCE = 64, 64, 64  # leading tokens always read; tokens to a mean value; rows whose shares are in memory
TOLERANCES = (0.7, 1.5, 3.0, 6.0, 12.0)
UNIFORM = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5)
READS = (0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.21, 0.25)  # shares that mixtures are to read
MIXTURES = (("own", "kl"), ("other", "kl"), ("other", "projected"), ("other", "outputs"))  # texts, cost


class Layer:
    """One layer under all rows. tolerance: `[V, K]`, of each row and KV head; 0 is exact."""

    def __init__(self, tolerance, keys, values, moments: Moments, steps: int, directions: int):
        self.own, self.tolerance = Own(keys, values, len(tolerance), steps), tolerance
        self.rows = (tolerance > 0).any(1).nonzero()[:, 0]
        self.index, self.rule = KeyIndex(keys, moments), IndexRule("", dims=((directions, 4),))
        t0 = keys.shape[1]
        self.means = F.pad(values, (0, 0, 0, -t0 % PAGE)).unflatten(1, (-1, PAGE)).mean(2)
        self.fixed = t0 * (directions / 2 / (4 * keys.shape[2]) + 1 / (2 * PAGE))  # bytes, in tokens of KV

    def step(self, q, k, v, p) -> tuple[torch.Tensor, ...]:
        """Outputs `[K, V, G, d]`, tokens read `[V, K]`, exact outputs. q: `[K, V, G, d]`. p: `[1]`, the position."""
        own, t0 = self.own, self.own.t0
        own.append(k, v, p)
        logits = own.logits(q).masked_fill_(own.at > p, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        e = logits.sub_(top).exp_()
        exact = own.sum(e) / e.sum(-1, keepdim=True)
        out, read = exact.clone(), torch.ones(len(self.tolerance), len(q), device=q.device) * (p + 1)
        old = (own.at < p + 1 - BAND) & (own.at >= SINK)
        for rows in self.rows.split(AT_ONCE) if len(self.rows) else ():
            tolerance = self.tolerance[rows].T[:, :, None]  # [K, n, 1]
            mass = self.index.logits(q[:, rows], self.rule) * own.scale - top[:, rows]
            mass = mass.clamp(max=30).exp() * old[:t0]
            weights = e[:, rows] * ~old
            share = mass / (mass.sum(-1, keepdim=True) + weights.sum(-1, keepdim=True))
            chosen = (share.amax(2) >= tolerance / (p + 1)) & old[:t0]
            weights[..., :t0] += e[:, rows, :, :t0] * chosen[:, :, None]
            left = F.pad(mass * ~chosen[:, :, None], (0, -t0 % PAGE)).unflatten(-1, (-1, PAGE)).sum(-1)
            number = own.sum(weights, rows=rows)
            number = number + product(left.flatten(1, 2), self.means).view_as(number)
            number = number / (weights.sum(-1, keepdim=True) + left.sum(-1, keepdim=True))
            looked = tolerance > 0
            out[:, rows] = torch.where(looked[..., None], number, exact[:, rows])
            read[rows] = torch.where(looked[..., 0].T, chosen.sum(-1).T + BAND + SINK + self.fixed, read[rows])
        return out, read, exact


@dataclass(frozen=True)
class Found:
    """Of each row the mean KL and the share of equal best tokens `[V]`, shares read `[V, L, K]`, errors `[V, L]`."""

    kl: torch.Tensor
    same: torch.Tensor
    read: torch.Tensor
    projected: torch.Tensor
    outputs: torch.Tensor


def decode(model: Decoder, prefilled: tuple, moments: list, tolerance, steps: int, directions: int, barred) -> Found:
    """tolerance: `[V, L, K]`, the first row 0. prefilled: as `Decoder.prefill` gives it. barred: `[vocabulary]`, added
    to the logits that pick tokens."""
    x, cache, _ = prefilled
    v, dev, length = len(tolerance), model.device, len(x)
    layers = [Layer(tolerance[:, i], *cache[i], moments[i], steps, directions) for i in range(len(model.layers))]
    logits = model.logits(x[-1:])[0].clone()
    p, j = torch.tensor([length], device=dev), torch.tensor([0], device=dev)
    kl, same = (torch.zeros(steps, v, device=dev) for _ in "ab")
    read = torch.zeros(v, len(layers), model.groups, device=dev)
    projected, outputs = (torch.zeros(v, len(layers), device=dev) for _ in "ab")
    flat = lambda t: t.transpose(0, 1).reshape(v, -1)

    def token() -> None:
        best = (logits + barred).argmax()[None]
        x = model.embed(best).expand(v, -1)
        for i, layer in enumerate(layers):
            q, k, values = model.qkv(i, x, p)
            q, k, values = (t.transpose(0, 1) for t in (q.reshape(v, model.groups, -1, model.size), k, values))
            out, tokens, exact = layer.step(q.contiguous(), k, values, p)
            project, wrong = model.layers[i].self_attn.o_proj, flat(out - exact)
            projected[:, i] += project(wrong).pow(2).sum(-1) / (x + project(flat(exact))).pow(2).sum(-1)
            outputs[:, i] += wrong.pow(2).sum(-1) / flat(exact).pow(2).sum(-1)
            read[:, i] += tokens / (p + 1)
            x = model.after(i, x, flat(out))
        logp = model.logits(x).log_softmax(-1)
        logits.copy_(logp[0])
        agree = (logp.argmax(-1) == logp[0].argmax()).float()
        for kept, new in ((kl, (logp[0].exp() * (logp[0] - logp)).sum(-1)), (same, agree)):
            kept.index_copy_(0, j, new[None])
        p.add_(1), j.add_(1)

    repeat(token, steps, dev)
    return Found(kl.mean(0).cpu(), same.mean(0).cpu(), *(t.cpu() / steps for t in (read, projected, outputs)))


def alone(model: Decoder, prefilled: tuple, moments: list, at_once: int, **how) -> dict[str, torch.Tensor]:
    """Costs and shares read `[L, K, tolerances]` of each head alone; `at_once` rows at a time."""
    shape = len(model.layers), model.groups, len(TOLERANCES)
    rows = [(i, h, t) for i in range(shape[0]) for h in range(shape[1]) for t in TOLERANCES]
    tolerance, found = torch.zeros(len(rows), *shape[:2], device=model.device), []
    for r, (i, h, t) in enumerate(rows):
        tolerance[r, i, h] = t
    for part, names in zip(
        tolerance.split(at_once), [rows[i : i + at_once] for i in range(0, len(rows), at_once)], strict=True
    ):
        got = decode(model, prefilled, moments, torch.cat((torch.zeros_like(part[:1]), part)), **how)
        found += [
            (got.kl[r], got.projected[r, i], got.outputs[r, i], got.read[r, i, h])
            for r, (i, h, _) in enumerate(names, 1)
        ]
    return {
        name: torch.stack(list(of)).view(shape)
        for name, of in zip(("kl", "projected", "outputs", "read"), zip(*found), strict=True)
    }


def mixture(of: list[dict], cost: str, share: float) -> torch.Tensor:
    """Tolerances `[L, K]` that read this share of the KV, or a little less, for the least sum of costs over `of`."""
    costs, reads = (sum(one[name] for one in of) / len(of) for name in (cost, "read"))
    least, most = 1e-12, 1e3  # what a share read is worth
    for _ in range(60):
        worth = math.sqrt(least * most)
        best = (costs + worth * reads).argmin(-1, keepdim=True)
        too_much = reads.gather(-1, best).mean() > share
        least, most = (worth, most) if too_much else (least, worth)
    return torch.tensor(TOLERANCES)[(costs + most * reads).argmin(-1)]


def kind(name: str) -> str:
    """Of a text named by `vllm-mac eval`: its task."""
    return name.split("/")[2]


def pooled(texts: list[list[Moments]]) -> list[Moments]:
    """Of each layer, of several texts, all alike."""
    return [Moments.pooled([*of]) for of in zip(*texts, strict=True)]


def by_maps(model: Decoder, prompts: dict, texts: list, moments: dict, how: dict, out: Path) -> None:
    """KL and reads at uniform tolerances, with maps of the text itself, of each one of another kind, and of all others."""
    rows, flat = [], torch.ones(len(model.layers), model.groups, device=model.device)
    tolerance = torch.stack([t * flat for t in (0.0, *UNIFORM)])
    for name in texts:
        others = [other for other in moments if other not in texts]
        maps = {"own": moments[name], "all": pooled([moments[other] for other in others])}
        maps |= {other: moments[other] for other in others if kind(other) != kind(name)}
        prefilled = model.prefill(prompts[name], CODES[model.device][0])
        for of, some in maps.items():
            got = decode(model, prefilled, some, tolerance, **how)
            for t, kl, read in zip(UNIFORM, got.kl[1:], got.read[1:], strict=True):
                rows.append({"text": name, "maps": of, "tolerance": t, "kl": float(kl), "read": float(read.mean())})
            print(
                name, of, " ".join(f"{r['tolerance']}: {1e3 * r['kl']:.3f}" for r in rows[-len(UNIFORM) :]), flush=True
            )
    out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def plot(rows: list[dict], path: Path) -> None:
    """Mean KL against the mean share read, a line for each kind of mixture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for name in dict.fromkeys(row["mixture"] for row in rows):
        points = [row for row in rows if row["mixture"] == name and row["mean_kl"] < 3e-3]
        axes.plot(
            [100 * row["mean_read"] for row in points], [row["mean_kl"] for row in points], "o-", ms=3, label=name
        )
    axes.set(xlabel="KV read, %, the index counted", ylabel="KL of the next token, nats", yscale="log")
    axes.legend(frameon=False), axes.grid(alpha=0.3)
    figure.savefig(path, dpi=140)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument(
        "--lengths", default="8192,30000", help="tokens of a prompt and its reply (default %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=128, help=f"tokens decoded, 3 to {BAND} (default %(default)s)")
    parser.add_argument(
        "--rows", type=int, default=140, help="rows decoded at once, a matter of memory (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("heads.json"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--maps", action="store_true", help="compare maps of different texts instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if not 2 < args.steps <= BAND:
        parser.error(f"--steps: received {args.steps}; choose 3 to {BAND} (the index holds the prompt only)")
    torch.set_grad_enabled(False)
    model = Decoder(args.model, args.device)
    model.model.float()
    tokenizer, config = AutoTokenizer.from_pretrained(args.model), model.model.config
    made = generated(
        ("manual", "codebase", "niah_multikey"), tuple(map(int, args.lengths.split(","))), 2, 7,
        Encoder(tokenizer, config.max_position_embeddings),
    )  # fmt: skip
    prompts = {request.id: torch.tensor(request.ids, device=args.device) for request in made}
    barred = torch.zeros(config.vocab_size, device=args.device)
    barred[
        sorted({i for i in tokenizer.all_special_ids if i is not None} | {*range(len(tokenizer), config.vocab_size)})
    ] = -1e9
    how = {"steps": args.steps, "directions": model.size // 2, "barred": barred}
    texts = [name for name in prompts if name.endswith("/0")]  # the others are what maps are made of
    moments = {}
    for name in (name for name in prompts if args.maps or name not in texts):
        moments[name] = learn(model, prompts[name])
        print(f"learned from {name}", flush=True)
    if args.maps:
        return by_maps(model, prompts, texts, moments, how, args.out)
    moments = pooled([*moments.values()])
    single = {}
    for name in texts:
        single[name] = alone(model, model.prefill(prompts[name], CODES[args.device][0]), moments, args.rows, **how)
        print(f"heads alone: {name}", flush=True)
    rows = [{"mixture": "uniform", "of": t, "texts": {}} for t in UNIFORM]
    rows += [
        {"mixture": f"{whose} text, {cost}", "of": share, "texts": {}} for whose, cost in MIXTURES for share in READS
    ]
    for name in texts:
        others = [one for other, one in single.items() if kind(other) != kind(name)]
        flat = torch.full((len(model.layers), model.groups), 1.0)
        tolerance = [t * flat for t in UNIFORM]
        tolerance += [
            mixture([single[name]] if whose == "own" else others, cost, s) for whose, cost in MIXTURES for s in READS
        ]
        tolerance = torch.stack([0 * flat, *tolerance]).to(args.device)
        got = decode(model, model.prefill(prompts[name], CODES[args.device][0]), moments, tolerance, **how)
        for row, kl, same, read in zip(rows, got.kl[1:], got.same[1:], got.read[1:], strict=True):
            row["texts"][name] = {"kl": float(kl), "same": float(same), "read": float(read.mean())}
        print(f"mixtures: {name}", flush=True)
    for row in rows:
        row |= {
            f"mean_{key}": sum(one[key] for one in row["texts"].values()) / len(texts) for key in ("kl", "same", "read")
        }
        print(f"{row['mixture']:24} {row['of']:5} KL {row['mean_kl']:.6f} read {row['mean_read']:.3f}")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor()
    about = {"model": args.model.name, "machine": machine, "torch": torch.__version__, "steps": args.steps}
    args.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
