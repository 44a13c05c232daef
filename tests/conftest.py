"""Every test starts from the same seeds, on one thread, and leaves no trace in torch's global settings."""

from __future__ import annotations

import gc
import random

import numpy as np
import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)


COMPARES = {"cli", "recipes", "training"}


@pytest.fixture(autouse=True, scope="module")
def _frozen(request: pytest.FixtureRequest) -> None:
    """What was made before stays: a full garbage collection of it takes 0.2 s, and a comparison asks for one before each row."""
    if COMPARES & set(request.path.parts):
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Global generators in a known state that no test should rely on."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


# Where only our own code and torch's stable parts run, a warning is an error.
STRICT = {"contract", "lattice"}
# Whole files that run under shape checks (the Makefile lists them too): pure functions of tensors, where an annotation says most.
SHAPES = ("test_ops_", "test_state.py", "test_transformer.py", "test_corrupt.py", "test_logits.py")


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if STRICT & set(item.path.parts):
            item.add_marker(pytest.mark.filterwarnings("error"))
        if item.path.name.startswith(SHAPES):
            item.add_marker(pytest.mark.shapes)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
