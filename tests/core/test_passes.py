"""Packing passes: which rows, which expert, who reads what; and which loss a forward runs for."""

import pytest
import torch

from vlp_fast import AttentionPlan, Segments
from vlp_fast.passes import TextPass, current_loss, loss_scope, observe_losses, pack_passes, with_first_token

IMAGES = Segments([4, 4, 4])


def make_pass(name, lengths, **options):
    segments = Segments(lengths)
    return TextPass(name, torch.randint(1, 100, (segments.rows,)), segments, **options)


def edges(plan):
    return [tuple(edge) for edge in plan.host_edges.tolist()]


def test_pack_passes_one_pass_is_left_as_it_is():
    only = make_pass("itc", [3, 2])
    packed = pack_passes([only], 2, None)
    assert torch.equal(packed.token_ids, only.token_ids)
    assert packed.positions.tolist() == [0, 1, 2, 0, 1]
    assert packed.expert_offsets == (0, 5, 5)
    assert packed.picks == ((0, 5),)
    assert packed.read is None
    assert packed.cross_plan is None
    assert edges(packed.plan) == [(0, 0, 0), (1, 1, 0)]


def test_pack_passes_lays_them_expert_after_expert():
    passes = [
        make_pass("lm", [3, 2], expert=1, causal=True, images=[2, 0]),
        make_pass("itm_positive", [1], expert=0, images=[1]),
        make_pass("itm_negative", [4, 1], expert=0, images=torch.tensor([0, 2])),
    ]
    packed = pack_passes(passes, 3, IMAGES)
    assert packed.expert_offsets == (0, 6, 11, 11)
    # by expert, then by image: the negative that reads image 0, the positive (1), the other negative (2); captions of images 0 and 2
    assert packed.plan.query.lengths == (4, 1, 1, 2, 3)
    assert edges(packed.plan) == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 3, 1), (4, 4, 1)]
    assert edges(packed.cross_plan) == [(0, 0, 0), (1, 1, 0), (2, 2, 0), (3, 0, 0), (4, 2, 0)]
    for one, ids, positions in zip(passes, packed.split(packed.token_ids), packed.split(packed.positions), strict=True):
        assert torch.equal(ids, one.token_ids)
        assert torch.equal(positions, one.segments.positions())
    assert packed.picks[1] == (4, 5)
    assert packed.picks[2].tolist() == [0, 1, 2, 3, 5]


def test_neighbours_that_read_one_image_are_one_segment_of_it():
    passes = [make_pass("a", [3, 2, 4], images=[1, 0, 1]), make_pass("b", [2, 2], images=[1, 2])]
    packed = pack_passes(passes, 1, IMAGES)
    assert packed.plan.query.lengths == (2, 3, 4, 2, 2)
    assert packed.cross_plan.query.lengths == (2, 9, 2)
    assert edges(packed.cross_plan) == [(0, 0, 0), (1, 1, 0), (2, 2, 0)]


def test_the_last_layer_computes_what_is_read():
    passes = [
        make_pass("lm", [3, 2], expert=1, causal=True, images=[1, 0]),
        make_pass("itm", [4, 1, 5], images=[0, 2, 0], first_row_only=True),
    ]
    packed = pack_passes(passes, 2, IMAGES)
    assert packed.plan.query.lengths == (4, 5, 1, 2, 3)
    assert packed.read.rows.tolist() == [0, 4, 9, 10, 11, 12, 13, 14]
    assert packed.read.plan.query.lengths == (1, 1, 1, 2, 3)
    assert packed.read.plan.key.lengths == packed.plan.key.lengths
    assert edges(packed.read.plan) == edges(packed.plan)
    assert packed.read.cross_plan.query.lengths == (2, 1, 2, 3)
    assert packed.read.expert_offsets == (0, 3, 8)
    lm, itm = packed.split(packed.token_ids[packed.read.rows])
    assert torch.equal(lm, passes[0].token_ids)
    assert torch.equal(itm, passes[1].token_ids[[0, 4, 5]])
    whole = pack_passes(passes, 2, IMAGES, whole=True)
    assert whole.read is None
    for mine, other in zip(whole.split(whole.token_ids), (lm, itm), strict=True):
        assert torch.equal(mine, other)


