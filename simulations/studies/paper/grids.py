"""Table 3's rows: every method with its grid of settings, of the same size for all methods."""

from dataclasses import dataclass
from itertools import product

Setting = dict[str, float]


@dataclass(frozen=True)
class Row:
    """One row: a method of `fedfrom.methods()` and its grid of settings, the most usual setting first.

    Attributes
    ----------
    name : str
        Name of the row.
    method : str
        Name of the method in `fedfrom.merge`.
    grid : tuple[Setting, ...]
        Keywords of `fedfrom.merge`.
    also : tuple[str, ...]
        Methods that equal this one in this study, and have no row of their own.
    """

    name: str
    method: str
    grid: tuple[Setting, ...]
    also: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The tables' name of the row."""
        return " = ".join([self.name, *self.also])


def setting_text(setting: Setting) -> str:
    """Return a setting's text in the tables."""
    return ", ".join(f"{name} {value:g}" for name, value in setting.items())


def _grid(**values: tuple[float, ...]) -> tuple[Setting, ...]:
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


# The mean of three updates is a third of their sum: methods without a scale of their own are searched up to the sum.
_SCALES = (1.0, 2.0, 3.0, 0.5, 1.5, 2.5)
_COEFFICIENTS = (0.4, 0.6, 1.0, 0.3, 0.5, 0.8)
_OFF_DIAGONALS = (0.9, 0.5, 0.1, 1.0, 0.7, 0.0)
_TIES = ((0.2, 1.0), (0.5, 2.0), (0.2, 2.0), (0.5, 1.0), (0.1, 1.0), (0.1, 2.0))
_DARE_TIES = ((0.5, 1.0), (0.8, 2.0), (0.2, 1.0), (0.8, 1.0), (0.5, 2.0), (0.2, 2.0))
# TSV-M's scale is between the mean's and the sum's, Iso's is the sum's: its paper searches 1 to 3.
_LEVELS = (1.0, 0.5, 1.5, 0.3, 2.0, 3.0)
SCALED = "from, scaled"


def _pairs(values: tuple[tuple[float, float], ...]) -> tuple[Setting, ...]:
    return tuple({"density": density, "coefficient": coefficient} for density, coefficient in values)


def rows(kind: str) -> tuple[Row, ...]:
    """Return the rows for merging adapters ("lora") or full weights ("full").

    Full weights have no factors: methods that differ on adapters alone share a row there. On both kinds KnOTS with Task
    Arithmetic equals Task Arithmetic, and the uniform soup equals the average.
    """
    lora = kind == "lora"
    same = (lambda *names: ()) if lora else (lambda *names: names)
    found = [
        Row("from", "from", _grid(k=(1.0, 0.5, 0.25, 2.0, 0.75, 4.0))),
        Row(SCALED, "from", _grid(k=(1.0,), server_lr=_SCALES)),
        Row("average", "average", _grid(server_lr=_SCALES), ("soup", *same("factor-average"))),
        Row("factor-average", "factor-average", _grid(server_lr=_SCALES)),
        Row("task-arithmetic", "task-arithmetic", _grid(coefficient=_COEFFICIENTS), ("knots-ta",)),
        Row("ties", "ties", _pairs(_TIES), same("knots-ties")),
        Row("dare", "dare", _grid(density=(0.5, 0.2), coefficient=(0.4, 0.6, 1.0))),
        Row("dare-ties", "dare-ties", _pairs(_DARE_TIES), same("knots-dare-ties")),
        Row("dare-from", "dare-from", _grid(density=(0.5, 0.8, 0.2), k=(1.0, 0.5))),
        Row("regmean", "regmean", _grid(off_diagonal=_OFF_DIAGONALS), same("lorm")),
        Row("fisher", "fisher", _grid(server_lr=_SCALES)),
        Row("knots-ties", "knots-ties", _pairs(_TIES)),
        Row("knots-dare-ties", "knots-dare-ties", _pairs(_DARE_TIES)),
        Row("tsv", "tsv", _grid(coefficient=_LEVELS)),
        Row("iso", "iso", _grid(coefficient=_LEVELS)),
        Row("iso-cts", "iso-cts", _grid(coefficient=_LEVELS)),
        Row("core-ties", "core-ties", _pairs(_TIES)),
        Row("core-dare-ties", "core-dare-ties", _pairs(_DARE_TIES)),
        Row("lorm", "lorm", _grid(off_diagonal=_OFF_DIAGONALS)),
        Row("greedy-soup", "greedy-soup", _grid(server_lr=_SCALES)),
        Row("svc", "svc", _grid(floor=(1.0, 0.8, 0.6, 0.4, 0.2, 0.1))),
        Row("ctm", "ctm", _grid(beta=(0.25, 0.0, 0.75), coefficient=(1.0, 2.0))),
        Row("actmat", "actmat", _grid(rho=(1.0, 0.9, 0.7, 0.5, 0.2, 0.0))),
    ]
    shared = {name for row in found for name in row.also}
    return tuple(row for row in found if row.name not in shared)


# Table 5, Table 6 and Figure 5 of the paper.
ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KS_TABLE = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
KS_FIGURE = (0.0, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
# k of the merges of two tasks, which test whether interference predicts the accuracy lost.
KS_PAIRS = (0.0, 1.0, 8.0)
