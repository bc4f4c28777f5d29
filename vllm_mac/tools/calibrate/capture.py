"""What vLLM's attention layers are given while a prompt is read, and the simulation on it.

The engine runs MAC with threshold 1, which is exact attention and knows which layers MAC serves and how
to undo their rotation. Queries, keys and values are taken before each such layer, chunk by chunk. When
the prompt is read, layers are simulated one after the other, on the worker's device, and dropped. Until
then keys and values of the whole prompt and queries of its end are held, about the size of its KV cache.
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
        """Watch the layers that MAC serves. Returns {"layers": [(name, index)], "exact": {reason: layers}}.

        output: watch what their blocks are given too, for the error of their output. Raises RuntimeError where that
        cannot be told.
        """
        layers = mac_layers(self.vllm_config)
        self.calibrate_grid = grid_of(grid)
        self.calibrate_candidates = self.calibrate_grid.candidates(paper)
        self.calibrate_watches = {
            layer.name: _Watch(layer, self.calibrate_grid) for layer in layers if layer.exact is None
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
        """The next forward passes read a prompt of so many tokens."""
        for watch in self.calibrate_watches.values():
            watch.begin(tokens)

    def calibrate_layer(self, name: str) -> dict | None:
        """`simulate.tally` of a layer for the prompt that was read; None for a layer of another worker.

        Raises RuntimeError where vLLM did not give the layer the whole prompt.
        """
        watch = self.calibrate_watches.get(name)
        if watch is None:
            return None
        model_dtype = self.vllm_config.model_config.dtype
        dtypes = ring_dtypes(watch.layer.config, model_dtype)
        with torch.inference_mode():
            return simulate.measure(watch.take(), self.calibrate_candidates, self.calibrate_grid.steps, dtypes)


def _place(model: nn.Module, attention: nn.Module) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """The block of the model that an attention layer lies in, and its `W_O`.

    The block is the entry of the model's list of layers, `W_O` the one row-parallel matrix beside the attention layer.
    Raises RuntimeError for models that are built otherwise.
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
    """Pre-hook of one attention layer: collects one prompt, given in chunks. project: its `W_O`, where its output is
    wanted; then `enter` is the pre-hook of its block."""

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
        """Blocks are given the residual stream, or what is to be added to it and the stream before."""
        if self.seen < self.tokens:
            given = [
                x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 2
            ]
            stream = sum(x.float() for x in given[:2])
            self.residual.append((stream[: self.tokens - self.seen] ** 2).sum(-1))

    def __call__(self, _module, args: tuple, kwargs: dict) -> None:
        if self.seen >= self.tokens:
            return  # no prompt is awaited: warm-up, or a reply
        query, key, value = (
            args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value"))
        )
        layer = self.layer
        size = min(len(query), self.tokens - self.seen)
        # Copies: the model goes on to use these buffers.
        split = lambda x, heads, begin: x[begin:size].reshape(size - begin, heads, -1).clone()
        self.keys.append(split(key, layer.num_kv_heads, 0))
        self.values.append(split(value, layer.num_kv_heads, 0))
        begin = max(0, self.tokens - self.wanted - self.seen)
        if begin < size:
            self.query.append(split(query, layer.num_heads, begin))
        self.seen += size

    def take(self) -> simulate.Layer:
        """The layer as it was, in float32; nothing of it is kept here."""
        if self.seen != self.tokens:
            raise RuntimeError(f"{self.layer.name} was given {self.seen} of {self.tokens} tokens of the prompt")
        query, keys, values = torch.cat(self.query), torch.cat(self.keys), torch.cat(self.values)
        residual = torch.cat(self.residual)[self.tokens - len(query) :] if self.residual else None
        self.begin(0)
        position = torch.arange(self.tokens - len(query), self.tokens, device=query.device)
        pre = self.layer.rotary.undo(query, position)
        by_head = lambda x: x.transpose(0, 1).float().contiguous()
        return simulate.Layer(
            query.float(), pre, by_head(keys), by_head(values), self.layer.scale, self.project, residual
        )