def test_pack_passes_expert_in_the_middle_may_be_empty():
    packed = pack_passes([make_pass("a", [2], expert=2), make_pass("b", [3], expert=0)], 4, None)
    assert packed.expert_offsets == (0, 3, 3, 5, 5)


def test_pack_passes_without_readers_ignores_the_images():
    assert pack_passes([make_pass("itc", [2])], 1, IMAGES).cross_plan is None


def test_pack_passes_takes_an_index_that_only_the_device_knows():
    passes = [
        TextPass("a", torch.empty(3, dtype=torch.int64, device="meta"), Segments([1, 2], "meta"), images=[0, 1]),
        TextPass(
            "b",
            torch.empty(2, dtype=torch.int64, device="meta"),
            Segments([2], "meta"),
            images=torch.empty(1, dtype=torch.int64, device="meta"),
        ),
    ]
    plan = pack_passes(passes, 1, Segments([4, 4], "meta")).cross_plan
    assert plan.host_edges is None
    assert plan.edge_key.shape == (3,)
    assert plan.device.type == "meta"


@pytest.mark.parametrize(
    ("passes", "images", "message"),
    [
        ([], None, "a text tower needs at least one pass; received none."),
        ([make_pass("a", [1], expert=2)], None, r"expert must be from 0 to 1; received \[2\]."),
        ([make_pass("a", [1]), make_pass("b", [1], expert=-1)], None, r"expert must be from 0 to 1; received \[0, -1\]."),
        (
            [make_pass("a", [1]), make_pass("b", [1], images=[0])],
            IMAGES,
            "passes with and without cross-attention cannot share one forward; group them apart.",
        ),
        ([make_pass("a", [1], images=[0])], None, "a pass that reads images needs image_segments; received None."),
        ([make_pass("a", [1], images=[3])], IMAGES, "names key segment 3 of 3."),
        ([make_pass("a", [1, 2], images=[0])], IMAGES, "received 1 for 2 captions of pass 'a'."),
        ([make_pass("a", [1, 0], first_row_only=True)], None, "no first row; segment 1 of pass 'a' is empty."),
    ],
)
def test_pack_passes_says_what_is_wrong(passes, images, message):
    with pytest.raises(ValueError, match=message):
        pack_passes(passes, 2, images)


def test_with_first_token_replaces_the_first_of_every_caption_in_a_copy():
    ids = torch.arange(6)
    assert with_first_token(ids, Segments([2, 1, 3]), 99).tolist() == [99, 1, 99, 99, 4, 5]
    assert ids.tolist() == list(range(6))
    with pytest.raises(ValueError, match="segment 1 is empty"):
        with_first_token(ids, Segments([6, 0]), 99)


def test_loss_scope_nests_and_ends_with_an_exception():
    seen = []
    assert current_loss() is None
    with observe_losses(lambda: seen.append(current_loss())):
        with loss_scope("itc"):
            assert current_loss() == "itc"
            with loss_scope("itm"):
                assert current_loss() == "itm"
            assert current_loss() == "itc"
        with pytest.raises(ZeroDivisionError), loss_scope("lm"):
            raise ZeroDivisionError
    assert current_loss() is None
    assert seen == ["itc", "itm", "itc", None, "lm", None]
    with loss_scope("unseen"):
        pass
    assert len(seen) == 6


def test_plans_of_packed_passes_are_those_of_each_pass():
    passes = [make_pass("a", [3, 2]), make_pass("b", [2, 4], causal=True)]
    packed = pack_passes(passes, 1, None)
    apart = [AttentionPlan.self_attention(p.segments, causal=p.causal) for p in passes]
    assert packed.plan.pairs == sum(plan.pairs for plan in apart)
