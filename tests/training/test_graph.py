"""A pretraining step as a CUDA graph: what the capture needs is tested without a GPU, the graph itself on one.

The capture needs a step that reads nothing on the host and makes no tensor there. In place of a CUDA graph a list of the operations
that ran stands here, which `Recording` runs again.
"""

import contextlib
import functools
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from vlp_fast.data.batches import Batch
from vlp_fast.ops._autocast import Table
from vlp_fast.segments import Segments, keep_host_tensors
from vlp_fast.training import BlipPretraining, GraphedStep, build_pretraining, graph

ROOMS = [Path(__file__).parents[2] / name for name in ("vlp_fast", "kernels", "tests")]
# what asks for numbers, or for a size that depends on them; on a CUDA device the host waits for each
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim"}
READING = {"item", "tolist", "numpy", "cpu", "nonzero", "unique", "masked_select"} | {
    f"__{to}__" for to in ("bool", "int", "float", "index")
}
# a tensor of numbers of the host: an index that is a list too
MADE, MAKING = "lift_fresh", ("tensor", "as_tensor", "from_numpy")


@pytest.fixture(autouse=True)
def _dense_gradients_of_tables(monkeypatch):
    """As on a CUDA device; a CPU sums sparse ones, whose size depends on the words."""
    monkeypatch.setattr("vlp_fast.modules.embeddings.shared_table", lambda weight: Table(weight, weight))


class HostTraffic(TorchDispatchMode):
    """Where the library reads a tensor on the host, or makes one there: ``(what, file, function)`` of its nearest frame.

    A dispatch mode does not see what an operation of ours does inside, so methods of tensors that read are watched too.
    """

    def __init__(self):
        super().__init__()
        self.found, self.patches = set(), pytest.MonkeyPatch()

    def __enter__(self):
        watched = [(torch.Tensor, name, name) for name in READING] + [(torch, name, MADE) for name in MAKING]
        for owner, name, what in watched:
            self.patches.setattr(owner, name, self.watching(getattr(owner, name), what))
        item = torch.Tensor.__getitem__
        self.patches.setattr(torch.Tensor, "__getitem__", lambda x, index: self.look(index) or item(x, index))
        return super().__enter__()

    def __exit__(self, *error):
        self.patches.undo()
        super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        unknown_size = function is torch.ops.aten.repeat_interleave.Tensor and (kwargs or {}).get("output_size") is None
        if name in READS or name == MADE or unknown_size:
            self.note(name)
        if name in ("index", "index_put_", "index_put"):
            self.look(args[1])
        return function(*args, **(kwargs or {}))

    def watching(self, function, what):
        @functools.wraps(function)
        def watched(*args, **kwargs):
            self.note(what)
            return function(*args, **kwargs)

        return watched

    def look(self, index):
        for part in index if isinstance(index, tuple | list) else [index]:
            if isinstance(part, torch.Tensor) and part.dtype in (torch.bool, torch.uint8):
                self.note("nonzero")

    def note(self, what):
        frame = sys._getframe(1)
        while frame is not None:
            file = Path(frame.f_code.co_filename).resolve()
            if "triton" in file.parts:  # the interpreter's own
                return
            if any(file.is_relative_to(room) for room in ROOMS) and file != Path(__file__).resolve():
                break
            frame = frame.f_back
        self.found.add((what, file.stem, frame.f_code.co_name) if frame is not None else (what, "", ""))


def traffic(function):
    with HostTraffic() as seen:
        function()
    return seen.found


def test_host_traffic_sees_what_a_capture_forbids():
    x = torch.arange(3.0)
    for read in (
        x[0].item,
        lambda: bool(x[0]),
        lambda: int(x[0]),
        lambda: x[x > 0],
        x.nonzero,
        lambda: x.tolist(),
        lambda: x.equal(x),
    ):
        assert traffic(read), read
    for made in (lambda: torch.tensor([1]), lambda: x.new_tensor([1.0]), lambda: x[[0, 1]], lambda: Segments([2, 3])):
        assert {what for what, *_ in traffic(made)} == {MADE}
    assert not traffic(lambda: (x * 2).sum().clamp(0.0, 1.0) + torch.full((3,), 2.0) + x.masked_fill(x > 0, 1.0))
    assert traffic(lambda: Segments([2, 3])) == {(MADE, "segments", "_copied")}


