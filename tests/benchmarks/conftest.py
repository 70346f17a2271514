"""The files of benchmarks/ as they are installed: modules of vlp_fast.benchmarks."""

import importlib

import pytest


@pytest.fixture(scope="session")
def benchmark_module():
    """Imports a file of benchmarks/ by its name."""
    return lambda name: importlib.import_module(f"vlp_fast.benchmarks.{name}")
