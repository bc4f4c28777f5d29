"""Trains the testbed: a Llama of 7.8 M parameters, for bytes, with a context of 32768, on one GPU.

    python examples/train_testbed.py --probe 60                      # does it run here, and how fast
    python examples/train_testbed.py --minutes 9 --total-minutes 18  # train; call again with --resume to go on
    python examples/train_testbed.py --minutes 9 --total-minutes 18 --resume build/testbed/checkpoint.pt
    python examples/train_testbed.py --evaluate-only                 # accuracy of the folder's weights

Run it from the repository's root, with the project installed or PYTHONPATH=. set.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import testbed_data as data
import torch
import torch.nn.functional as F
from byte_model import BOS, CONTEXT, EOS, PAD, VOCAB, write_tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vllm_mac.tools.eval import tasks

END = ord(data.END)
# Weight of each kind of target in the loss. The haystack's words and digits are drawn at random: little is to be learned.
WEIGHTS = {"noise": 0.1, "lookup": 0.6, "long": 0.4, "text": 0.15, "asked": 0.6}
MUON_RATE, EMBED_RATE, HEAD_RATE = 0.02, 6e-3, 3e-3
WARM_UP, DECAY = 200, 0.35  # steps; the last share of the time
ACCUMULATE_FROM = 8192  # rows this long are too few per batch: two batches make a step
LOG_EVERY, SAVE_EVERY = 10.0, 50.0  # seconds


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a Llama, and tokens of a batch."""

    hidden: int = 384
    inner: int = 672
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    head: int = 64
    theta: float = 500000.0
    context: int = CONTEXT
    tokens: int = 131072
    longest: int = CONTEXT


TINY = Shape(hidden=128, inner=256, layers=2, tokens=4096, longest=256)


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return (F.rms_norm(x.float(), (x.shape[-1],), eps=1e-5) * gain).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE in the order of transformers' Llama: pairs are half a head apart. x [tokens, heads, D], cos, sin [tokens, 1, D / 2]."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def before_attention(x: Tensor, gain: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor):
    """Queries, keys and values [tokens, heads, 64] of the residual stream x [tokens, hidden]."""
    h = norm(x, gain)
    n, head = x.shape[0], 2 * cos.shape[-1]
    q, k, v = (F.linear(h, w.to(h.dtype)).view(n, -1, head) for w in (q, k, v))
    return rotate(q, cos, sin), rotate(k, cos, sin), v


