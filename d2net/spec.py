"""What ``--data`` says of the datasets that d2net makes itself: ``NAME[,KEY=VALUE...][:ANNOTATIONS.json]``."""

from __future__ import annotations

from collections.abc import Mapping

from d2net.errors import InputError
from d2net.words import did_you_mean, quoted


def is_simulated(spec: object) -> bool:
    """Whether it is ``simulated[,KEY=VALUE...][:ANNOTATIONS.json]`` (:func:`d2net.data.simulated.open_simulated`)."""
    return _name(spec) == "simulated"


def is_watch(spec: object) -> bool:
    """Whether it is ``watch[,difficulty=easy|hard]`` (:func:`d2net.data.watch.load_watch`)."""
    return _name(spec) == "watch" and ":" not in str(spec)


def is_made(spec: object) -> bool:
    """Whether it is one of them."""
    return is_watch(spec) or is_simulated(spec)


def settings_of(spec: str, usual: Mapping[str, str]) -> dict[str, str]:
    """The values of its settings, those that it does not name being as usual.

    Raises:
        InputError: a setting that is unknown.
    """
    given = dict(usual)
    for setting in spec.partition(":")[0].split(",")[1:]:
        key, _, value = setting.partition("=")
        if key not in given:
            raise InputError(
                f"--data {quoted(spec)}: unknown setting {quoted(key)}{did_you_mean(key, given)}; there are "
                + ", ".join(f"{name}={value}" for name, value in usual.items())
            )
        given[key] = value
    return given


def _name(spec: object) -> str | None:
    return spec.partition(":")[0].partition(",")[0] if isinstance(spec, str) else None