SIZES = {"image_size": 32, "vocab_size": 100}
QUEUE = {"queue_size": 16}
DROPPING = {"patch_size": 8, "patch_drop": 0.5}
MODELS = {"blip": QUEUE, "coca": {}, "beit3": {}, "albef": QUEUE, "vlmo": {}}
CONFIGS = {
    **MODELS,
    **{f"{model} dropping patches": {**options, **DROPPING} for model, options in MODELS.items()},
    "beit3 dropping paths": {"drop_path": 0.5},
    "vlmo dropping paths": {"drop_path": 0.5},
}
# one layer of everything: kernels in the interpreter take their time
SHALLOW = {
    "blip": {"depth": 1, "vision_depth": 1},
    "coca": {"vision_depth": 1, "unimodal_depth": 1, "multimodal_depth": 1},
    "beit3": {"depth": 1},
}
LENGTHS = (6, 9, 4, 12)
NEGATIVES = (torch.tensor([1, 2, 3, 0]), torch.tensor([2, 3, 1, 0]))  # captions of other lengths
# on a CUDA device words are checked there; negatives are given on the host
READ = {
    "blip": {("__bool__", "linear_cross_entropy", "_check_targets"), ("tolist", "blip", "forward")},
    "coca": {("__bool__", "linear_cross_entropy", "_check_targets")},
    "beit3": {("__bool__", "linear_cross_entropy", "_check_targets")},
    "albef": {("tolist", "albef", "forward")},
    "vlmo": {("__bool__", "linear_cross_entropy", "_check_targets"), ("tolist", "vlmo", "_match")},
}


def make(name, **changes):
    torch.manual_seed(0)
    return build_pretraining(name.split()[0], "tiny", **{**SIZES, **CONFIGS[name], **changes}).train()


def make_inputs(step, seed=1, lengths=LENGTHS, image_index=None):
    generator = torch.Generator().manual_seed(seed)
    count = len(lengths) if image_index is None else max(image_index) + 1
    images = torch.randn(count, 3, 32, 32, generator=generator)
    ids = torch.randint(5, 95, (sum(lengths),), generator=generator)
    batch = Batch(images, ids, tuple(lengths), ("",) * len(lengths), image_index)
    return step.prepare(batch, torch.Generator().manual_seed(2))


def options(step):
    return {"negatives": NEGATIVES} if "itm" in step.losses else {}


def run(step, inputs, kept=None):
    """A step whose forward alone may keep what is made on the host: kernels' backwards run in threads that know nothing of it."""
    with contextlib.nullcontext() if kept is None else keep_host_tensors(kept):
        losses = step(inputs, **options(step))
    step.total(losses).backward()
    return {name: loss.detach() for name, loss in losses.items()}


def state(step):
    """Gradients and whatever else a step writes."""
    gradients = {f"gradient of {name}": p.grad for name, p in step.named_parameters() if p.grad is not None}
    return {**gradients, **{name: t.detach() for name, t in step.named_parameters()}, **dict(step.named_buffers())}


def assert_same(found, expected, within=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=within, atol=within, msg=lambda text, name=name: f"{name}: {text}")


# -------------------------------------------------------------------------------------------------------- what a capture needs


@pytest.mark.parametrize("image_index", [None, (1, 0, 1, 1)], ids=["an image a caption", "shared images"])
@pytest.mark.parametrize("name", CONFIGS)
def test_step_makes_nothing_on_the_host_that_was_kept(name, image_index):
    if image_index is not None and name.startswith("beit3"):
        pytest.skip("BEiT-3 takes a caption an image")
    step, twin, kept = make(name), make(name), {}
    inputs = make_inputs(step, image_index=image_index)
    run(step, inputs, kept)
    count = len(kept)
    assert traffic(lambda: run(step, inputs, kept)) == READ[name.split()[0]]
    assert len(kept) == count > 0
    # nobody has written to what was kept
    for _ in range(2):
        run(twin, inputs)
    for one in (step, twin):
        torch.manual_seed(1)
        one.zero_grad(set_to_none=True)
        run(one, inputs, kept if one is step else None)
    if "dropping" not in name:  # else momentum encoders and queues have met other random numbers
        assert_same(state(step), state(twin), within=0.0)


@pytest.mark.parametrize("name", CONFIGS)
def test_step_names_the_device_of_every_tensor_it_makes(name):
    step = make(name)
    inputs = make_inputs(step)
    with torch.device("meta"):  # where a tensor would be whose device is not named
        losses = run(step, inputs)
    assert not any(loss.is_meta for loss in losses.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["coca", *(pytest.param(name, marks=pytest.mark.heavy) for name in ("blip", "beit3"))])
