"""The known name that a wrong one was probably meant for, as errors put it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches

# how alike two names are, 0 to 1, that one is taken for the other: two letters swapped, one forgotten
_ALIKE = 0.65


def did_you_mean(found: str | Collection[str], expected: Iterable[str], others: Mapping[str, str] | None = None) -> str:
    """Return what an error ends in where names are close to known ones: ": did you mean 'ties'?".

    Parameters
    ----------
    found : str | Collection[str]
        The wrong name, or several.
    expected : Iterable[str]
        The known names. Case, leading dashes, and whether words are joined by - or _ make no difference.
    others : Mapping[str, str] | None (default: None)
        Other words for known names, word -> known name: "bf16" -> "bfloat16".

    Returns
    -------
    str
        Each wrong name's closest known one, once; "" where none is close.
    """
    known = {_plain(name): name for name in expected}
    known |= {name: meant for name, meant in (others or {}).items() if name not in known}
    closest = [
        get_close_matches(_plain(name), known, 1, _ALIKE) for name in ([found] if isinstance(found, str) else found)
    ]
    names = dict.fromkeys(known[match] for matches in closest for match in matches)
    return f": did you mean {', '.join(map(repr, names))}?" if names else ""


def _plain(name: str) -> str:
    return name.lstrip("-").replace("_", "-").lower()
