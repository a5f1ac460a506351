"""Which of the arrays in a container are the features."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from d2net.errors import InputError

NAMES = ("feats", "features", "feature", "feat")  # usual names of a container's only array


def stream_names(content: Mapping[str, Any], source: str) -> dict[str, str]:
    """Under which names the features lie: {"": its name}, or those of "rgb" and "flow"."""
    lower = {key.lower(): key for key in content}
    if "rgb" in lower and "flow" in lower:
        return {"rgb": lower["rgb"], "flow": lower["flow"]}
    if len(content) == 1:
        return {"": next(iter(content))}
    known = [lower[name] for name in NAMES if name in lower]
    if len(known) == 1:
        return {"": known[0]}
    there = ", ".join(sorted(content)) or "nothing"
    raise InputError(f"{source}: expected one array, or rgb and flow, found {there}; call the features '{NAMES[0]}'")
