"""`fedfrom methods`."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections import Counter


def methods() -> None:
    """List the merging methods, what each does, and its options with their defaults; first what most have in common."""
    from fedfrom.merging.methods.registry import method_class
    from fedfrom.merging.methods.registry import methods as names

    options = {name: _options(name) for name in names()}
    counts = Counter(item for own in options.values() for item in own.items())
    common = {name: value for (name, value), count in counts.items() if count > len(options) / 2}
    width = min(shutil.get_terminal_size((100, 0)).columns, 100)
    _say("All methods have these options, where nothing else is said:", width)
    _say(_shown(common), width, "  ")
    for name, own in options.items():
        kind = method_class(name)
        print(f"\n{name}")
        _say((inspect.getdoc(kind) or "").partition("\n")[0], width, "  ")
        differing = _shown({option: value for option, value in own.items() if common.get(option) != value})
        lacking = ", ".join(option for option in common if option not in own)
        for text in (differing, f"without {lacking}" if lacking else ""):
            _say(text, width, "  ")
        if kind.needs or name == "greedy-soup":
            _say("from Python alone: it needs data", width, "  ")


def _options(name: str) -> dict[str, str]:
    """Return a method's options and their defaults as text; those that take Python's objects are left out."""
    from dataclasses import MISSING, fields

    from fedfrom.merging.methods.registry import method_class

    found = [each for each in fields(method_class(name)) if each.init and each.default is not MISSING]
    return {each.name: str(each.default) for each in found if each.name not in ("validate", "search", "inner_options")}


def _shown(options: dict[str, str]) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def _say(text: str, width: int, indent: str = "") -> None:
    """Print a text in lines of at most this width, none where it is empty."""
    for line in textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False):
        print(line)
