"""HTML and SVG elements as strings that are escaped by construction.

Every string that is not already `Markup` is escaped on its way into an element, so that a normalizer that is called
``<script>`` can only ever be text.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

from markupsafe import Markup as Markup

VOID = frozenset({"meta", "link", "br", "hr", "input", "col"})
"""HTML elements that have no closing tag."""

SELF_CLOSING = frozenset({"path", "line", "rect", "circle", "polygon", "polyline", "use"})
"""SVG elements that are written ``<path ... />`` when they are empty."""

Child = object
"""What may stand inside an element: `Markup`, text, a number, None (nothing), or an iterable of these."""


def escape(value: object) -> str:
    """Return a value as text that is safe inside an element and inside a quoted attribute.

    Characters that HTML forbids (control characters, lone surrogates) become U+FFFD, so that the page stays valid.
    """
    if isinstance(value, Markup):
        return value
    text = "".join(c if c in "\t\n" or (c >= " " and not "\x7f" <= c <= "\x9f") else "\ufffd" for c in str(value))
    return html.escape("".join("\ufffd" if "\ud800" <= c <= "\udfff" else c for c in text), quote=True)


def number(value: float) -> str:
    """Return a coordinate with at most two decimals and no trailing zeros (``12.5``, ``-3``, never ``-0``)."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("-0", "") else text


def _inside(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, str):
            yield escape(child)
        elif isinstance(child, Iterable):
            yield from _inside(child)
        else:
            yield escape(child)


def _attributes(attributes: dict[str, object]) -> str:
    parts = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        key = name.rstrip("_").replace("_", "-")
        text = number(value) if isinstance(value, float) else escape(value)
        parts.append(f" {key}" if value is True else f' {key}="{text}"')
    return "".join(parts)


def element(tag: str, *children: Child, **attributes: object) -> Markup:
    """Return one element.

    Args:
        tag: Its name (``"td"``, ``"path"``).
        *children: What stands inside. Plain strings are escaped, `Markup` is not, None is skipped, iterables are
            flattened.
        **attributes: Its attributes; ``class_`` gives ``class``, ``stroke_width`` gives ``stroke-width``. None and
            False leave an attribute out, True writes it without a value, a float is written as a coordinate.

    Examples:
        >>> print(element("td", "a < b", class_="name"))
        <td class="name">a &lt; b</td>
    """
    head = f"<{tag}{_attributes(attributes)}"
    if tag in VOID:
        return Markup(f"{head}>")
    inner = "".join(_inside(children))
    if not inner and tag in SELF_CLOSING:
        return Markup(f"{head}/>")
    return Markup(f"{head}>{inner}</{tag}>")


def join(parts: Iterable[Child], separator: str = "") -> Markup:
    """Return parts side by side as one `Markup`; the separator is escaped like any text."""
    return Markup(escape(separator).join(_inside(parts)))
