"""`fedfrom methods`."""

from __future__ import annotations

import inspect


def methods() -> None:
    """List the merging methods, what each does, and its options with their defaults."""
    from dataclasses import MISSING, fields

    from fedfrom.merging.methods.base import Method
    from fedfrom.merging.methods.registry import method_class
    from fedfrom.merging.methods.registry import methods as names

    for name in names():
        kind: type[Method] = method_class(name)
        first = (inspect.getdoc(kind) or "").partition("\n")[0]
        print(f"{name}: {first}")
        options = [
            f"{field.name}={field.default}"
            for field in fields(kind)
            if field.init
            if field.default is not MISSING and field.name not in ("validate", "search")
        ]
        python_only = kind.needs or name == "greedy-soup"
        print(f"    {' '.join(options)}" + ("  [from Python alone: needs data]" if python_only else ""))
