"""The merging methods of the study, each with its published scale and the constant that the design seed suggests."""

from dataclasses import dataclass, field
from typing import Any

REFERENCE = "average"  # what the other methods are compared with, at its tuned scale
PRIMARY = ("tsv", REFERENCE)  # tested first; the contrasts of SECONDARY are tested together, by Holm's method
SECONDARY = (
    ("from k=1", REFERENCE),
    ("ties", REFERENCE),
    ("iso-cts", REFERENCE),
    ("core-ties", REFERENCE),
    ("tsv k=0", "tsv"),
)


@dataclass(frozen=True)
class MethodRow:
    """One row of the tables.

    Attributes
    ----------
    name : str
        In the tables.
    method : str
        Name of fedfrom's method.
    options : dict[str, Any]
        Its options.
    published : float
        The scale that the method's paper or its released code has as default: what theta* is multiplied by.
    constant : float | None
        The scale that the design seed's tuning rows chose at full rank; None before they did.
    k : float
        Before they are merged, a layer's updates are given norms in proportion to ||theta_t||_F^k: FroM's weights
        (Eq. 1) of equally long updates. Their sum of norms stays; 1 leaves them as they are.
    """

    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    published: float = 1.0
    constant: float | None = None
    k: float = 1.0


def _from(k: float, constant: float | None = None) -> MethodRow:
    return MethodRow(f"from k={k:g}", "from", {"k": k, "examples_power": 0.0}, constant=constant)


NAMED = (  # all that PRIMARY and SECONDARY compare
    MethodRow("average", "average", constant=1.41),
    MethodRow("tsv", "tsv", constant=0.5),
    _from(1.0, constant=1.41),
    MethodRow("ties", "ties", {"density": 0.2}, constant=0.354),
    MethodRow("iso-cts", "iso-cts", constant=1.41),
    MethodRow("core-ties", "core-ties", {"density": 0.2}, constant=0.25),
    MethodRow("tsv k=0", "tsv", constant=0.707, k=0.0),
)
OTHERS = (
    _from(-1.0),
    _from(2.0),
    MethodRow("tsv k=2", "tsv", k=2.0),
    MethodRow("iso", "iso"),
    MethodRow("knots-ties", "knots-ties", {"density": 0.2}),
    MethodRow("knots-ties, as released", "knots-ties", {"density": 0.2, "convention": "released"}),
    MethodRow("dare-ties", "dare-ties", {"density": 0.5}),
    MethodRow("regmean", "regmean"),  # a reference: it is given Gram matrices of the tasks' data
    MethodRow("average, svc", "svc", {"inner": "average"}),
    MethodRow("ctm-ties", "ctm", {"inner": "ties", "inner_options": {"density": 0.2}}),
)
ROWS = NAMED + OTHERS


def by_name(name: str) -> MethodRow:
    """Return the row of that name."""
    return next(row for row in ROWS if row.name == name)
