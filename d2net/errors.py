"""The exceptions that d2net raises for errors that a user can fix."""

from __future__ import annotations

from d2net.words import escaped

__all__ = ["D2NetError", "InputError"]


class D2NetError(Exception):
    """An error that the user can fix: one line that names the cause and the way out.

    The command line prints the message and exits with code 2; ``--debug`` adds the traceback. The message is passed
    through :func:`d2net.words.escaped`, as names in it may hold any character.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(escaped(str(message)))


class InputError(D2NetError, ValueError):
    """A wrong value, shape, type, file or name."""
