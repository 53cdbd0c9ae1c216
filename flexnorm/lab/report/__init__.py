"""From results to one self-contained HTML page.

`write_report` reads the folder of a comparison and writes its ``report.html``; `picture` draws its main figure as an
SVG file.
Inside: `load` turns the folder into a `Study`; `aggregate` turns that into the rows of the table; each ``figure_*``
    module
draws one figure with the primitives of `svg`, `scale` and `frame`; `page` puts everything together.
"""

from flexnorm.lab.report.picture import picture
from flexnorm.lab.report.write import write_report

__all__ = ["picture", "write_report"]
