"""Reports: one self-contained HTML page on one or several simulations.

`write_report(runs, out)` writes the page, and `fedfrom.commands.report` is its command line. Both need matplotlib,
scipy and Jinja2, which the extras `cli` and `simulation` install; they are imported when a page is written.
"""

from fedfrom.pages.page_of_runs import write_report

__all__ = ["write_report"]
