"""From results to one self-contained HTML page.

`write_report` reads the folder of a comparison and writes its ``report.html``; `picture` draws its main figure as a
file. Inside: `load` turns the folder into a :class:`flexnorm.lab.records.Study`, `figures` draws it, `table` and
`headline` say what it says, and `page` puts everything together.
"""

from flexnorm.lab.report.figures import picture
from flexnorm.lab.report.page import write_report

__all__ = ["picture", "write_report"]
