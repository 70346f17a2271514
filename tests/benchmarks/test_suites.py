"""The suites "kernels" and "embed" in small: every case is right and complete, and what is wrong or absent is said and not timed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlp_fast.benchmarks import bench_contrastive, bench_embed, runner
from vlp_fast.benchmarks.bench_kernels import PROVIDERS
from vlp_fast.benchmarks.registry import OURS, NotHere, Options, cases_of
from vlp_fast.benchmarks.runner import run_suite
from vlp_fast.benchmarks.side_by_side import BOTH, FORWARD, Operation
from vlp_fast.ops import _backends

ROOT = Path(__file__).parents[2]
OPTIONS = Options(size="tiny", batch=2, quick=True, seconds=0.01)
HEAVY = ("ViT-L/16",)  # float64 takes seconds
KERNELS = [entry for entry in cases_of("kernels", OPTIONS) if not any(part in entry.name for part in HEAVY)]
EMBED = list(cases_of("embed", OPTIONS))


@pytest.fixture(autouse=True)
def compiled_only(monkeypatch):
    """Without the Triton interpreter, for which these shapes are large; and without measuring the machine's ceilings."""
    monkeypatch.setattr(_backends, "INTERPRET", False)
    monkeypatch.setattr(runner, "ceilings", lambda device, dtype: {"gflops_per_second": 1.0, "copy_gb_per_second": 1.0})


def names(entries):
    return [entry.name for entry in entries]


# ------------------------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("entry", KERNELS, ids=names(KERNELS))
def test_kernels_case_is_right_and_complete(entry):
    case = entry.build()
    assert case.wrong() == {}
    assert not case.calls.keys() & case.absent.keys()
    assert case.calls.keys() | case.absent.keys() == set(PROVIDERS[entry.name.partition(":")[0]])
    assert all(case.absent.values())
    assert any(name.startswith(OURS) for name in case.calls)
    assert case.least_bytes > 0
    for call in case.calls.values():
        assert runner.count_flops(call) >= 0


def test_kernels_names_say_operation_shape_and_direction():
    assert "attention: ViT-B/16 224 self, fwd+bwd" in names(KERNELS)
    assert len(set(names(KERNELS))) == len(KERNELS)
    assert {name.partition(":")[0] for name in names(KERNELS)} == PROVIDERS.keys()


def test_kernels_absent_providers_have_a_reason_on_the_cpu():
    (entry,) = (e for e in KERNELS if e.name == "attention: BLIP text self, fwd")
    absent = entry.build().absent
    assert absent["varlen_attn"] == absent["flash_attn"] == absent["xformers"] == "needs CUDA"
    assert "CUDA" in absent["vlp_fast triton"]


def test_kernels_products_are_of_fp32_on_the_cpu():
    entry = next(cases_of("kernels", Options(size="tiny", batch=2, dtype="bf16", only=("products",))))
    with pytest.raises(NotHere, match="fp32 on the CPU"):
        entry.build()


def test_kernels_wrong_provider_is_named_and_not_timed(monkeypatch):
    right = bench_contrastive.contrastive_loss
    monkeypatch.setattr(bench_contrastive, "contrastive_loss", lambda *args: 1.001 * right(*args))
    report = run_suite("kernels", Options(size="tiny", batch=2, seconds=0.01, only=("CLIP",)))
    assert {row["provider"] for row in report["rows"]} == {"plain"}
    assert [row["provider"] for row in report["wrong"]] == ["vlp_fast", "vlp_fast"]
    assert all("of the largest value" in row["reason"] for row in report["wrong"])
    assert report["notes"]


def doubled(**others):
    x = torch.randn(6, 4, requires_grad=True)
    return Operation([x], {"plain": lambda x: 2 * x, **others})


@pytest.mark.parametrize(
    ("provider", "directions", "words"),
    [
        (lambda x: 2.001 * x, (FORWARD, BOTH), "off by 0.0005"),
        (lambda x: (2 * x).detach() + 3 * (x - x.detach()), (BOTH,), "off by 0.5"),
        (lambda x: 2 * x[:3], (FORWARD, BOTH), r"shape is \[3, 4\]"),
        (lambda x: x @ x, (FORWARD, BOTH), "cannot be multiplied"),
        (lambda x: 2 * x + torch.nan, (FORWARD, BOTH), "off by nan"),
    ],
)
def test_operation_says_what_is_wrong(provider, directions, words):
    for direction in (FORWARD, BOTH):
        wrong = doubled(other=provider).case(direction).wrong()
        assert wrong.keys() == ({"other"} if direction in directions else set())
        if wrong:
            with pytest.raises(AssertionError, match=words):
                raise AssertionError(wrong["other"])


