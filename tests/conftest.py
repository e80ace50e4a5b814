"""One thread, fixed seeds, and hypothesis without clocks: a test that fails here fails everywhere."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "lab",
    deadline=None,
    derandomize=True,
    max_examples=10,
    report_multiple_bugs=False,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("lab")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
