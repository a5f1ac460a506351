"""``d2net info``."""

from __future__ import annotations

from d2net.cli.terminal import make_console


def info() -> None:
    """Show versions, the build of the extension, the devices and which backend each operator runs on.

    \b
    Examples:
      d2net info
    """
    from d2net.info import show

    show(make_console())
