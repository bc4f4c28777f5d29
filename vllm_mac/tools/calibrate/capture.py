"""Captures the inputs of vLLM's attention layers during a prefill, and simulates MAC on them.

The engine runs MAC with threshold 1: this is exact attention, and MAC's layers can undo their rotation. Queries, keys
and values are captured before each such layer, chunk by chunk. After the prefill the layers are simulated one after
another on the worker's device, and freed. Until then the keys and values of the whole prompt and the queries of its end
take about as much memory as its KV cache.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import extract_layer_index

from vllm_mac.layers import MacLayer, exact_reasons, mac_layers
from vllm_mac.ring import ring_dtypes
from vllm_mac.tools.calibrate import simulate
from vllm_mac.tools.calibrate.grid import grid_of


class CalibrateWorker:
    """Extension of vLLM's worker: `worker_extension_cls`. Methods are called by `collective_rpc`."""

    vllm_config: VllmConfig  # the worker's
    get_model: Callable[[], nn.Module]  # the worker's

    def calibrate_start(self, grid: dict, paper: bool, output: bool = False) -> dict:
        """Watch the layers that use MAC. Returns {"layers": [(name, index)], "exact": {reason: layers}}.

        output: also watch the inputs of their blocks, for the error of their output. Raises RuntimeError where the
        model's structure does not allow that.
        """
        layers = mac_layers(self.vllm_config)
        self.calibrate_grid = grid_of(grid)
        self.calibrate_candidates = self.calibrate_grid.candidates(paper)
        self.calibrate_watches = {
            str(layer.name): _Watch(layer, self.calibrate_grid) for layer in layers if layer.exact is None
        }
        context = self.vllm_config.compilation_config.static_forward_context
        for name, watch in self.calibrate_watches.items():
            if output:
                block, watch.project = _place(self.get_model(), context[name])
                block.register_forward_pre_hook(watch.enter, with_kwargs=True)
            context[name].register_forward_pre_hook(watch, with_kwargs=True)
        return {
            "layers": [(name, extract_layer_index(name)) for name in self.calibrate_watches], "exact": exact_reasons(layers),
        }  # fmt: skip

    def calibrate_prompt(self, tokens: int) -> None:
        """The next forward passes prefill a prompt of `tokens` tokens."""
        for watch in self.calibrate_watches.values():
            watch.begin(tokens)

    def calibrate_layer(self, name: str) -> dict | None:
        """`simulate.tally` of a layer on the last prompt; None for a layer of another worker.

        Raises RuntimeError where the layer did not see the whole prompt.
        """
        watch = self.calibrate_watches.get(name)
        if watch is None:
            return None
        model_dtype = self.vllm_config.model_config.dtype
        # vLLM has resolved the dtype by now.
        dtypes = ring_dtypes(watch.layer.config, model_dtype)  # pyrefly: ignore[bad-argument-type]
        with torch.inference_mode():
            return simulate.measure(watch.take(), self.calibrate_candidates, self.calibrate_grid.steps, dtypes)


def _place(model: nn.Module, attention: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The block of the model that contains an attention layer, and the layer's `W_O`.

    The block is an entry of the model's list of layers. `W_O` is the only row-parallel matrix beside the attention
    layer. Raises RuntimeError for models with another structure.
    """
    from vllm.model_executor.layers.linear import RowParallelLinear

    name = next((name for name, module in model.named_modules() if module is attention), "")
    above = [model.get_submodule(name[:i]) for i in range(len(name)) if name[i] == "."]
    blocks = [block for several, block in pairwise([model, *above]) if isinstance(several, nn.ModuleList)]
    matrices = [child for child in above[-1].children() if isinstance(child, RowParallelLinear)] if above else []
    if not blocks or len(matrices) != 1 or matrices[0].tp_size != 1:
        raise RuntimeError(
            f"layer {name or '?'}: found {len(blocks)} blocks around it, {len(matrices)} row-parallel matrices beside it; --metric output "
            "needs one matrix, whole on one worker"
        )
    matrix = matrices[0]
    return blocks[-1], lambda x: matrix.quant_method.apply(matrix, x.to(matrix.params_dtype)).float()


class _Watch:
    """Pre-hook of one attention layer that collects the chunks of one prompt.

    project: the layer's `W_O`, where its output is wanted; then `enter` is the pre-hook of its block.
    """

    def __init__(self, layer: MacLayer, grid):
        self.layer, self.wanted = layer, grid.window + grid.steps
        self.tokens = self.seen = 0
        self.query: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.project: Callable[[Tensor], Tensor] | None = None
        self.residual: list[Tensor] = []

    def begin(self, tokens: int) -> None:
        self.tokens, self.seen = tokens, 0
        self.query, self.keys, self.values, self.residual = [], [], [], []

    def enter(self, _module, args: tuple, kwargs: dict) -> None:
        """A block's input is the residual stream, or the stream so far and what must be added to it."""
        if self.seen < self.tokens:
            given = [
                x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2
            ]
            stream = torch.stack([x.float() for x in given[:2]]).sum(0)
            self.residual.append((stream[: self.tokens - self.seen] ** 2).sum(-1))

    def __call__(self, _module, args: tuple, kwargs: dict) -> None:
        if self.seen >= self.tokens:
            return  # a warm-up, or a reply
        query, key, value = (
            args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))
        )
        layer = self.layer
        size = min(len(query), self.tokens - self.seen)
        # Copies, because the model reuses these buffers.
        split = lambda x, heads, begin: x[begin:size].reshape(size - begin, heads, -1).clone()
        self.keys.append(split(key, layer.num_kv_heads, 0))
        self.values.append(split(value, layer.num_kv_heads, 0))
        begin = max(0, self.tokens - self.wanted - self.seen)
        if begin < size:
            self.query.append(split(query, layer.num_heads, begin))
        self.seen += size

    def take(self) -> simulate.Layer:
        """The captured layer in float32. The watch frees its own copies."""
        if self.seen != self.tokens:
            raise RuntimeError(f"{self.layer.name} saw {self.seen} of {self.tokens} tokens of the prompt")
        query, keys, values = torch.cat(self.query), torch.cat(self.keys), torch.cat(self.values)
        residual = torch.cat(self.residual)[self.tokens - len(query) :] if self.residual else None
        self.begin(0)
        position = torch.arange(self.tokens - len(query), self.tokens, device=query.device)
        # A layer that uses MAC has a rotation.
        pre = self.layer.rotary.undo(query, position)  # pyrefly: ignore[missing-attribute]
        by_head = lambda x: x.transpose(0, 1).float().contiguous()
        return simulate.Layer(
            query.float(), pre, by_head(keys), by_head(values), self.layer.scale, self.project, residual
        )
