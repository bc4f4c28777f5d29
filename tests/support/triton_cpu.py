"""Lets vLLM's Model Runner V2, which needs Triton, run on a CPU.

vLLM turns Triton off on CPUs unless `triton.backends` lists a backend named
`cpu`; Triton wants exactly one driver that says it is active. `enable()` lists
such a stub in this process (a separate server process would not see it). Nothing
is ever compiled with it: under TRITON_INTERPRET=1 every kernel runs in Triton's
interpreter, which costs 2-10 ms a launch, hardly depending on the work inside:

* V2 launches seven kernels a step (slot mapping and Gumbel sampling are the
  dearest) with a few programs per request: about 25 ms a step at batch 1, 40 at
  4, 60 at 8, whatever the model. So V2 tests are cheap in tokens per step and
  dear in steps: short outputs, several requests at once.
* V1 has one such kernel, for which CPUs without Triton use a C++ operator: `native_v1()`
  puts that back (2 ms a step instead of 10, and the path that CPU users are on).
* Sampling parameters other than greedy, and logprobs, launch more kernels.
* After each launch every storage behind an argument is copied onto itself, so
  buffers must stay small: max_model_len 1024, max_num_seqs 8.
"""

import dataclasses
import functools
import os
import sys


def enable() -> None:
    """Turn the interpreter on and list the stub, before vLLM or a Triton kernel is imported."""
    if "vllm.triton_utils" in sys.modules or ("triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1"):
        if enabled():
            return
        raise RuntimeError("triton_cpu.enable() must come before the first import of vllm or of a Triton kernel")
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated, so at import
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend, GPUTarget
    from triton.backends.driver import DriverBase

    class Compiler(BaseBackend):
        supports_target = staticmethod(lambda target: target.backend == "cpu")
        hash = parse_options = add_stages = load_dialects = get_module_map = None

    class Driver(DriverBase):
        is_active = classmethod(lambda cls: True)
        map_python_to_cpp_type = get_benchmarker = None

        def get_current_target(self):
            return GPUTarget("cpu", 0, 1)

        def get_active_torch_device(self):
            import torch

            return torch.device("cpu")

    backends.setdefault("cpu", Backend(Compiler, Driver))
    _skip_unused_overflow_checks()
    _replace_language_once_a_launch()


def enabled() -> bool:
    """Whether this process can build a V2 engine on a CPU."""
    backends = getattr(sys.modules.get("triton.backends"), "backends", {})
    return "cpu" in backends and os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def native_v1() -> None:
    """Give V1 the C++ slot mapping that it has on CPUs without Triton."""
    from vllm.triton_utils.dispatcher import register_kernels
    from vllm.utils import cpu_triton_utils

    kernel = "vllm.v1.worker.block_table.ComputeSlotMappingKernel.kernel"
    register_kernels({kernel: cpu_triton_utils._compute_slot_mapping_kernel_impl})


def _skip_unused_overflow_checks() -> None:
    # The interpreter computes each int sum twice to check it for overflow and then, without its
    # debug option, drops the result: a third of the time of every launch.
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _replace_language_once_a_launch() -> None:
    # The interpreter replaces Triton's language by its own at each launch, and looks through it again at each call of
    # a device function: another third of the time.
    import inspect
    from types import SimpleNamespace

    from triton import language
    from triton.runtime import interpreter

    replace, replaced = interpreter._patch_lang, set()
    nothing = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def spoken(function) -> set:
        return {
            name
            for name, module in (("tl", language), ("core", language.core))
            if any(inspect.ismodule(value) and value is module for value in function.__globals__.values())
        }

    def replace_once(function):
        if replaced and spoken(function) <= replaced:
            return nothing
        launch, scope = not replaced, replace(function)
        replaced.update(spoken(function))
        if not launch:
            return scope

        def restore():
            replaced.clear()
            scope.restore()

        return SimpleNamespace(restore=restore)

    interpreter._patch_lang = replace_once
