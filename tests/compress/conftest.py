"""Tiny random decoders of every family, and padded batches to try methods on."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import pytest
import torch

from tests.compress.tiny import FAMILIES, tiny_decoder


@pytest.fixture(params=FAMILIES)
def model(request):
    """A fresh tiny decoder of each family in turn."""
    return tiny_decoder(request.param)


@pytest.fixture
def llama():
    return tiny_decoder("llama")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
