"""What ``--data`` says of the datasets that d2net makes itself."""

from __future__ import annotations


def is_simulated(spec: object) -> bool:
    """Whether it is ``simulated[,KEY=VALUE...][:ANNOTATIONS.json]`` (:func:`d2net.data.simulated.open_simulated`)."""
    return isinstance(spec, str) and spec.partition(":")[0].partition(",")[0] == "simulated"


def is_made(spec: object) -> bool:
    """Whether it is that, or ``watch``."""
    return spec == "watch" or is_simulated(spec)
