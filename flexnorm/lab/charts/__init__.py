"""Pictures of the lab: one engine for the report, the figures of the theory and those of the benchmarks.

A `Chart` is plain data: two scales and some `Series`. It becomes an SVG element of a page, which the page's script lets
the reader ask for values, or with others a file (`save`). `markup` makes elements, `numbers` writes numbers.
"""

from flexnorm.lab.charts.chart import Chart, Series, legend_sample
from flexnorm.lab.charts.palette import HUES, Hue, dash, hues, marker_shape, style
from flexnorm.lab.charts.scale import Scale, Tick, accuracy, linear, log_or_linear, logarithmic, rows
from flexnorm.lab.charts.sheet import check_format, save, sheet, write_text

__all__ = [
    "HUES",
    "Chart",
    "Hue",
    "Scale",
    "Series",
    "Tick",
    "accuracy",
    "check_format",
    "dash",
    "hues",
    "legend_sample",
    "linear",
    "log_or_linear",
    "logarithmic",
    "marker_shape",
    "rows",
    "save",
    "sheet",
    "style",
    "write_text",
]
