"""Entry points: make the name MAC known to vLLM, in every process and before it is needed.

vLLM calls `platform` when it first asks which platform it runs on, before it parses its
configuration, and `register` later, both in every process and perhaps more than once.
Neither may fail: an exception here would stop every start of vLLM, with MAC or without.
"""

import copyreg
import functools
import logging

NAME = "MAC"
BACKEND = "vllm_mac.backend.MacBackend"

# Only the logger `vllm` has a handler.
logger = logging.getLogger("vllm.mac")


def platform() -> None:
    """Entry point of `vllm.platform_plugins`: registers the name and offers no platform."""
    _guarded(_register_name)


def register() -> None:
    """Entry point of `vllm.general_plugins`."""
    _guarded(_register_name)
    _guarded(_honour_on_cpu)
    _guarded(_check_early)
    _guarded(_check_requests)
    _guarded(_export_counters)


def _guarded(step) -> None:
    try:
        step()
    except Exception:
        from vllm_mac import __version__

        logger.exception(
            "vllm-mac %s does not fit this vLLM (%s failed): --attention-backend MAC may be unknown to it, or serve "
            "without what that step adds. The versions that fit are in README.",
            __version__, step.__name__.lstrip("_"),
        )  # fmt: skip


def _check_early() -> None:
    from vllm_mac import startup

    startup.install()


def _check_requests() -> None:
    from vllm_mac.per_request import check_requests

    check_requests()


def _register_name() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME not in AttentionBackendEnum.__members__:
        AttentionBackendEnum.register(NAME, BACKEND)
    # An engine process unpickles its configuration before it loads plugins, and a member
    # unpickled by value is then unknown: let unpickling register it. Goes when vLLM pickles
    # its members by name.
    copyreg.pickle(AttentionBackendEnum, _reduce)


def _reduce(member):
    if member.name == NAME:
        return _restore, ()
    return member.__reduce_ex__(2)


def _restore():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _register_name()
    return AttentionBackendEnum[NAME]


def _honour_on_cpu() -> None:
    """Make the CPU platform, which otherwise ignores the choice, take MAC when it is chosen.

    The wrapping goes when vLLM's CPU platform takes a registered backend that was chosen.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    cls = type(current_platform)
    original = cls.get_attn_backend_cls.__func__
    if getattr(original, "honours_mac", False):
        return

    @functools.wraps(original)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if selected_backend is None or selected_backend.name != NAME:
            return original(cls, selected_backend, attn_selector_config, num_heads)
        from vllm.platforms.interface import DeviceCapability

        reasons = selected_backend.get_class().validate_configuration(
            # A CPU has none; the name is required, and no check on CPUs reads it.
            device_capability=DeviceCapability(0, 0),
            **attn_selector_config._asdict(),
        )
        if reasons:
            raise ValueError(
                f"--attention-backend {NAME} cannot serve this model as configured: {'; '.join(reasons)}. "
                "Leave --attention-backend out for vLLM's own choice."
            )
        return selected_backend.get_path()

    get_attn_backend_cls.honours_mac = True
    cls.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _export_counters() -> None:
    from vllm_mac.exporter import install

    install()