def test_step_with_kernels_makes_nothing_on_the_host_that_was_kept(name):
    step, kept = make(name, backend="triton", **SHALLOW[name]), {}
    inputs = make_inputs(step)
    first, second = (traffic(lambda: run(step, inputs, kept)) for _ in range(2))
    assert second == READ[name]
    # in the kernels' own cache
    own = (MADE, "_multiway_common", "_device_offsets")
    assert first - second - {own} == {(MADE, "segments", "_copied")}


@pytest.mark.parametrize("name", ["blip", "albef", "vlmo"])
def test_step_that_draws_negatives_reads_them_on_the_host_and_nothing_else(name):
    step, kept = make(name), {}
    inputs = make_inputs(step)
    with keep_host_tensors(kept):
        found = {what for what in traffic(lambda: step(inputs)) if what[0] != MADE}
    assert found == READ[name]


def test_keep_host_tensors_takes_what_has_the_same_numbers():
    kept = {}
    with keep_host_tensors(kept):
        first, again, other = Segments([2, 3]), Segments([2, 3]), Segments([3, 2])
    assert first.offsets is again.offsets
    assert other.offsets.tolist() == [0, 3, 5]
    assert Segments([2, 3]).offsets is not first.offsets
    assert sorted(t.tolist() for t in kept.values()) == [[0, 2, 5], [0, 3, 5]]


# --------------------------------------------------------------------------------------------- GraphedStep without a CUDA device


class Recording(TorchDispatchMode):
    """What ran within it, run again by `replay` with the results where they were, as a CUDA graph does.

    Leaving it undoes what it did to the tensors of `step`: while a CUDA graph is captured nothing is computed.
    """

    def __init__(self, step):
        super().__init__()
        self.step, self.calls = step, []

    def __enter__(self):
        self.before = {name: t.clone() for name, t in state(self.step).items()}
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for name, tensor in state(self.step).items():
                tensor.copy_(self.before[name])

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        # results of their own, not views of what was given
        own = [isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given for t in tree_leaves(out)]
        args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.detach, (args, kwargs or {}))
        self.calls.append((function, args, kwargs, tree_map_only(torch.Tensor, torch.Tensor.detach, tree_leaves(out)), own))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outs, own in self.calls:
            for out, new, fresh in zip(outs, tree_leaves(function(*args, **kwargs)), own, strict=True):
                if fresh:
                    out.copy_(new)


