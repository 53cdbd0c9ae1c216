"""The frame of a plot: a rectangle with two scales, its grid, and the labels of its axes."""

from __future__ import annotations

from dataclasses import dataclass

from flexnorm.lab.report.markup import Markup, join
from flexnorm.lab.report.scale import Scale
from flexnorm.lab.report.svg import Point, fit, group, line, text, text_width

FONT = 11.5
"""Size of the text of an axis, in pixels of the view box."""


@dataclass(frozen=True)
class Frame:
    """Where data lies in a drawing.

    Attributes:
        width: Width of the drawing.
        height: Height of the drawing.
        x: Horizontal scale.
        y: Vertical scale.
        left: Margin for the labels of the vertical axis.
        right: Margin on the right.
        top: Margin for the heading.
        bottom: Margin for the labels of the horizontal axis.
    """

    width: float
    height: float
    x: Scale
    y: Scale
    left: float
    right: float = 14.0
    top: float = 44.0
    bottom: float = 38.0

    @classmethod
    def fitting(cls, width: float, height: float, x: Scale, y: Scale) -> Frame:
        """Return a frame whose left margin fits the labels of its vertical axis."""
        widest = max((text_width(t.label, FONT) for t in y.ticks), default=0.0)
        return cls(width, height, x, y, left=max(26.0, widest + 10.0))

    def px(self, value: float) -> float:
        """Return where a value lies horizontally."""
        return self.left + (self.width - self.left - self.right) * self.x(value)

    def py(self, value: float) -> float:
        """Return where a value lies vertically."""
        return self.height - self.bottom - (self.height - self.top - self.bottom) * self.y(value)

    def point(self, x: float, y: float) -> Point:
        """Return where a pair of values lies."""
        return self.px(x), self.py(y)

    def grid(self, *, heading: str = "", x_label: str = "", y_label: str = "", vertical: bool = False) -> Markup:
        """Return grid lines, labels of ticks and axes, and a heading above the plot.

        Args:
            heading: What tells this panel from its neighbours.
            x_label: Name and unit of the horizontal axis.
            y_label: Name and unit of the vertical axis; it stands above the axis, where it is read without turning
                the head.
            vertical: Whether the horizontal axis has grid lines too.
        """
        x0, x1, y0 = self.left, self.width - self.right, self.height - self.bottom
        parts: list[Markup] = []
        for tick in self.y.ticks:
            y = self.py(tick.value)
            parts += [line(x0, y, x1, y, "grid"), text(x0 - 7, y + 4, tick.label, anchor="end", class_="tick")]
        if self.y.zero_at_edge:
            parts.append(text(x0 - 7, y0 + 4, "0", anchor="end", class_="tick"))
        free = -1e9
        for tick in self.x.ticks:
            x, half = self.px(tick.value), text_width(tick.label, FONT) / 2
            parts.append(
                line(x, self.top if vertical else y0, x, y0 + (0 if vertical else 4), "grid" if vertical else "stem")
            )
            # A label that would touch its neighbour is left out rather than printed over it.
            if x - half > free + 4 and x + half < self.width + 10:
                parts.append(text(x, y0 + 16, tick.label, anchor="middle", class_="tick"))
                free = x + half
        parts.append(line(x0, y0, x1, y0, "base"))
        if heading:
            parts.append(text(0, 12, fit(heading, self.width, 13), class_="heading"))
        if y_label:
            parts.append(text(0, 28 if heading else 12, fit(y_label, self.width, FONT), class_="label"))
        if x_label:
            parts.append(text(x1, self.height - 5, x_label, anchor="end", class_="label"))
        return group(join(parts), aria_hidden="true")
