"""How docstrings become the reference: links where they name code, as :func:`nms_1d`, and no fields twice."""

from __future__ import annotations

import re
from html import escape
from typing import Any

from griffe import Class, Extension, Module, NameResolutionError, Object

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`~?([^`]+)`")


class Docstrings(Extension):
    """Links of docstrings, and what is left out of the pages."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = ROLE.sub(lambda found: _link(obj, found[1]), obj.docstring.value)

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        self.on_object(obj=pkg)

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Fields are described in the docstring of their class."""
        for name, member in list(cls.members.items()):
            if (member.is_attribute and member.docstring is None) or name == "__post_init__":
                cls.del_member(name)


def _link(obj: Object, name: str) -> str:
    """HTML, as a link that need not lead anywhere: not all of the code has a page."""
    try:
        target = obj.resolve(name)
    except NameResolutionError:  # a whole path, or no code that griffe has read
        target = name
    return f'<autoref optional identifier="{escape(target)}"><code>{escape(name)}</code></autoref>'