@pytest.fixture
def recorded(monkeypatch):
    """Makes `GraphedStep` of a step on the CPU, with a `Recording` for the CUDA graph."""

    def make_graphed(step, inputs, **given):
        recording = Recording(step)
        stream = type("Stream", (), {"wait_stream": lambda self, other: None})
        monkeypatch.setattr(graph, "_check", lambda *_: torch.device("cpu"))
        for name, stand_in in {
            "device": contextlib.nullcontext,
            "stream": contextlib.nullcontext,
            "Stream": stream,
            "current_stream": stream,
            "CUDAGraph": lambda: recording,
            "graph": lambda captured, stream: captured,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        return GraphedStep(step, inputs, **given)

    return make_graphed


def follow(graphed, step, twin, batches):
    """The graph and a step without one go through the same batches, and through what optimizers and users do between them."""
    assert_same({name: t for name, t in state(step).items() if not name.startswith("gradient")}, dict(state(twin)))
    assert not any(p.grad.any() for p in step.parameters() if p.grad is not None)
    between = (None, None, False, True, True)  # gradients add up; are set to zero; are taken away
    for number, (inputs, zero) in enumerate(zip(batches, between, strict=True)):
        for one in (step, twin):
            if zero is not None:
                one.zero_grad(set_to_none=zero)
            if number == 4:  # a step without the graph between two with it
                run(one, batches[0])
            with torch.no_grad():
                for p in one.model.parameters():
                    p.mul_(1.01)
        assert_same(graphed(inputs), run(twin, inputs), within=1e-4)
        assert_same(state(step), state(twin), within=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_graphed_step_follows_the_step_without_a_graph(name, recorded):
    step, twin = make(name), make(name)
    batches = [make_inputs(step, seed) for seed in (1, 2, 3, 4, 5)]
    graphed = recorded(step, make_inputs(step, 6), **options(step))
    assert not {function.overloadpacket.__name__ for function, *_ in graphed._graph.calls} & {*READS, MADE}
    follow(graphed, step, twin, batches)


def test_graphed_step_gives_each_call_losses_of_its_own(recorded):
    step = make("coca")
    graphed = recorded(step, make_inputs(step))
    first = graphed(make_inputs(step, 2))
    before = {name: loss.clone() for name, loss in first.items()}
    second = graphed(make_inputs(step, 3))
    assert_same(first, before, within=0.0)
    assert first["caption"] != second["caption"]


def test_graphed_step_leaves_parameters_without_gradient_alone(recorded):
    torch.manual_seed(0)
    config = make("blip").config
    step = BlipPretraining(config, losses=["itc"])
    twin = BlipPretraining(config, losses=["itc"])
    twin.load_state_dict(step.state_dict())
    inputs = make_inputs(step)
    graphed = recorded(step, inputs)
    graphed(inputs)
    run(twin, inputs)
    assert_same(state(step), state(twin), within=1e-4)
    assert any(p.grad is None for p in step.model.parameters())


def test_graphed_step_takes_inputs_of_captured_lengths_only(recorded):
    step = make("coca")
    inputs = make_inputs(step)
    graphed = recorded(step, inputs)
    with pytest.raises(
        ValueError, match=r"inputs.text_lengths must be what was captured, .*: \(6, 9, 4, 12\); received \(9, 6, 4, 12\)"
    ):
        graphed(make_inputs(step, lengths=(9, 6, 4, 12)))
    with pytest.raises(
        ValueError, match=r"inputs.token_ids must be torch.int64 of shape \[31\], as captured; received torch.int64 of \[32\]"
    ):
        graphed(make_inputs(step, lengths=(6, 9, 4, 13)))
    with pytest.raises(
        ValueError, match=r"inputs.images must be torch.float32 of .*; received torch.float64 of \[4, 3, 32, 32\]"
    ):
        graphed(replace(inputs, images=inputs.images.double()))
    with pytest.raises(ValueError, match=r"inputs.image_index must be what was captured, .*: None; received \(0, 1, 2, 3\)"):
        graphed(replace(inputs, image_index=(0, 1, 2, 3)))
    with pytest.raises(ValueError, match=r"inputs must be Batch, as captured; received Tensor"):
        graphed(inputs.images)
    graphed(replace(inputs, captions=("a", "b", "c", "d")))


def test_graphed_step_errors(monkeypatch):
    step = make("coca")
    inputs = make_inputs(step)
    with pytest.raises(ValueError, match="needs inputs and objective on one CUDA device; inputs.images is on cpu"):
        GraphedStep(step, inputs)
    with pytest.raises(ValueError, match="inputs must be what the objective's prepare gives; received Tensor"):
        GraphedStep(step, inputs.images)
    # what is said of a step on a CUDA device
    monkeypatch.setattr(torch.Tensor, "device", torch.device("cuda", 0))
    blip = make("blip")
    with pytest.raises(ValueError, match="negatives must be given to a step that is captured, .*; received None"):
        graph._check(blip, inputs, {})
    with pytest.raises(ValueError, match="negatives must be on the CPU, .*; received cuda:0"):
        graph._check(blip, inputs, {"negatives": NEGATIVES})
    monkeypatch.setattr(graph, "world", lambda: (0, 2))
    with pytest.raises(ValueError, match="a captured step must run in one process, .*; received 2"):
        graph._check(step, inputs, {})


# ----------------------------------------------------------------------------------------------------------- on a CUDA device


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["blip", "coca", "beit3"])
def test_graphed_step_follows_the_step_without_a_graph_on_a_gpu(name):
    step, twin = (make(name).cuda() for _ in range(2))
    batches = [make_inputs(build, seed).to("cuda") for build in [make(name)] for seed in (1, 2, 3, 4, 5)]
    graphed = GraphedStep(step, batches[-1], **options(step))
    follow(graphed, step, twin, batches)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphed_step_draws_new_numbers_in_every_call_on_a_gpu():
    step = make("blip", dropout_p=0.5)
    inputs = make_inputs(step).to("cuda")
    graphed = GraphedStep(step.cuda(), inputs, **options(step))
    first, second = (graphed(inputs)["lm"] for _ in range(2))
    assert first != second
