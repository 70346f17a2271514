"""How every test runs: our kernels in the Triton interpreter unless VLP_FAST_TEST_GPU=1, and no compiled code of an earlier run.

Both are read when triton and torch are imported, so they are set before anything else here is.
"""

import os
import tempfile

ON_GPU = os.environ.get("VLP_FAST_TEST_GPU") == "1"
WORKER = "PYTEST_XDIST_WORKER" in os.environ

if ON_GPU:
    os.environ.pop("TRITON_INTERPRET", None)
else:
    os.environ["TRITON_INTERPRET"] = "1"
if not WORKER:  # workers inherit it; inductor's cache knows nothing of a custom op's schema, so an old entry could run old code
    inductor_cache = tempfile.TemporaryDirectory(prefix="vlp-fast-inductor-", ignore_cleanup_errors=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = inductor_cache.name

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_flush_denormal(True)
if WORKER:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def device() -> str:
    """Where operations run: "cuda" with VLP_FAST_TEST_GPU=1, else "cpu" with kernels in the interpreter."""
    return "cuda" if ON_GPU else "cpu"


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError("VLP_FAST_TEST_GPU=1 asks for tests on a GPU, and torch finds no CUDA device.")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if ON_GPU:
        return
    reason = "needs a CUDA device: set VLP_FAST_TEST_GPU=1 on a machine that has one"
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason=reason))
