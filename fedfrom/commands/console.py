"""The console that tables are printed on."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # --help need not wait for it
    from rich.console import Console

_WIDE = 400  # characters of a line where nothing bounds it


def console(wide: bool = False) -> Console:
    """Return the terminal's console; a pipe has no width to fit into, nor has a terminal where `wide` is asked for."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() and not wide else _WIDE)
