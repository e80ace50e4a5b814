"""Flat vectors between torch and the array API: numpy on the host, cupy on a device.

Everything below `train.outer` is written against what numpy and cupy share; no other module of it knows
which of the two it holds.

Shape legend: N values of a vector.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Array = Any  # numpy.ndarray or cupy.ndarray


def namespace(x: Array) -> Any:
    """The module whose functions work on `x`: numpy or cupy."""
    return sys.modules[type(x).__module__.split(".")[0]]


def to_host(x: Array) -> Array:
    """The array in host memory; a numpy array is given back as it is."""
    return x.get() if hasattr(x, "get") else x


def from_tensor(x: Tensor, offload: bool) -> Array:
    """A tensor as an array: on the host when `offload` or when it is there anyway, else on its device."""
    x = x.detach()
    if x.device.type == "cpu" or offload:
        return x.cpu().numpy()
    import cupy

    return cupy.from_dlpack(x)


def to_tensor(x: Array) -> Tensor:
    """An array as a tensor that shares its memory."""
    import torch

    return torch.from_numpy(x) if isinstance(x, _numpy()) else torch.from_dlpack(x)


def _numpy() -> type:
    import numpy

    return numpy.ndarray
