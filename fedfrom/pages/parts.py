"""The parts of a page: sections with sentences, charts and tables, and the text of a mean with its interval."""

from dataclasses import dataclass, field

from fedfrom.pages.charts import Chart
from fedfrom.pages.groups import Group
from fedfrom.pages.intervals import Interval
from fedfrom.pages.look import MISSING, shown

OLD = "was not recorded by the version that wrote these results"


@dataclass(frozen=True)
class Table:
    """A table: its caption, the columns' names, and rows of texts, whose first cell names the row.

    A `folded` table is hidden until the reader opens it.
    """

    caption: str
    header: list[str]
    rows: list[list[str]]
    folded: bool = False

    @property
    def numeric(self) -> bool:
        """Whether all cells but the rows' names are numbers. Such a table is aligned to the right."""
        return all(cell[:1] in "0123456789+-−–" or cell == "never" for row in self.rows for cell in row[1:])


@dataclass(frozen=True)
class Section:
    """One part of a page."""

    name: str
    title: str
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


def with_interval(found: Interval | None, unit: str, sign: bool = False) -> str:
    """Return a mean in its unit, with the half-width of its interval where there is one."""
    if found is None:
        return MISSING
    plus = "+" if sign and found.mean >= 0 else ""
    half = "" if found.count < 2 else f" ± {shown(found.half_width, unit)}"
    text = f"{plus}{shown(found.mean, unit)}{half}"
    if unit == "percent":
        text = text.replace(" %", "", text.count(" %") - 1)
        return text.replace(" %", " points") if sign else text
    return text


def reference(group: Group) -> str:
    """Return the label of the strategy that the others are compared with: FedAvg, or the group's first strategy."""
    labels = group.labels()
    return "fedavg" if "fedavg" in labels else labels[0]
