"""VLMo against its public code, of which fixtures/make_vlmo.py recorded weights, outputs, losses and gradients in odd configurations."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlp_fast import Segments
from vlp_fast.data.batches import Batch
from vlp_fast.models.checkpoints import CheckpointError
from vlp_fast.models.checkpoints._relative_bias import resize_relative_bias
from vlp_fast.models.checkpoints._rules import to_ours
from vlp_fast.models.checkpoints.vlmo import FORMAT
from vlp_fast.training.vlmo import VlmoInputs, VlmoPretraining

TOLERANCE = 1e-5  # of the largest value of a tensor
EXACT = 3e-7  # in float64: the code ran in float64, and what it made is stored in float32
PATH = Path(__file__).parent / "fixtures" / "vlmo.safetensors"
KINDS = ["relative", "absolute"]
DTYPES = [torch.float32, torch.float64]
NOT_READ = "text_embeddings.position_embeddings.weight"  # with relative positions


@pytest.fixture(scope="module")
def recorded():
    with safe_open(PATH, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["facts"])


class Peer:
    """What was recorded of one kind."""

    def __init__(self, kind, recorded):
        tensors, facts = recorded
        self.tensors = {name.partition("/")[2]: t for name, t in tensors.items() if name.startswith(kind)}
        self.lengths, self.mask_id = facts["lengths"], facts["mask_id"]
        self.fields = {
            "num_heads": facts["num_heads"][kind],
            "relative_text_length": facts["relative_text_length"],
            "drop_path": 0.0,
        }
        self.segments = Segments(self.lengths)

    def __getitem__(self, name):
        return self.tensors[name]

    def all(self, folder):
        return {name[len(folder) + 1 :]: t for name, t in self.tensors.items() if name.startswith(folder + "/")}

    def packed(self, padded):
        """The rows that are no padding."""
        return torch.cat([row[:length] for row, length in zip(padded, self.lengths, strict=True)])

    def load(self, **fields):
        return FORMAT.load(self.all("state"), **self.fields, **fields)

    def inputs(self, dtype):
        ids = self.packed(self["ids"])
        rows = self.packed(self["masked"]).nonzero()[:, 0]
        masked = ids.index_fill(0, rows, self.mask_id)
        batch = Batch(self["images"].to(dtype), ids, tuple(self.lengths), ("",) * len(self.lengths))
        return VlmoInputs(batch, masked, rows)


@pytest.fixture(params=KINDS)
def peer(request, recorded):
    return Peer(request.param, recorded)


def close(ours, theirs, what, largest=None):
    tolerance = EXACT if ours.dtype == torch.float64 else TOLERANCE
    largest = theirs.abs().max().item() if largest is None else largest
    worst = (ours - theirs).abs().max().item()
    assert worst <= tolerance * largest, f"{what}: differs by {worst:.2e} where the largest value is {largest:.2e}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_vlmo_image_mode(peer, dtype):
    out = peer.load().eval().to(dtype).contrast_image(peer["images"].to(dtype))
    close(out.rows, peer["image/image_feats"].flatten(0, 1), "rows")
    close(out.features, peer["image/cls_feats"], "features")
    close(out.vl_features, peer["image/cls_vlffn_feats"], "vl_features")


@pytest.mark.parametrize("dtype", DTYPES)
def test_vlmo_text_mode(peer, dtype):
    out = peer.load().eval().to(dtype).contrast_text(peer.packed(peer["ids"]), peer.segments)
    close(out.rows, peer.packed(peer["text/text_feats"]), "rows")
    close(out.features, peer["text/cls_feats"], "features")
    close(out.vl_features, peer["text/cls_vlffn_feats"], "vl_features")


@pytest.mark.parametrize("dtype", DTYPES)
def test_vlmo_pair_mode(peer, dtype):
    model = peer.load().eval().to(dtype)
    out = model.encode_pairs(peer["images"].to(dtype), peer.packed(peer["ids"]), peer.segments)
    close(out.text, peer.packed(peer["pair/text_feats"]), "text rows")
    close(out.image, peer["pair/image_feats"].flatten(0, 1), "image rows")
    close(out.pooled, peer["pair/cls_feats"], "pooled")


@pytest.mark.parametrize("dtype", DTYPES)
def test_vlmo_losses_and_the_gradient_of_every_parameter(peer, dtype):
    model = peer.load()
    step = VlmoPretraining(model.config, mask_id=peer.mask_id, special_ids=[0])
    step.model.load_state_dict(model.state_dict())
    step.to(dtype)
    losses = step(peer.inputs(dtype), negatives=(peer["negative_images"], peer["negative_texts"]))
    total = step.total(losses)
    theirs = peer.all("losses")
    close(0.25 * losses["mlm"], theirs["mlm_loss"], "mlm")
    close(0.5 * (losses["itc"] + losses["itc_vl"]), theirs["itc_loss"], "itc")
    close(losses["itm"], theirs["itm_loss"], "itm")
    close(total, sum(theirs.values()), "total")
    total.backward()
    not_read = {NOT_READ: torch.zeros(model.config.max_positions, model.config.dim)}
    expected = to_ours(not_read | peer.all("grad"), FORMAT.rules(model.config))
    gradients = {name: p.grad for name, p in step.model.named_parameters()}
    assert set(expected) == set(gradients)
    for name, gradient in gradients.items():
        # the two scalars' are sums of terms around one that cancel to 1e-3
        largest = 1.0 if gradient.dim() == 0 and dtype == torch.float32 else None
        close(gradient, expected[name], f"gradient of {name}", largest)


def test_vlmo_round_trip(peer):
    theirs = peer.all("state")
    saved = FORMAT.save(peer.load())
    left_out = set(theirs) - set(saved)
    assert left_out == ({NOT_READ} if "relative_position_bias_table" in theirs else set())
    for name, tensor in saved.items():
        assert torch.equal(tensor, theirs[name]), name


def test_vlmo_another_image_size(peer):
    size = peer["resized/images"].shape[-1]
    model = peer.load(image_size=size).eval()
    name = "relative_position_bias_table" if model.config.relative else "transformer.pos_embed"
    close(FORMAT.save(model)[name], peer[f"resized/{name}"], name)
    close(model.encode_image(peer["resized/images"]).rows, peer["resized/rows"].flatten(0, 1), "rows")


def test_vlmo_fewer_text_positions(peer):
    """As the published loader cuts them; what is left gives the same rows."""
    ids = peer["ids"][1, : peer.lengths[1]]
    segments = Segments([len(ids)])
    short = peer.load(max_positions=4).eval().encode_text(ids, segments)
    close(short.rows, peer.load().eval().encode_text(ids, segments).rows, "rows")


def test_vlmo_config_from_shapes(peer):
    config = peer.load().config
    relative = "relative_position_bias_table" in peer.all("state")
    assert config.relative == relative == (config.layer_scale is not None)
    assert (config.vl_start, config.depth) == ((2, 3) if relative else (1, 3))
    assert config.image_size == peer["images"].shape[-1]


def test_vlmo_says_what_does_not_fit(recorded):
    peer = Peer("relative", recorded)
    state = peer.all("state")
    with pytest.raises(CheckpointError, match="give the length that the checkpoint was made with"):
        FORMAT.load(state)
    with pytest.raises(CheckpointError, match="patch_embed.proj.weight is missing"):
        FORMAT.load({})
    del state["itm_score.fc.bias"]
    with pytest.raises(CheckpointError, match="itm_score.fc.bias is missing"):
        FORMAT.load(state, **peer.fields)
    state = Peer("absolute", recorded).all("state")
    with pytest.raises(CheckpointError, match="num_heads must be given"):
        FORMAT.load(state)


def test_relative_bias_keeps_near_offsets_and_constants():
    offsets = torch.randn(13**2, 2, 3)
    assert resize_relative_bias(offsets, 7) is offsets
    larger = resize_relative_bias(offsets, 10)
    assert larger.shape == (19**2, 2, 3)
    # an offset by 0 or 1 is where it was
    near, before = larger.view(19, 19, 2, 3)[8:11, 8:11], offsets.view(13, 13, 2, 3)[5:8, 5:8]
    torch.testing.assert_close(near, before, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(resize_relative_bias(torch.full((13**2, 1), 0.3), 4), torch.full((7**2, 1), 0.3))


def test_relative_bias_says_what_is_no_square():
    with pytest.raises(ValueError, match="a row for each offset of a square grid; received 12 rows"):
        resize_relative_bias(torch.zeros(12, 3), 4)
    with pytest.raises(ValueError, match="at least 3 by 3 patches; received 2"):
        resize_relative_bias(torch.zeros(9, 3), 4)
