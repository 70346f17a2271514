"""What a CUDA graph needs of a pretraining step: it reads nothing on the host and makes no tensor there."""

import contextlib
import functools
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlp_fast.data.batches import Batch
from vlp_fast.segments import Segments, keep_host_tensors
from vlp_fast.training import build_pretraining

ROOT = Path(__file__).parents[2]
# what asks for numbers, or for a size that depends on them; on a CUDA device the host waits for each
READS = {"_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "bincount", "_unique2", "unique_dim"}
READING = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "unique",
    "masked_select",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
)
# a tensor of numbers of the host: an index that is a list too
MADE, MAKING = "lift_fresh", ("tensor", "as_tensor", "from_numpy")


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
            if file.is_relative_to(ROOT) and file != Path(__file__).resolve():
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
    "vlmo": {("__bool__", "linear_cross_entropy", "_check_targets"), ("tolist", "vlmo", "forward")},
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
    return {"negatives": NEGATIVES[0:2]} if "itm" in step.losses else {}


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
@pytest.mark.parametrize("name", SHALLOW)
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
