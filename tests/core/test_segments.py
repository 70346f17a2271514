"""Segments: offsets, positions, first and last rows, and the sentences said about lengths that make no sense."""

import copy
import pickle

import numpy as np
import pytest
import torch

from vlp_fast import Segments

LENGTHS = [3, 0, 2, 4]


@pytest.fixture
def segments(device):
    return Segments(LENGTHS, device)


def test_segments_know_their_offsets(segments, device):
    assert segments.offsets.tolist() == [0, 3, 3, 5, 9]
    assert segments.offsets.dtype == torch.int32
    assert segments.offsets.device.type == segments.device.type == device
    assert (segments.lengths, segments.rows, segments.max_length, len(segments)) == ((3, 0, 2, 4), 9, 4, 4)
    assert segments.cu_seqlens is segments.offsets


@pytest.mark.parametrize("lengths", [LENGTHS, tuple(LENGTHS), np.array(LENGTHS), torch.tensor(LENGTHS), iter(LENGTHS)])
def test_segments_take_any_list_of_whole_numbers(lengths):
    assert Segments(lengths).lengths == (3, 0, 2, 4)


def test_segments_without_segments():
    none = Segments([])
    assert (len(none), none.rows, none.max_length, none.offsets.tolist()) == (0, 0, 0, [0])
    assert none.positions().shape == none.first_rows().shape == none.last_rows().shape == (0,)


def test_segments_positions_restart_in_every_segment(segments):
    assert segments.positions().tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]
    assert segments.positions().dtype == torch.int64


def test_segments_first_and_last_rows(device):
    segments = Segments([3, 1, 2], device)
    assert segments.first_rows().tolist() == [0, 3, 4]
    assert segments.last_rows().tolist() == [2, 3, 5]
    assert segments.first_rows().device.type == device


@pytest.mark.parametrize("which", ["first", "last"])
def test_segments_empty_segment_has_no_first_or_last_row(segments, which):
    with pytest.raises(ValueError, match=f"an empty segment has no {which} row; segment 1 is empty."):
        getattr(segments, f"{which}_rows")()


@pytest.mark.parametrize(("drop", "rows"), [(0, list(range(9))), (1, [0, 1, 3, 5, 6, 7]), (2, [0, 5, 6]), (4, []), (9, [])])
def test_segments_rows_before_last(segments, drop, rows):
    assert segments.rows_before_last(drop).tolist() == rows


def test_segments_say_which_one_each_row_belongs_to(segments):
    assert segments.segment_of_rows().tolist() == [0, 0, 0, 2, 2, 3, 3, 3, 3]
    assert Segments([]).segment_of_rows().dtype == torch.int64


def test_segments_take_picks_and_repeats_segments(segments):
    rows, taken = segments.take([3, 0, 1, 3])
    assert rows.tolist() == [5, 6, 7, 8, 0, 1, 2, 5, 6, 7, 8]
    assert taken.lengths == (4, 3, 0, 4)
    assert taken.device == segments.device
    rows, taken = segments.take([])
    assert rows.tolist() == []
    assert len(taken) == 0


def test_segments_take_agrees_with_slicing(segments, device):
    x = torch.randn(segments.rows, 2, device=device)
    parts = x.split(list(segments.lengths))
    index = [2, 2, 0, 3, 1]
    rows, _ = segments.take(index)
    assert torch.equal(x[rows], torch.cat([parts[i] for i in index]))


@pytest.mark.parametrize("index", [[4], [-1], [0, 7, 1]])
def test_segments_take_refuses_segments_that_do_not_exist(segments, index):
    bad = next(i for i in index if not 0 <= i < 4)
    with pytest.raises(ValueError, match=f"index must name segments 0 to 3; received {bad}."):
        segments.take(index)


def test_segments_to_another_device(segments):
    assert segments.to(segments.device) is segments
    moved = segments.to("meta")
    assert moved.offsets.device.type == "meta"
    assert moved == segments
    assert moved.lengths == segments.lengths


def test_segments_are_equal_when_their_lengths_are():
    assert Segments([1, 2]) == Segments((1, 2))
    assert Segments([1, 2]) != Segments([2, 1])
    assert Segments([1, 2]) != (1, 2)
    assert len({Segments([1, 2]), Segments([1, 2]), Segments([3])}) == 2


def test_segments_repr_says_the_sizes():
    assert repr(Segments([1, 4])) == "Segments(segments=2, rows=5, max_length=4, device='cpu')"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_segments_can_be_copied_and_pickled(copied):
    segments = Segments(LENGTHS)
    again = copied(segments)
    assert again == segments
    assert torch.equal(again.offsets, segments.offsets)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([2, -1], r"lengths must not be negative; lengths\[1\] is -1."),
        ([1.5], r"lengths must be a flat list of whole numbers; received float64 of shape \[1\]."),
        ([[1], [2]], r"lengths must be a flat list of whole numbers; received int64 of shape \[2, 1\]."),
        ([2**31 - 1, 1], r"lengths must sum to at most 2147483647 rows; they sum to 2147483648."),
    ],
)
def test_segments_refuse_lengths_that_make_no_sense(lengths, message):
    with pytest.raises(ValueError, match=message):
        Segments(lengths)


@pytest.mark.parametrize("cu_seqlens", [[0, 3, 3, 5, 9], torch.tensor([0, 3, 3, 5, 9], dtype=torch.int32)])
def test_segments_from_cu_seqlens(cu_seqlens):
    assert Segments.from_cu_seqlens(cu_seqlens) == Segments(LENGTHS)


def test_segments_from_cu_seqlens_stay_on_their_device(device):
    offsets = Segments(LENGTHS, device).cu_seqlens
    assert Segments.from_cu_seqlens(offsets).device == offsets.device
    assert Segments.from_cu_seqlens(offsets, "meta").device.type == "meta"


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([], r"cu_seqlens must start at 0; received \[\]."),
        ([1, 2], r"cu_seqlens must start at 0; received \[1, 2\]."),
        ([0, 4, 3, 5], r"cu_seqlens must not decrease; cu_seqlens\[2\]=3 is below cu_seqlens\[1\]=4."),
        ([0, 0.5], r"cu_seqlens must be a flat list of whole numbers"),
    ],
)
def test_segments_from_cu_seqlens_refuses_what_is_not_cumulative(cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        Segments.from_cu_seqlens(cu_seqlens)
