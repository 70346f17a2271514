"""Suite "changes": what it undoes is there, every case runs both ways, and nothing stays undone."""

import pytest
import torch

from vlp_fast.benchmarks import bench_changes, registry, runner
from vlp_fast.benchmarks.registry import Options


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_case_builds_and_undoes_what_it_names(dtype, monkeypatch):
    monkeypatch.setattr(bench_changes._products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(bench_changes._products, "onednn_is_faster_for_few_rows", lambda: True)
    monkeypatch.setattr(bench_changes._attention_bf16, "_products_are_faster", lambda: True)
    options = registry.SUITES["changes"].settled(Options(size="tiny", batch=2, dtype=dtype))
    for entry in registry.cases_of("changes", options):
        case = entry.build()
        assert len(case.calls) == 2
        assert "vlp_fast" in case.calls
        assert case.facts["predicted"] >= 1.0
        assert case.wrong() == {}
        assert ("random numbers" in case.note) == ("dropout" in entry.name), case.note  # each has its own reason
        for call in case.calls.values():
            call()
    assert torch.nn.Dropout.forward is not bench_changes.Dropout.forward


def test_a_change_that_this_processor_does_not_have_is_absent(monkeypatch):
    monkeypatch.setattr(bench_changes._attention_bf16, "_products_are_faster", lambda: False)
    options = Options(size="tiny", batch=2, dtype="bf16", only=("attention as products, BLIP",), seconds=0.05)
    report = runner.run_suite("changes", options)
    assert report["rows"] == []
    assert "fused one in any case" in report["absent"][0]["reason"]
