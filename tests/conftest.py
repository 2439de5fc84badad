"""What all tests share: no network, a cache of their own, and no GPU tests without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Small tensors gain nothing from threads, and threads that spin beside other processes lose a lot. Before torch.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is fetched, whatever a test does
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test has an empty cache, and never touches the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("IMPASTO_CACHE", str(folder))
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