def after_attention(x: Tensor, a: Tensor, o: Tensor, gain: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    x = x + F.linear(a, o.to(x.dtype))
    h = norm(x, gain)
    h = F.silu(F.linear(h, gate.to(h.dtype))) * F.linear(h, up.to(h.dtype))
    return x + F.linear(h, down.to(h.dtype))


def losses(x: Tensor, gain: Tensor, head: Tensor, target: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the loss, and number of targets, of each kind: two of [kinds]."""
    logits = F.linear(norm(x, gain), head.to(x.dtype)).float()
    loss = F.cross_entropy(logits, target, reduction="none")
    each = (kind[:, None] == torch.arange(len(data.KINDS), device=kind.device)).to(loss.dtype)
    return loss @ each, each.sum(0)


class Llama(nn.Module):
    """Llama with the layers' weights stacked, so that the optimiser handles all layers at once.

    Everything but attention works on tokens whatever the length of their rows: it is compiled once for all lengths.
    """

    STACKS = ("q", "k", "v", "o", "gate", "up", "down")

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape, h = shape, shape.hidden
        q, kv = shape.heads * shape.head, shape.kv_heads * shape.head
        sizes = {"q": (q, h), "k": (kv, h), "v": (kv, h), "o": (h, q)}
        sizes |= {"gate": (shape.inner, h), "up": (shape.inner, h), "down": (h, shape.inner)}
        for name, (rows, columns) in sizes.items():
            # What writes into the residual stream starts at zero, so that the first steps are those of a shallow model.
            std = 0.0 if name in ("o", "down") else columns**-0.5
            self.register_parameter(name, nn.Parameter(torch.randn(shape.layers, rows, columns) * std))
        self.norms = nn.Parameter(torch.ones(shape.layers, 2, h))
        self.final = nn.Parameter(torch.ones(h))
        self.embed = nn.Parameter(torch.randn(VOCAB, h) * 0.5)
        self.head = nn.Parameter(torch.randn(VOCAB, h) * 0.1 * h**-0.5)
        # In float32, as transformers and vLLM do: at 32768 the angles' rounding shows.
        frequency = 1.0 / shape.theta ** (torch.arange(0, shape.head, 2).float() / shape.head)
        angle = torch.arange(shape.context).float()[:, None] * frequency
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        self.register_buffer("weights", torch.tensor([WEIGHTS[kind] for kind in data.KINDS]), persistent=False)
        self.dtype = torch.float32
        self.attention = (SDPBackend.FLASH_ATTENTION, True)
        self.parts = (before_attention, after_attention, losses)

    def compile(self) -> None:
        self.parts = tuple(torch.compile(part, dynamic=False) for part in self.parts)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Causal attention within rows of `length`; the three are [tokens, heads, 64], the result [tokens, heads * 64]."""
        q, k, v = (t.view(-1, length, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
        backend, grouped = self.attention
        if not grouped:
            k, v = (t.repeat_interleave(self.shape.heads // self.shape.kv_heads, dim=1) for t in (k, v))
        with sdpa_kernel(backend if q.is_cuda else SDPBackend.MATH):
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return a.transpose(1, 2).reshape(-1, self.shape.heads * self.shape.head)

    def hidden(self, tokens: Tensor, parts=(before_attention, after_attention)) -> Tensor:
        """Residual stream after the last layer [rows * length, hidden] of tokens [rows, length]."""
        rows, length = tokens.shape
        before, after = parts[:2]
        cos, sin = (t[:length].repeat(rows, 1)[:, None] for t in (self.cos, self.sin))
        x = F.embedding(tokens.reshape(-1), self.embed).to(self.dtype)
        stacks = [getattr(self, name).unbind(0) for name in self.STACKS]
        for q, k, v, o, gate, up, down, gains in zip(*stacks, self.norms.unbind(0), strict=True):
            a = self.attend(*before(x, gains[0], q, k, v, cos, sin), length)
            x = after(x, a, o, gains[1], gate, up, down)
        return x

    def logits(self, x: Tensor) -> Tensor:
        return F.linear(norm(x, self.final), self.head.to(x.dtype)).float()

    def forward(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of int16 [rows, length + 1] as testbed_data makes them, and sums and counts by kind [2, kinds].

        The loss is each kind's mean, weighted.
        """
        batch = batch.long()
        tokens = batch & ((1 << data.KIND_SHIFT) - 1)
        x = self.hidden(tokens[:, :-1], self.parts)
        kinds = batch[:, 1:].reshape(-1) >> data.KIND_SHIFT
        sums, counts = self.parts[2](x, self.final, self.head, tokens[:, 1:].reshape(-1), kinds)
        return (self.weights * sums / counts.clamp(min=1)).sum(), torch.stack((sums.detach(), counts))

    def named_weights(self) -> dict[str, Tensor]:
        """The weights by transformers' names."""
        places = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj"}
        places |= {name: f"mlp.{name}_proj" for name in ("gate", "up", "down")}
        found = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.final, "lm_head.weight": self.head}
        for i in range(self.shape.layers):
            found |= {f"model.layers.{i}.{place}.weight": getattr(self, name)[i] for name, place in places.items()}
            found[f"model.layers.{i}.input_layernorm.weight"] = self.norms[i, 0]
            found[f"model.layers.{i}.post_attention_layernorm.weight"] = self.norms[i, 1]
        return found


def choose_attention(model: Llama, device: torch.device) -> dict[str, float]:
    """Times forward and backward of what PyTorch offers here, in ms, and sets the fastest that is right."""
    shape, length, times = model.shape, 16384, {}
    tokens = shape.tokens
    q, k, v = (torch.randn(tokens, n, shape.head, device=device, dtype=model.dtype, requires_grad=True)
               for n in (shape.heads, shape.kv_heads, shape.kv_heads))  # fmt: skip
    grad, first = torch.randn(tokens, shape.heads * shape.head, device=device, dtype=model.dtype), None
    ways = [(SDPBackend.FLASH_ATTENTION, False), (SDPBackend.FLASH_ATTENTION, True)]
    ways += [(SDPBackend.CUDNN_ATTENTION, False), (SDPBackend.CUDNN_ATTENTION, True)]
    for way in ways:
        name = f"{way[0].name} {'grouped' if way[1] else 'expanded'}"
        model.attention = way
        try:
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                out = model.attend(q, k, v, length)
                grads = torch.autograd.grad(out, (q, k, v), grad)
                torch.cuda.synchronize()
            found = [t.float() for t in (out, *grads)]
        except RuntimeError as error:
            print(f"  {name}: {str(error).splitlines()[0][:100]}")
            continue
        if first is None:
            first = found
        # Two bf16 results of the same sums differ by a few units of 2^-8 of their size.
        apart = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, first, strict=True))
        if apart < 0.02:
            times[name] = (1000 * (time.perf_counter() - start), way)
        else:
            print(f"  {name}: differs by {apart:.3f}, not used")
    name = min(times, key=lambda name: times[name][0])
    model.attention = times[name][1]
    print(f"attention: {name}; " + ", ".join(f"{n} {t:.1f} ms" for n, (t, _) in times.items()), flush=True)
    return {n: t for n, (t, _) in times.items()}


@torch.no_grad()
def orthogonal(x: Tensor) -> Tensor:
    """About the nearest semi-orthogonal matrices to x [n, rows, columns], by five quintic Newton-Schulz steps (Muon)."""
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).float()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if x.is_cuda:
        x = x.bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimiser:
    """Muon for the matrices of the layers, AdamW for embedding, head and norms."""

    def __init__(self, model: Llama):
        self.matrices = {name: getattr(model, name) for name in model.STACKS}
        self.momenta = {name: torch.zeros_like(p, dtype=torch.bfloat16) for name, p in self.matrices.items()}
        rates = [(model.embed, EMBED_RATE), (model.head, HEAD_RATE), (model.final, HEAD_RATE), (model.norms, HEAD_RATE)]
        groups = [{"params": [p], "lr": rate, "rate": rate} for p, rate in rates]
        self.adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=model.embed.is_cuda)
        self.rate, self.steps = 1.0, 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One step at `share` of the full learning rate; frees the gradients."""
        inertia = 0.85 + 0.1 * min(1.0, self.steps / 300)
        for name, weight in self.matrices.items():
            momentum = self.momenta[name].float().lerp_(weight.grad, 1 - inertia)
            self.momenta[name].copy_(momentum)
            rate = MUON_RATE * share
            scale = max(1.0, weight.shape[1] / weight.shape[2]) ** 0.5
            weight.mul_(1 - 0.05 * rate).add_(orthogonal(weight.grad.lerp(momentum, inertia)), alpha=-rate * scale)
            weight.grad = None
        for group in self.adam.param_groups:
            group["lr"] = group["rate"] * share
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.steps += 1

    def state(self) -> dict:
        return {"momenta": self.momenta, "adam": self.adam.state_dict(), "steps": self.steps}

    def load(self, state: dict) -> None:
        for name, momentum in self.momenta.items():
            momentum.copy_(state["momenta"][name])
        self.adam.load_state_dict(state["adam"])
        self.steps = state["steps"]


class Training:
    """Model, optimiser and what has been done so far; saved and loaded as one checkpoint."""

    def __init__(self, options: argparse.Namespace, shape: Shape):
        torch.manual_seed(0)
        self.device = torch.device(options.device)
        self.model = Llama(shape).to(self.device)
        if self.device.type == "cuda":
            self.model.dtype = torch.bfloat16
        self.optimiser = Optimiser(self.model)
        self.seconds, self.tokens, self.runs, self.log = 0.0, 0, 0, []
        if options.resume:
            saved = torch.load(options.resume, map_location=self.device, weights_only=True)
            if saved["shape"] != asdict(shape):
                raise SystemExit(f"{options.resume} holds a model of another shape: {saved['shape']}")
            self.model.load_state_dict(saved["model"])
            self.optimiser.load(saved["optimiser"])
            self.seconds, self.tokens, self.runs, self.log = (saved[k] for k in ("seconds", "tokens", "runs", "log"))

    def warm_up(self) -> None:
        """Compiles everything before the clock starts."""
        shape = self.model.shape
        rows = torch.zeros(shape.tokens // shape.longest, shape.longest + 1, dtype=torch.int16, device=self.device)
        self.model(rows)[0].backward()
        for weight in self.model.parameters():
            weight.grad = None

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        saved = {
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state(),
            "shape": asdict(self.model.shape),
        }
        saved |= {"seconds": self.seconds, "tokens": self.tokens, "runs": self.runs, "log": self.log}
        torch.save(saved, path.with_suffix(".part"))
        os.replace(path.with_suffix(".part"), path)

    def run(self, feed: data.Feed, seconds: float, total: float, steps: int | None, checkpoint: Path | None) -> None:
        """Trains for so many seconds or steps. The learning rate and the rows' length go by the time used of `total`."""
        self.runs += 1
        before, start = self.seconds, time.perf_counter()
        logged = saved = start
        kinds = len(data.KINDS)
        sums = torch.zeros(2, kinds, device=self.device)
        lengths: dict[int, int] = {}
        waited, done, pending = 0.0, 0, 0
        while True:
            now = time.perf_counter()
            self.seconds = before + now - start
            progress = min(1.0, self.seconds / total)
            feed.progress.value = progress
            if now - logged >= LOG_EVERY or now - start >= seconds or done == steps:
                spent, tokens = max(now - logged, 1e-9), sum(lengths.values())
                if tokens:
                    by_kind = zip(data.KINDS, *sums.tolist(), strict=True)
                    means = {kind: round(nats / n, 4) for kind, nats, n in by_kind if n}
                    row = {
                        "seconds": round(self.seconds, 1),
                        "step": self.optimiser.steps,
                        "tokens": self.tokens,
                        **means,
                    }
                    self.log.append(row)
                    print(
                        f"{self.seconds:6.0f} s  step {self.optimiser.steps:6d}  {tokens / spent / 1e6:5.2f} M tokens/s  "
                        f"waited for data {waited / spent:4.0%}  rows {lengths}  "
                        + "  ".join(f"{k} {v:.3f}" for k, v in means.items()),
                        flush=True,
                    )
                sums.zero_()
                lengths, waited, logged = {}, 0.0, now
            if now - start >= seconds or done == steps:
                break
            if checkpoint and now - saved >= SAVE_EVERY:
                self.save(checkpoint)
                saved = now
            rows = feed.take()
            waited += time.perf_counter() - now
            batch = torch.from_numpy(rows)
            if self.device.type == "cuda":
                batch = batch.pin_memory().to(self.device, non_blocking=True)
            length = rows.shape[1] - 1
            loss, by_kind = self.model(batch)
            halves = 2 if length >= ACCUMULATE_FROM else 1
            (loss / halves).backward()
            sums += by_kind
            lengths[length] = lengths.get(length, 0) + rows.shape[0] * length
            self.tokens += rows.shape[0] * length
            pending += 1
            if pending >= halves:
                warm = min(1.0, (self.optimiser.steps + 1) / WARM_UP)
                self.optimiser.step(warm * min(1.0, max(0.0, (1 - progress) / DECAY)))
                pending, done = 0, done + 1


def held_out(task: str, length: int, index: int) -> tuple[str, int, list[tuple[int, int]]]:
    """A prompt with its right reply, together at most `length` tokens; where the reply starts; where each answer lies.

    The seeds are none that training uses.
    """
    seed = f"held-out/{task}/{length}/{index}"
    room = length - len(tasks.episode(task, random.Random(seed), 0).turns[0].reply) - 48
    for _ in range(9):
        episode = tasks.episode(task, random.Random(seed), room)
        turn = episode.turns[0]
        asked = f"{data.BOS}{data.USER}{episode.prompt}{data.END}{data.ASSISTANT}{turn.prefix}"
        whole = asked + turn.reply + data.END
        if len(whole) <= length:
            break
        room -= len(whole) - length
    else:
        raise ValueError(f"{task} does not fit into {length} tokens")
    answers, at = [], len(asked)
    for answer in turn.answers:
        # A plan's first line begins in the prefix.
        at = whole.find(answer, at if answers else len(asked) - len(turn.prefix))
        answers.append((max(at, len(asked)), at + len(answer)))
        at += len(answer)
    return whole, len(asked), answers


def fits(task: str, length: int) -> bool:
    """Whether the task's facts and its reply, with some slack for longer words, fit into `length`."""
    shortest = tasks.episode(task, random.Random(0), 0)
    return 1.2 * (len(shortest.prompt) + len(shortest.turns[0].reply)) + 64 <= length


@torch.no_grad()
def evaluate(model: Llama, samples: list, batch: int) -> dict:
    """Accuracy under full attention when every token before is right (equal to greedy decoding's where all are).

    samples: (task, length, held_out's result). Returns {task: {length: {"exact": share of replies right to the last
    byte, "answers": mean share of answers right, "n": samples}}}.
    """
    device, found = model.embed.device, {}
    groups: dict[tuple, list] = {}
    for task, length, sample in samples:
        groups.setdefault((task, length), []).append(sample)
    for (task, length), group in groups.items():
        exact, share, at_once = [], [], max(1, batch // length)
        for first in range(0, len(group), at_once):
            part = group[first : first + at_once]
            tokens = torch.full((len(part), length), PAD)
            for i, (whole, _, _) in enumerate(part):
                tokens[i, : len(whole)] = torch.tensor([ord(c) for c in whole])
            x = model.hidden(tokens.to(device)).view(len(part), length, -1)
            for i, (whole, start, answers) in enumerate(part):
                predicted = model.logits(x[i, start - 1 : len(whole) - 1]).argmax(-1).cpu()
                right = predicted == tokens[i, start : len(whole)]
                exact.append(right.all().item())
                share.append(sum(right[a - start : b - start].all().item() for a, b in answers) / len(answers))
        accuracy = {"exact": sum(exact) / len(exact), "answers": sum(share) / len(share), "n": len(group)}
        found.setdefault(task, {})[str(length)] = accuracy
        print(f"{task:18s} {length:6d}  exact {accuracy['exact']:6.1%}  answers {accuracy['answers']:6.1%}", flush=True)
    return found


def write(model: Llama, folder: Path) -> None:
    """The model as transformers and vLLM load it, in bf16; leaves the model with the rounded weights."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    folder.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCAB,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        max_position_embeddings=shape.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        dtype="bfloat16",
        bos_token_id=BOS,
        eos_token_id=[EOS, END],
        pad_token_id=PAD,
    ).save_pretrained(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16())
    weights = {name: weight.detach().bfloat16().cpu().contiguous() for name, weight in model.named_weights().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder, shape.context)
    # A turn ends with <|end|>. Requests must not inherit sampling defaults.
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [EOS, END]}))


def read(folder: Path, shape: Shape, device: torch.device) -> Llama:
    from safetensors.torch import load_file

    model, weights = Llama(shape), load_file(folder / "model.safetensors")
    with torch.no_grad():
        for name, weight in model.named_weights().items():
            weight.copy_(weights[name])
    model = model.to(device)
    model.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model


def draw_losses(log: list[dict], folder: Path) -> None:
    """loss.json, and loss.png where matplotlib is installed."""
    (folder / "loss.json").write_text("[\n" + ",\n".join(json.dumps(row) for row in log) + "\n]\n")
    try:
        import matplotlib
    except ImportError:
        print("no loss.png: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for kind in data.KINDS:
        rows = [row for row in log if kind in row]
        axes.plot([row["tokens"] / 1e6 for row in rows], [max(row[kind], 1e-4) for row in rows], label=kind)
    axes.set(
        xlabel="tokens trained on, millions", ylabel="loss, nats per byte", yscale="log", title="Testbed: training loss"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(folder / "loss.png", dpi=120)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("examples/testbed"), help="where the model goes")
    parser.add_argument("--checkpoint", type=Path, default=Path("build/testbed/checkpoint.pt"))
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--minutes", type=float, default=9.0, help="training time of this call")
    parser.add_argument("--total-minutes", type=float, help="training time of all calls (default: of this one)")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--probe", type=float, metavar="SECONDS", help="try speed, memory and data instead")
    parser.add_argument("--evaluate-only", action="store_true", help="no training: accuracy of the folder's weights")
    parser.add_argument("--samples", type=int, default=64, help="evaluation samples per task and length")
    parser.add_argument("--workers", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a model of two layers and rows of 256, to try the script")
    return parser.parse_args()


def probe(training: Training, feed: data.Feed, seconds: float) -> None:
    """Speed and memory at each length of the curriculum, then training for the rest of the time."""
    start, shape = time.perf_counter(), training.model.shape
    cuda = training.device.type == "cuda"
    draw, text = random.Random("probe"), data.library()
    for length in sorted({min(shape.longest, n) for _, shares in data.CURRICULUM for n in shares}):
        made = time.perf_counter()
        batch = torch.from_numpy(data.rows(draw, length, shape.tokens // length, text))
        made = time.perf_counter() - made
        batch = batch.to(training.device)
        for trial in range(4):
            if trial == 1:
                torch.cuda.synchronize() if cuda else None
                began = time.perf_counter()
            training.model(batch)[0].backward()
            training.optimiser.step(0.0)
        torch.cuda.synchronize() if cuda else None
        each = (time.perf_counter() - began) / 3
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan
        print(
            f"rows of {length}: {each * 1000:.1f} ms a step, {shape.tokens / each / 1e6:.2f} M tokens/s, peak {peak:.1f} GiB; "
            f"one worker makes {shape.tokens / made / 1e6:.2f} M tokens/s, {len(feed)} work",
            flush=True,
        )
    training.optimiser.steps = 0
    training.run(feed, seconds - (time.perf_counter() - start), 1e9, None, None)


def main() -> None:
    options = parse()
    shape = TINY if options.tiny else Shape()
    cuda = options.device.startswith("cuda")
    total = 60 * (options.total_minutes or options.minutes)
    # All processes are forked before CUDA starts.
    lengths = [length for length in (4096, 16384, 32768) if length <= shape.longest] or [1024]
    jobs = [
        (task, length, i)
        for task in tasks.TASKS
        for length in lengths
        if fits(task, length)
        for i in range(options.samples)
    ]
    pool = multiprocessing.get_context("fork").Pool(options.workers)
    samples = None if options.probe else pool.starmap_async(held_out, jobs, chunksize=8)
    feed = None
    if not options.evaluate_only:
        runs = torch.load(options.resume, map_location="cpu", weights_only=True)["runs"] if options.resume else 0
        feed = data.Feed(shape.tokens, options.workers, runs, shape.longest)
    if cuda:
        torch.backends.cuda.matmul.allow_tf32 = True
        print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if options.evaluate_only:
        model, log = read(options.folder, shape, torch.device(options.device)), None
        if cuda:
            choose_attention(model, torch.device(options.device))
    else:
        training = Training(options, shape)
        model, log = training.model, training.log
        print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
        if cuda:
            choose_attention(model, training.device)
            model.compile()
        if options.probe:
            probe(training, feed, options.probe)
            feed.stop()
            pool.terminate()
            return
        training.warm_up()
        training.run(feed, 60 * options.minutes, total, options.steps, options.checkpoint)
        feed.stop()
        training.save(options.checkpoint)
        write(model, options.folder)
        draw_losses(log, options.folder)
    done = [(task, length, sample) for (task, length, _), sample in zip(jobs, samples.get(), strict=True)]
    pool.close()
    accuracy = evaluate(model, done, shape.tokens)
    report = options.folder / "training.json"
    facts = json.loads(report.read_text()) if report.exists() else {}
    if not options.evaluate_only:
        facts = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "minutes": round(training.seconds / 60, 2),
            "total_minutes": total / 60,
            "calls": training.runs,
            "steps": training.optimiser.steps,
            "tokens": training.tokens,
            "gpu": torch.cuda.get_device_name() if cuda else "none (CPU)",
            "torch": torch.__version__,
        }
    facts["accuracy"] = accuracy
    report.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
