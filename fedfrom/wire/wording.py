"""Wording of logs and reports: reasons on one line, counts with their noun."""

from __future__ import annotations

_LONGEST_REASON = 700  # characters


def one_line(reason: str) -> str:
    """Return a reason on one line, printable and of at most 700 characters, whatever a client wrote into it."""
    line = "".join(c if c.isprintable() else "?" for c in " ".join(reason.split()))
    return line if len(line) <= _LONGEST_REASON else f"{line[:400]} ... {line[-200:]}"


def num_replies(count: int, adjective: str = "") -> str:
    """Return "1 reply", "2 replies" and the like, with an adjective before the noun."""
    return f"{count} {adjective}{'reply' if count == 1 else 'replies'}"
