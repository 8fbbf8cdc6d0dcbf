"""A pretended GPU: tensors that say they are on CUDA, are reckoned with on the CPU, and refuse what CUDA refuses.

It finds tensors of two devices in one operation and NumPy on a device's tensor, and counts where the host waits. It
says nothing about speed, nor about CUDA's rounding.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = torch.device("cuda", 0)
# what may be given tensors of two devices
_ACROSS = {"to", "copy_", "__getitem__", "__get__"}
# what the host has to wait for
_WAITS = {"__float__", "__int__", "__bool__", "__index__", "item", "tolist", "cpu", "nonzero", "equal", "bincount"}

_HOME = ("to", "cpu")


class OnGpu(Tensor):
    """A tensor on the pretended GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, None)


class Gpu(TorchFunctionMode):
    """Makes tensors on the pretended GPU where CUDA is asked for, while it is entered.

    Attributes
    ----------
    waits : Counter[str]
        How often the host waited for the device, by the operation's name.
    warns : bool
        Warn of each, as torch does with `torch.cuda.set_sync_debug_mode("warn")`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.warns = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self)

    def wait(self, name: str) -> None:
        """Count an operation that the host waited for."""
        self.waits[name] += 1
        if self.warns:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=2)


def on_cpu(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor of the pretended GPU, for a test to look at."""
    with torch._C.DisableTorchFunction():
        return tensor.as_subclass(Tensor)


def _run(func: Any, args: Any, kwargs: dict[str, Any], gpu: Gpu | None) -> Any:
    name = getattr(func, "__name__", "")
    given = list(_tensors((args, tuple(kwargs.values()))))
    there = [each for each in given if isinstance(each, OnGpu)]
    if name == "__get__" and there and getattr(func, "__self__", None) in (Tensor.device, Tensor.is_cuda):
        return DEVICE if func.__self__ is Tensor.device else True
    if name in ("numpy", "__array__") and there:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if there and name not in _ACROSS and any(not isinstance(each, OnGpu) and each.ndim for each in given):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, found cuda:0 and cpu")
    asked = _asked(name, args, kwargs)
    across = name == "copy_" and len(there) == 1
    if there and gpu is not None and (name in _WAITS or across or _is_masked(name, args) or (name, asked) == _HOME):
        gpu.wait(name)
    with torch._C.DisableTorchFunction():
        found = func(
            *_without_device(args),
            **{k: _plain_device(v) if k == "device" and v is not None else v for k, v in kwargs.items()},
        )
    on_gpu = asked == "cuda" if asked is not None else name != "cpu" and bool(there)
    if name in ("copy_", "__getitem__"):
        on_gpu = isinstance(args[0], OnGpu)
    return _placed(found, given, on_gpu)


def _asked(name: str, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Return the type of the device that is asked for, None where none is."""
    device = kwargs.get("device")
    if name == "to" and device is None:
        device = next((each for each in args[1:] if isinstance(each, torch.device | str)), None)
    return "cpu" if name == "cpu" else None if device is None else torch.device(device).type


def _is_masked(name: str, args: Any) -> bool:
    """Whether the shape of what comes depends on a mask's values."""
    return name == "__getitem__" and any(each.dtype == torch.bool for each in _tensors(args[1:]))


def _plain_device(value: Any) -> Any:
    return "cpu" if isinstance(value, torch.device) or str(value).startswith("cuda") else value


def _without_device(args: Any) -> tuple[Any, ...]:
    return tuple(_plain_device(each) if isinstance(each, torch.device | str) else each for each in args)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from _tensors(each)


def _placed(found: Any, given: list[Tensor], on_gpu: bool) -> Any:
    if isinstance(found, Tensor):
        if any(found is each for each in given):
            if on_gpu == isinstance(found, OnGpu):
                return found
            found = found.clone()
        with torch._C.DisableTorchFunction():
            return found.as_subclass(OnGpu if on_gpu else Tensor)
    if isinstance(found, tuple | list) and not isinstance(found, torch.Size):
        return type(found)(_placed(each, given, on_gpu) for each in found)
    return found
