"""Make Triton kernels written for GPUs run on a CPU through Triton's interpreter.

Importing this, before anything else imports triton, installs it. `TRITON_INTERPRET=1` alone is not enough:
the peers tune, count and select devices, and call methods of Triton's integers on loop indices, which here
are Python's. Only fp32 (or fp64, fp16) makes sense: `tl.dot` of the interpreter multiplies bit patterns of
bf16.
"""

from __future__ import annotations

import builtins
import contextlib
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from triton.runtime import autotuner

KERNEL_PACKAGES = ("fla.", "mamba_ssm.")


class Index(int):
    """A loop index that can be asked for a dtype, as Triton's can."""

    def to(self, *_: Any, **__: Any) -> Index:
        return self


def kernel_range(*bounds: Any) -> Iterator[Index]:
    return (Index(i) for i in builtins.range(*(int(b) for b in bounds)))


def _first_config_only() -> None:
    """No driver means no benchmark to tune by: keep the first configuration. fla subclasses the class."""
    tuned = autotuner.Autotuner.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        tuned(self, *args, **kwargs)
        self.configs = self.configs[:1]

    autotuner.Autotuner.__init__ = init


def _install() -> None:
    _first_config_only()
    for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules.setdefault(name, types.ModuleType(name))
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment, misc]
    stub = types.SimpleNamespace(multi_processor_count=1, name="interpreter", major=8, minor=0)
    torch.cuda.get_device_properties = lambda *_: stub  # type: ignore[assignment, misc]


def patch_kernels() -> None:
    """To be called after importing peers, and again after any import that brings in more kernels."""
    for name, module in list(sys.modules.items()):
        if name.startswith(KERNEL_PACKAGES):
            module.__dict__["range"] = kernel_range


_install()
