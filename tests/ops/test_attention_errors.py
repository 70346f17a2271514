"""The sentences attention says: which argument, which rule, what was received; and what each backend can and cannot run."""

import re
import sys
import types

import pytest
import torch

from vlp_fast import AttentionPlan
from vlp_fast.ops import (
    BACKENDS,
    _attention_libraries,
    _backends,
    attention,
    backend_status,
    choose_backend,
    default_backend,
)


def zeros(*shape, **options):
    return torch.zeros(*shape, **options)


PLAN = AttentionPlan.cross_attention([3, 2], [4, 1])
Q, K = zeros(5, 4, 16), zeros(5, 2, 16)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Q[0], K, K), "q must be packed as [rows, heads, head_dim]; received shape [4, 16]."),
        ((Q, K[None], K), "k must be packed as [rows, heads, head_dim]; received shape [1, 5, 2, 16]."),
        ((Q, K, K.half()), "q, k and v must share one device and dtype; q is torch.float32 on cpu, v is torch.float16 on cpu."),
        (
            (Q, K.to("meta"), K),
            "q, k and v must share one device and dtype; q is torch.float32 on cpu, k is torch.float32 on meta.",
        ),
        ((Q, K, zeros(5, 4, 16)), "k and v must have the same shape; received [5, 2, 16] and [5, 4, 16]."),
        ((Q, zeros(5, 2, 8), zeros(5, 2, 8)), "q and k must have the same head_dim; received 16 and 8."),
        ((Q, zeros(5, 3, 16), zeros(5, 3, 16)), "num_heads_k must divide num_heads; received 3 key heads for 4 query heads."),
        ((Q, zeros(5, 0, 16), zeros(5, 0, 16)), "num_heads_k must divide num_heads; received 0 key heads for 4 query heads."),
        ((Q[1:], K, K), "q must hold the rows of the plan's segments; it has 4 rows, the segments 5."),
        ((Q, K[1:], K[1:]), "k must hold the rows of the plan's segments; it has 4 rows, the segments 5."),
    ],
)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_attention_says_what_is_wrong_with_its_tensors(arguments, message, backend, monkeypatch):
    monkeypatch.setattr(_backends, "INTERPRET", True)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(*arguments, PLAN, backend=backend)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 2.0, float("nan")])
def test_attention_says_what_is_wrong_with_dropout(dropout_p):
    with pytest.raises(ValueError, match=re.escape(f"dropout_p must be in [0, 1); received {dropout_p}.")):
        attention(Q, K, K, PLAN, dropout_p=dropout_p)


def test_attention_wants_the_plan_on_the_device_of_q():
    message = "plan must be on the device of q; the plan is on cpu, q on meta: use plan.to('meta')."
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(*(x.to("meta") for x in (Q, K, K)), PLAN)
    assert attention(*(x.to("meta") for x in (Q, K, K)), PLAN.to("meta")).shape == Q.shape


def test_attention_triton_says_which_dtypes_it_has(monkeypatch):
    monkeypatch.setattr(_backends, "INTERPRET", True)
    message = "backend 'triton' computes in float32, float16 or bfloat16; received torch.float64."
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(Q.double(), K.double(), K.double(), PLAN, backend="triton")


@pytest.mark.parametrize("head_dim", [0, 8, 15, 20, 136])
def test_attention_triton_says_which_head_dims_it_has(head_dim, monkeypatch):
    monkeypatch.setattr(_backends, "INTERPRET", True)
    message = f"backend 'triton' needs a head_dim that is a multiple of 8 from 16 to 128; received {head_dim}."
    x = zeros(5, 2, head_dim)
    with pytest.raises(ValueError, match=re.escape(message)):
        attention(x, x, x, PLAN, backend="triton", softmax_scale=1.0)


# ---------------------------------------------------------------------------------------------------------------- backends


@pytest.mark.parametrize("call", [lambda: attention(Q, K, K, PLAN, backend="sdpa"), lambda: backend_status("sdpa", "cpu")])
def test_backend_unknown(call):
    with pytest.raises(
        ValueError, match="backend must be one of triton, torch, xformers, flash_attn or None; received 'sdpa'."
    ):
        call()


def test_backend_default_by_device():
    assert [default_backend(d) for d in ("cpu", "cuda", "meta", "mps")] == ["torch", "triton", "triton", "torch"]
    assert choose_backend(None, "cpu") == "torch"
    assert choose_backend("torch", "cuda") == "torch"


