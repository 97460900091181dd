"""Seeds, GPU selection, and memory that starts as NaN so that an output nobody wrote cannot pass for zeros."""

import os
import warnings

import pytest
import torch

# A data set that no test of the process has read before draws a bar, into the one line that a test expects.
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"

# Two cores are shared by the test workers: more threads than cores only makes them wait for each other.
torch.set_num_threads(int(os.environ.get("FOX_TEST_THREADS", "1")))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        # The first product on autograd's thread warns that there is no CUDA context there yet: get it over with.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ones(1, 1, device="cuda", requires_grad=True).mm(torch.ones(1, 1, device="cuda")).sum().backward()
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _guarded_memory():
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    from guarded_memory import guarded_memory

    with guarded_memory():
        yield


@pytest.fixture
def without_cards(monkeypatch):
    """Training ends without its model card, whose figure takes longer than a tiny run."""
    from fox_training import train

    monkeypatch.setattr(train, "write_card", lambda out: None)


@pytest.fixture
def poisoned_memory():
    """Every uninitialised floating tensor is full of NaN, every integer one of its largest value."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill
