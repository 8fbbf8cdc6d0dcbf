"""Colours, markers, and the text of numbers and names, for pages, pictures and the console."""

import re
from typing import Any

# Okabe and Ito's colours, told apart under the common kinds of colour blindness; yellow, too faint, left out.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "legend.frameon": False,
}
MISSING = "–"
LONGEST = 200  # characters of a text from a file


def display_name(label: str) -> str:
    """Return a strategy's name for readers."""
    name, *settings = label.split(":")
    proper = {"from": "FedFroM", "fedavg": "FedAvg"}.get(name, f"FedMerge {name}")
    return f"{proper} ({', '.join(settings)})" if settings else proper


def percent(share: float, digits: int = 0) -> str:
    """Return a share of 1 in per cent."""
    return f"{100 * share:.{digits}f} %"


def module_name(name: str) -> str:
    """Return a layer's name without the prefixes and the suffix that all layers of a model have."""
    return re.sub(r"^(base_model\.model\.)?((encoder|bert|roberta)\.)*", "", name).removesuffix(".weight")


def size(count: float) -> str:
    """Return a number of bytes with a unit that suits it."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def clean(value: Any, longest: int = LONGEST) -> str:
    """Return a value as one line of printable text.

    Control characters, halves of surrogate pairs, and marks that turn the direction of writing become "�". A longer
    text is cut and ends in "…".
    """
    line = "".join(c if c.isprintable() else " " if c.isspace() else "�" for c in str(value)[: 4 * longest])
    line = " ".join(line.split())
    return line if len(line) <= longest else line[: longest - 1] + "…"


def shown(value: float | None, unit: str = "number") -> str:
    """Return a number in a unit: "percent" (of 1), "bytes", "seconds", "count" or "number"; None is "–"."""
    if value is None:
        return MISSING
    if unit == "percent":
        return percent(value, 1)
    if unit == "bytes":
        return size(value)
    if unit == "seconds":
        return f"{value:.2f} s" if abs(value) < 10 else f"{value:,.0f} s"
    if unit == "count":
        return f"{value:,.10g}"
    return f"{value:.3f}" if value == 0 or 0.001 <= abs(value) < 1e5 else f"{value:.2e}"
