"""The exceptions that d2net raises for things a user can mend."""

from __future__ import annotations

from d2net.words import escaped


class D2NetError(Exception):
    """Something the user can mend: one line that names the thing and the way out.

    The command line prints the message and exits with code 2; ``--debug`` adds the traceback. Names in it are shown as
    :func:`d2net.words.escaped` makes them, whatever they hold.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(str(message)))


class InputError(D2NetError, ValueError):
    """A wrong value, shape, type, file or name."""
