"""Reports: one self-contained HTML page on one or several simulations.

`write_report(runs, out)` makes it, `fedfrom.pages.command.report` is its command line. Needs matplotlib,
scipy and Jinja2, which come with the extras `cli` and `simulation`; they are loaded when a page is written.
"""

from fedfrom.pages.page_of_runs import write_report

__all__ = ["write_report"]
