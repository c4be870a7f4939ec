"""Shared test setup: hypothesis profiles, poisoned memory, one thread per worker."""

import os

import hypothesis
import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

hypothesis.settings.register_profile(
    "ci",
    max_examples=15,
    derandomize=True,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
)
hypothesis.settings.register_profile(
    "deep", parent=hypothesis.settings.get_profile("ci"), max_examples=400, derandomize=False
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(1)  # workers share the cores; and small tensors are faster so


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """torch.empty gives NaN (integers: their maximum), so an element that a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _nothing_prepared():
    """Calls are prepared within a test, never across: tests put other tables in place."""
    from unsloth_core import prepared  # not sooner: it imports Triton

    prepared.forget()
