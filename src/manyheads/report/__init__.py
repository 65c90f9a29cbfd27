"""Drawing for every room: figures of heads, and the page they stand on. Knows scores and numbers, no room's results.

`figures` are HTML tables and inline SVG rather than Plotly: a page with all its figures then takes some 300 kB instead
of 5 MB, follows the reader's light or dark theme, prints as vectors, can be read aloud, and needs no permission to run
scripts but its own (see the content security policy in `html`).
"""

from manyheads.report.write import Reported, html_of, page_of, write

__all__ = ["Reported", "html_of", "page_of", "write"]