@pytest.mark.parametrize(
    ("backend", "device", "found", "interpret", "available", "reason"),
    [
        ("torch", "cpu", (), False, True, "PyTorch's own kernels"),
        ("triton", "meta", (), False, True, "shapes and FLOPs only, nothing is computed"),
        ("triton", "cuda", (), False, False, "triton is not installed"),
        ("triton", "cuda", ("triton",), False, True, "our kernels"),
        (
            "triton",
            "cpu",
            ("triton",),
            True,
            True,
            "our kernels in the Triton interpreter (TRITON_INTERPRET=1): for tests, slow",
        ),
        (
            "triton",
            "cpu",
            ("triton",),
            False,
            False,
            "triton kernels need a CUDA device (or TRITON_INTERPRET=1 on the CPU); the tensors are on cpu",
        ),
        ("xformers", "cuda", (), False, False, "xformers is not installed (pip install 'vlp_fast[xformers]')"),
        ("flash_attn", "cuda", (), False, False, "flash_attn is not installed (pip install 'vlp_fast[flash-attn]')"),
        ("flash_attn", "cpu", ("flash_attn",), False, False, "flash_attn needs a CUDA device; the tensors are on cpu"),
        ("xformers", "cuda", ("xformers",), False, True, "variable-length attention of the installed library"),
    ],
)
def test_backend_status_says_why(backend, device, found, interpret, available, reason, monkeypatch):
    monkeypatch.setattr(_backends, "_FOUND", {name: name in found for name in BACKENDS})
    monkeypatch.setattr(_backends, "INTERPRET", interpret)
    assert backend_status(backend, device) == (available, reason)
    if available:
        assert choose_backend(backend, device) == backend
    else:
        with pytest.raises(RuntimeError, match=re.escape(f"backend {backend!r} is not available: {reason}.")):
            choose_backend(backend, device)


@pytest.mark.parametrize("backend", ["xformers", "flash_attn"])
def test_backend_never_falls_back(backend, monkeypatch):
    monkeypatch.setattr(_backends, "_FOUND", dict.fromkeys(BACKENDS, True))
    with pytest.raises(RuntimeError, match=f"backend '{backend}' is not available: {backend} needs a CUDA device"):
        attention(Q, K, K, PLAN, backend=backend)


# ----------------------------------------------------------------------------------------- libraries, in place of which we stand


def library(plan, backend, dtype=torch.float16, **options):
    arguments = {"scale": 0.25, "dropout_p": 0.0, "return_lse": False} | options
    q, k, v = (torch.randn(s.rows, h, 16, dtype=dtype) for s, h in ((plan.query, 4), (plan.key, 2), (plan.key, 2)))
    return (q, k, v), _attention_libraries.attention(q, k, v, plan, **arguments, backend=backend)


MIXED = AttentionPlan.from_edges([2, 3], [2, 3], [(0, 0, True), (1, 1, False)])


@pytest.mark.parametrize("backend", ["xformers", "flash_attn"])
@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            AttentionPlan.cross_attention([2, 3], [4], [0, 0]),
            {},
            "expresses only plans in which query segment i reads key segment i; use 'triton' or 'torch' for this plan.",
        ),
        (MIXED, {}, "cannot mix causal and full edges in one call; use 'triton' or 'torch'."),
        (PLAN, {"return_lse": True}, "does not return the log-sum-exp with a gradient; use 'triton' or 'torch'."),
    ],
)
def test_libraries_say_what_they_cannot_express(plan, options, message, backend):
    with pytest.raises(NotImplementedError, match=re.escape(f"backend {backend!r} {message}")):
        library(plan, backend, **options)


def test_libraries_flash_attn_says_which_dtypes_it_has():
    with pytest.raises(
        NotImplementedError, match=r"backend 'flash_attn' computes in float16 or bfloat16; received torch.float32."
    ):
        library(PLAN, "flash_attn", torch.float32)


@pytest.mark.parametrize("causal", [False, True])
def test_libraries_flash_attn_receives_what_it_documents(causal, monkeypatch):
    plan = AttentionPlan.from_cu_seqlens([0, 3, 5], [0, 4, 9], causal=causal)
    seen = {}

    def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        seen.update(options, cu_q=cu_seqlens_q.tolist(), cu_k=cu_seqlens_k.tolist(), longest=(max_seqlen_q, max_seqlen_k))
        return q

    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func))
    library(plan, "flash_attn", dropout_p=0.1)
    assert seen == {
        "cu_q": [0, 3, 5],
        "cu_k": [0, 4, 9],
        "longest": (3, 5),
        "dropout_p": 0.1,
        "softmax_scale": 0.25,
        "causal": causal,
    }


@pytest.mark.parametrize("causal", [False, True])
def test_libraries_xformers_receives_what_it_documents(causal, monkeypatch):
    plan = AttentionPlan.from_cu_seqlens([0, 3, 5], [0, 4, 9], causal=causal)
    seen = {}

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, q, k, device):
            seen.update(q=q, k=k, device=device, causal=False)
            return cls()

        def make_causal_from_bottomright(self):
            seen["causal"] = True
            return self

    def memory_efficient_attention(q, k, v, attn_bias, p, scale):
        seen.update(shapes=[list(x.shape) for x in (q, k, v)], p=p, scale=scale, keys=k)
        return q

    modules = {
        "xformers": types.ModuleType("xformers"),
        "xformers.ops": types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention),
        "xformers.ops.fmha": types.ModuleType("xformers.ops.fmha"),
        "xformers.ops.fmha.attn_bias": types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask),
    }
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    (q, k, _), out = library(plan, "xformers", torch.float32, dropout_p=0.1)
    assert torch.equal(out, q)
    assert torch.equal(seen.pop("keys")[0, :, 3], k[:, 1])  # query heads 2 and 3 read key head 1
    assert seen == {
        "q": [3, 2],
        "k": [4, 5],
        "device": torch.device("cpu"),
        "causal": causal,
        "shapes": [[1, 5, 4, 16], [1, 9, 4, 16], [1, 9, 4, 16]],
        "p": 0.1,
        "scale": 0.25,
    }
