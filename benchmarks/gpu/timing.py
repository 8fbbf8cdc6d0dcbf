"""Times, peak memory and host synchronisations on a device; and the limits that keep a run short."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

WAITS = "called a synchronizing CUDA operation"
"""What torch warns of, with `torch.cuda.set_sync_debug_mode("warn")`, where the host waits for the device."""
MIB = 2**20


@dataclass(frozen=True)
class Device:
    """Where merges run: "cuda", or "cpu" in a rehearsal.

    Attributes
    ----------
    name : str
        "cuda" or "cpu".
    """

    name: str

    @property
    def is_gpu(self) -> bool:
        """Whether this is a CUDA device."""
        return self.name == "cuda"

    def describe(self) -> str:
        """Return the device's name in one sentence, for the tables."""
        if not self.is_gpu:
            return "Device: the CPU. This is a rehearsal: it says nothing about a GPU."
        found = torch.cuda.get_device_properties(0)
        size = f"{found.total_memory / 2**30:.0f} GiB"
        return (
            f"Device: {found.name}, {size}, compute capability {found.major}.{found.minor}, CUDA {torch.version.cuda}."
        )

    def generator(self, seed: int) -> torch.Generator:
        """Return a generator on the device."""
        return torch.Generator(self.name).manual_seed(seed)

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], object]) -> float:
        """Return the seconds of one run, until the device has finished."""
        self.synchronize()
        start = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - start

    def median(self, run: Callable[[], object], most: int, within: float) -> float:
        """Return the median seconds of some runs: at least one, at most `most`, no new one after `within` seconds."""
        found = [self.seconds(run)]
        while len(found) < most and sum(found) < within:
            found.append(self.seconds(run))
        return statistics.median(found)

    def peak(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        """Return the result of a run and its peak MiB above what was allocated before; None on the CPU."""
        if not self.is_gpu:
            return run(), None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        self.synchronize()
        return result, (torch.cuda.max_memory_allocated() - before) / MIB

    def waits(self, run: Callable[[], object]) -> int | None:
        """Return how often the host waited for the device in a run, as torch reports it; None on the CPU."""
        return count_waits(run, torch.cuda.set_sync_debug_mode) if self.is_gpu else None

    def release(self) -> None:
        """Give the memory that torch keeps back to the device."""
        if self.is_gpu:
            torch.cuda.empty_cache()


def count_waits(run: Callable[[], object], mode: Callable[[str], object]) -> int:
    """Return how many warnings of synchronising operations a run gives.

    Parameters
    ----------
    run : Callable[[], object]
        What is looked at.
    mode : Callable[[str], object]
        `torch.cuda.set_sync_debug_mode`: "warn" has torch warn of each, "default" of none.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mode("warn")
        try:
            run()
        finally:
            mode("default")
    return sum(WAITS in str(warning.message) for warning in caught)


@dataclass
class Limits:
    """How long things may take.

    Attributes
    ----------
    total : float
        Seconds of a part; what has not begun by then is left out.
    longest : float
        Seconds that one merge of one module or tensor may be expected to take; longer ones are scaled from smaller.
    repeats : int
        Most runs that a median is of.
    within : float
        Seconds after which a median's runs are not repeated.
    """

    total: float
    longest: float
    repeats: int
    within: float
    _start: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Start the part's clock."""
        self._start = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds of the part that are left."""
        return self.total - (time.monotonic() - self._start)


@dataclass(frozen=True)
class Counted:
    """Seconds of many pieces of work, of which one of each kind was timed.

    Attributes
    ----------
    seconds : float
        The sum over the kinds: seconds times the number of pieces.
    scaled : int
        Of how many kinds the seconds come from a smaller kind, by their work.
    results : dict[Any, Any]
        What came of each kind that was run.
    """

    seconds: float
    scaled: int
    results: dict[Any, Any]


def count(
    kinds: Sequence[tuple[Any, int, float]],
    run_of: Callable[[Any], Callable[[], Any]],
    seconds_of: Callable[[Callable[[], Any]], float],
    longest: float,
) -> Counted:
    """Time one piece of each kind, smallest first, and count it as often as it occurs.

    Parameters
    ----------
    kinds : Sequence[tuple[Any, int, float]]
        Kind, number of pieces, and work in any unit.
    run_of : Callable[[Any], Callable[[], Any]]
        Returns what does the piece of a kind.
    seconds_of : Callable[[Callable[[], Any]], float]
        Times it.
    longest : float
        A kind that is expected to take more seconds is not run: its seconds are those of the last one, times the work.
    """
    total, scaled, results = 0.0, 0, {}
    last: tuple[float, float] | None = None  # seconds and work
    for kind, number, work in sorted(kinds, key=_work):
        expected = 0.0 if last is None else last[0] * work / last[1]
        if expected > longest:
            seconds, scaled = expected, scaled + 1
        else:
            run = run_of(kind)

            def keep(kind: Any = kind, run: Callable[[], Any] = run) -> None:
                results[kind] = run()

            seconds = seconds_of(keep)
            last = seconds, work
        total += number * seconds
    return Counted(total, scaled, results)


def _work(kind: tuple[Any, int, float]) -> float:
    return kind[2]