def test_operation_lists_what_is_optional_and_not_there():
    def missing():
        import no_such_library

        return no_such_library

    def refused():
        raise NotHere("needs CUDA")

    operation = doubled()
    operation.optional = {"a": missing, "b": refused, "c": lambda: lambda x: x @ x, "d": lambda: lambda x: x + x}
    case = operation.case(FORWARD)
    assert case.absent.pop("c").startswith("mat1 and mat2")
    assert case.absent == {"a": "no_such_library is not installed", "b": "needs CUDA"}
    assert list(case.calls) == ["plain", "d"]


def test_operation_counts_the_least_bytes():
    size = 6 * 4 * 4
    assert doubled().case(FORWARD).least_bytes == 2 * size
    assert doubled().case(BOTH).least_bytes == 5 * size  # x twice, out, dout, dx


def test_kernels_run_under_pytest_benchmark(tmp_path):
    pytest.importorskip("pytest_benchmark")
    path = tmp_path / "kernels.json"
    chosen = ["-k", "decode_attention and caches", f"--benchmark-json={path}", "--benchmark-max-time=0.01", "-q"]
    command = [str(Path(sys.executable).with_name("pytest")), "benchmarks", *chosen]
    # a worker of pytest-xdist must not look like one to the pytest it starts
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()
    rows = json.loads(path.read_text())["benchmarks"]
    assert {"sdpa, repeated", "vlp_fast torch"} <= {row["extra_info"]["provider"] for row in rows}


# -------------------------------------------------------------------------------------------------------------------- embed


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", names(EMBED))
def test_embed_case_is_right(name, dtype):
    entry = next(e for e in cases_of("embed", Options(size="tiny", batch=2, dtype=dtype, quick=True)) if e.name == name)
    case = entry.build()
    assert case.wrong() == {}
    assert list(case.calls)[-2:] == [OURS, f"{OURS}, packed weights"]
    assert (case.baseline in case.calls) != (case.baseline in case.absent)
    assert case.unit == f"{name.partition(',')[0].split()[-1]}s"
    assert case.work == int(name.split()[-1])
    flops = {provider: runner.count_flops(call) for provider, call in case.calls.items()}
    assert 0 < flops[OURS] == flops[f"{OURS}, packed weights"] <= flops.get(case.baseline, flops[OURS])


def test_embed_has_both_towers_at_several_batches():
    assert {"BLIP image, batch 1", "CoCa text, batch 2", "BEiT-3 image, batch 2", "CoCa-pytorch text, batch 1"} <= set(
        names(EMBED)
    )
    longer = names(cases_of("embed", Options(size="tiny")))
    assert {"BLIP image, batch 8", "BLIP image, batch 32"} <= set(longer)


@pytest.fixture
def blip_text(monkeypatch):
    """Changes what the case "BLIP text" is of, and runs it."""

    def run(**changes):
        monkeypatch.setitem(bench_embed.MODELS, "BLIP", bench_embed.MODELS["BLIP"]._replace(**changes))
        return run_suite("embed", Options(size="tiny", batch=2, quick=True, seconds=0.01, only=("BLIP text, batch 2",)))

    return run


def no_peer(size):
    raise ImportError("No module named 'transformers'")


def test_embed_times_ours_where_the_peer_is_absent(blip_text):
    report = blip_text(theirs=no_peer)
    assert [(row["provider"], row["speedup"]) for row in report["rows"]] == [(OURS, None), (f"{OURS}, packed weights", None)]
    assert all(row["per_second"] > 0 and row["unit"] == "texts" for row in report["rows"])
    (absent,) = report["absent"]
    assert absent["provider"] == "transformers"
    assert "not installed" in absent["reason"]
    assert not report["wrong"]


def test_embed_wrong_rows_are_named_and_not_timed(blip_text):
    pytest.importorskip("transformers", reason="transformers is not installed", exc_type=ImportError)
    own, theirs = bench_embed.MODELS["BLIP"].text
    report = blip_text(text=(lambda model, captions: 1.001 * own(model, captions), theirs))
    assert {row["provider"] for row in report["wrong"]} == {OURS, f"{OURS}, packed weights"}
    assert {row["provider"] for row in report["rows"]} == {"transformers"}


@pytest.mark.parametrize("provider", [OURS, f"{OURS}, packed weights", "transformers"])
def test_embed_release_leaves_the_provider_that_is_named(provider):
    case = EMBED[0].build()
    if provider in case.absent:
        pytest.skip(case.absent[provider])
    call = case.calls[provider]
    case.release(provider)
    assert call().isfinite().all()
    others = [other for other in case.calls if other.startswith(OURS) != provider.startswith(OURS)]
    for other in others:
        with pytest.raises(KeyError):
            case.calls[other]()
