"""The problems that benchmarks/gpu_check.py times: floors by hand, and that rivals are given the right rows."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")
SHAPES = (
    "ViT-B/16 224 self, 256 x 197",
    "BLIP text self, ragged",
    "BLIP cross, ragged x 197",
    "BLIP cross, 4 passes, shared keys x 197",
    "CoCa pool, 256 shared queries x 256, head_dim 96",
    "CoCa text causal, 256 x 77",
    "BEiT-3 joint, 256 x (197 + 64)",
)
CAPTIONS = ("BLIP text self, ragged", "BLIP cross, 4 passes, shared keys x 197")


@pytest.fixture(scope="module")
def cases(benchmark_module):
    return benchmark_module("gpu_timing_cases")


@pytest.fixture(scope="module")
def rivals(benchmark_module):
    return benchmark_module("gpu_rivals")


@pytest.fixture(scope="module")
def providers(benchmark_module):
    return benchmark_module("gpu_providers")


@pytest.fixture
def make(benchmark_module):
    def maker(tiny=True, dtype=torch.float32):
        return benchmark_module("gpu_cases").Maker("cpu", dtype, tiny, torch.Generator().manual_seed(0))

    return maker


def test_floor_of_attention_is_that_of_the_readme(cases, make):
    problem = cases.Attention("self", 12, 64, 2, image=197)(make(tiny=False, dtype=torch.bfloat16))
    # BLIP-base, 256 images of 197 tokens, bf16: 30.5 GFLOP and 312 MB
    assert problem.forward.flops * 128 == pytest.approx(30.5e9, rel=0.002)
    assert problem.forward.bytes * 128 == pytest.approx(312e6, rel=0.002)
    assert problem.backward.flops == 2.5 * problem.forward.flops
    assert problem.backward.bytes == pytest.approx(2 * problem.forward.bytes)


def test_floor_of_a_vocabulary_loss_is_that_of_the_readme(benchmark_module, make):
    losses = benchmark_module("gpu_timing_cases_losses")
    problem = losses.Vocabulary(33, 305, 768)(make(tiny=False))
    assert problem.forward is None
    assert problem.backward.flops == 6 * 33 * 305 * 768
    assert problem.backward.bytes == 4 * (2 * 33 * 768 + 2 * 305 * 768) + 12 * 33 * 305
    assert list(problem.directions()) == ["forward+backward"]


def varlen(sequences):
    """A variable-length call in plain torch."""
    (cu_q, _), (cu_k, _) = sequences.offsets("q"), sequences.offsets("k")

    def attend(q, k, v):
        parts = []
        for a, b, c, d in zip(cu_q[:-1], cu_q[1:], cu_k[:-1], cu_k[1:], strict=True):
            one = (t.transpose(0, 1)[None] for t in (q[a:b], k[c:d], v[c:d]))
            parts.append(F.scaled_dot_product_attention(*one, is_causal=sequences.causal)[0].transpose(0, 1))
        return torch.cat(parts)

    return attend


def wrong(providers, problem, provider):
    """Why a provider is wrong with its gradients, or None."""
    checker = providers.Checker(problem)
    leaves = [x.detach().clone().requires_grad_() for x in provider.own(problem.inputs)]
    out = provider.call(*leaves)
    canonical = out if provider.out_layout is None else provider.out_layout.back(out)
    dout = checker.dout(canonical)
    dout = dout if provider.out_layout is None else provider.out_layout.into(dout)
    return checker.wrong(provider, [out.detach(), *torch.autograd.grad(out, leaves, dout)])


@pytest.mark.parametrize("name", SHAPES)
def test_rivals_of_attention_get_the_right_rows(cases, rivals, providers, make, name):
    shape, maker = cases.ATTENTION[name], make()
    problem, (_, sequences) = shape(maker), shape.layout(3, maker)
    made = [rivals._sdpa("padded", sequences, "flash"), rivals._packed("packed", sequences, varlen)]
    if sequences.index is not None:
        made += [rivals._sdpa_gathered("keys", sequences, "flash"), rivals._gathered("rows", sequences, varlen)]
    assert {p.name: wrong(providers, problem, p) for p in made} == {p.name: None for p in made}
    shifted = rivals._packed("packed", sequences, lambda s: lambda q, k, v: varlen(s)(q, k, v.roll(1, 0)))
    assert "is off by" in wrong(providers, problem, shifted)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", CAPTIONS)
def test_flex_attention_gets_the_right_documents(cases, rivals, providers, make, name, monkeypatch):
    pytest.importorskip("torch.nn.attention.flex_attention")
    monkeypatch.setattr(rivals, "_needs_cuda", lambda s: None)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    shape, maker = cases.ATTENTION[name], make()
    problem, (_, sequences) = shape(maker), shape.layout(3, maker)
    provider = rivals._flex("flex", sequences)
    with torch.no_grad():  # uncompiled on the CPU it has no backward
        out = provider.call(*provider.own(problem.inputs))
    assert providers.Checker(problem).wrong(provider, [out]) is None


def test_rivals_that_are_not_here_say_so(cases, rivals, providers, make):
    _, sequences = cases.ATTENTION["ViT-B/16 224 self, 256 x 197"].layout(3, make())
    makers = dict(rivals.attention_rivals(sequences))
    assert set(makers) == {
        *("sdpa flash", "sdpa cudnn", "sdpa efficient"),
        *("varlen_attn", "flash_attn", "xformers", "flex_attention"),
    }
    with pytest.raises(providers.Absent, match="on a GPU only"):
        makers["varlen_attn"]()


def test_a_closed_sample_has_every_reader_of_its_keys(cases, make):
    plan, sequences = cases.ATTENTION["BLIP cross, 4 passes, shared keys x 197"].layout(5, make())
    queries, keys = cases.closed_sample(plan, 2)
    assert keys == [0, 4]
    assert queries == [i for i, j in enumerate(sequences.index.tolist()) if j in keys]
    assert cases.sub_plan(plan, queries, keys).num_edges == len(queries)


def test_rivals_of_multiway_and_decoding_are_right(cases, providers, make):
    for build in (cases.LINEARS["BEiT-3 base, fc1 with GELU"], cases._decode):
        problem = build(make())
        checker = providers.Checker(problem)
        for name, maker in problem.providers.items():
            provider = maker()
            if name != "triton" and not provider.is_bound:
                with torch.no_grad():
                    assert checker.wrong(provider, [provider.call(*provider.own(problem.inputs))]) is None, name


def test_captions_have_the_mean_of_web_captions(cases):
    lengths = cases.captions(256, False)
    assert 13 < sum(lengths) / 256 < 15
    assert lengths != sorted(lengths)
