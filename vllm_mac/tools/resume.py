"""Whether a stopped run may go on: on the same machine, with the same software and arguments."""

# A run that continued elsewhere, or with other code, would not be one run.
SAME = ("gpu", "vllm", "torch", "triton", "flashinfer", "vllm_mac", "commit")


def same_place(environment: dict) -> dict:
    """The part of an environment that must be equal for a run to continue in it."""
    # The run's own output files can make a checkout `-dirty`.
    return {key: environment[key] for key in SAME} | {"commit": environment["commit"].removesuffix("-dirty")}


def differences(there: dict, now: dict) -> list[str]:
    """A line for each key whose value at the start of a run differs from the value now."""
    return [
        f"{name}: there {there.get(name)!r}, now {now.get(name)!r}"
        for name in dict.fromkeys([*there, *now])
        if there.get(name) != now.get(name)
    ]
