"""Settings that every test shares."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest

# Tests never wait for a network. Before transformers is imported anywhere, since it reads these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Plans need figures of this machine, not good ones.
os.environ.setdefault("FUYOU_QUICK_MEASUREMENT", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, with the reason."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch sees none on this machine"))
        if item.get_closest_marker("gds") is not None and not _has_kvikio():
            item.add_marker(pytest.mark.skip(reason="needs kvikio (extras cuda12, cuda13) and a CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _has_kvikio() -> bool:
    return _has_cuda() and importlib.util.find_spec("kvikio") is not None


@pytest.fixture(scope="module", autouse=True)
def _measurements_of_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test measures of this machine ends up neither in the user's cache nor in the plans of other modules' tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
