import os

import pytest
import torch

from vlp_fast.data import Batch, BatchLoader, ImageTextPair, ImageTransform, RootedPath, SkipReport, collate
from vlp_fast.segments import Segments

WORDS = ["a photo", "of a blue circle", "there is a red triangle", "no green shape in the picture", "one"]
TRANSFORM, TRAIN = ImageTransform(8), ImageTransform(8, train=True)


@pytest.fixture
def pairs(image_bytes):
    """23 good pairs, each image of its own grey."""
    return [ImageTextPair(image_bytes(f"rgb({i}, {i}, {i})"), WORDS[i % len(WORDS)], f"pair {i}") for i in range(23)]


@pytest.fixture
def mixed(pairs, bad_images, image_bytes, tmp_path):
    """The good pairs with one of every failure among them."""
    bad = [ImageTextPair(data, "a photo", name) for name, data in bad_images.items()]
    bad += [
        ImageTextPair(image_bytes(), " \n", "blank"),
        ImageTextPair(image_bytes(), "...", "dots"),
        ImageTextPair(image_bytes(size=(60, 60)), "a photo", "large"),
        ImageTextPair(tmp_path / "none.png", "a photo", "none"),
        ImageTextPair(RootedPath("/etc/hostname", str(tmp_path)), "a photo", "escaping"),
    ]
    mixed = list(pairs)
    for index, pair in enumerate(bad):
        mixed.insert(2 * index, pair)
    return mixed


FAILURES = {"broken image": 6, "empty caption": 2, "over-size image": 1, "missing file": 1, "path outside the data root": 1}


def same(first: Batch, second: Batch) -> bool:
    return (
        torch.equal(first.images, second.images)
        and torch.equal(first.token_ids, second.token_ids)
        and (first.text_lengths, first.captions) == (second.text_lengths, second.captions)
    )


def test_collate_packs_captions_and_stacks_images(pairs, tokenizer):
    batch = collate(pairs[:5], TRANSFORM, tokenizer)
    assert batch.images.shape == (5, 3, 8, 8)
    assert batch.images.dtype == torch.float32
    assert batch.token_ids.dtype == torch.int64
    assert batch.captions == tuple(WORDS)
    assert batch.batch_size == 5
    assert batch.num_text_tokens == len(batch.token_ids) == sum(batch.text_lengths)
    assert [part.tolist() for part in batch.token_ids.split(batch.text_lengths)] == tokenizer.encode(WORDS, 30)
    assert tokenizer.pad_id not in batch.token_ids
    segments = batch.segments()
    assert segments == Segments(batch.text_lengths)
    assert (batch.token_ids[segments.first_rows()] == tokenizer.cls_id).all()
    assert (batch.token_ids[segments.last_rows()] == tokenizer.sep_id).all()


def test_collate_counts_what_it_leaves_out(mixed, tokenizer):
    report = SkipReport()
    batch = collate(mixed, ImageTransform(8, max_pixels=3000), tokenizer, report=report)
    assert batch.batch_size == 23
    assert report.counts == FAILURES
    assert report.names["path outside the data root"] == ["escaping"]
    assert collate(mixed, ImageTransform(8, max_pixels=3000), tokenizer).batch_size == 23


def test_collate_of_nothing_good_is_an_empty_batch(bad_images, tokenizer):
    batch = collate([ImageTextPair(bad_images["text"], "a photo", "x")], TRANSFORM, tokenizer)
    assert batch.images.shape == (0, 3, 8, 8)
    assert batch.token_ids.shape == (0,)
    assert batch.token_ids.dtype == torch.int64
    assert len(batch.segments()) == 0


def test_collate_max_length_and_clean(pairs, tokenizer, image_bytes):
    assert max(collate(pairs, TRANSFORM, tokenizer, 4).text_lengths) == 4
    pair = ImageTextPair(image_bytes(), "A (Photo)! ", "x")
    assert collate([pair], TRANSFORM, tokenizer).captions == ("a photo",)
    assert collate([pair], TRANSFORM, tokenizer, clean=str.strip).captions == ("A (Photo)!",)


def test_collate_generator_draws_the_crops(image_bytes, tokenizer):
    pairs = [ImageTextPair(image_bytes(None, (20, 20)), "a photo", "x")] * 2
    first, again = (collate(pairs, TRAIN, tokenizer, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert same(first, again)
    assert not torch.equal(first.images[0], first.images[1])


def test_batch_to_moves_tensors_and_keeps_lengths(pairs, tokenizer):
    batch = collate(pairs[:3], TRANSFORM, tokenizer)
    moved = batch.to("meta")
    assert moved.images.device.type == moved.token_ids.device.type == "meta"
    assert (moved.text_lengths, moved.captions) == (batch.text_lengths, batch.captions)
    assert same(batch.to("cpu"), batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batch_pin_memory_copies_to_the_device(pairs, tokenizer):
    batch = collate(pairs[:3], TRANSFORM, tokenizer).pin_memory()
    assert batch.images.is_pinned()
    assert batch.token_ids.is_pinned()
    assert same(batch.to("cuda").to("cpu", non_blocking=False), batch)


def test_batch_errors(tokenizer):
    images, tokens = torch.zeros(2, 3, 8, 8), torch.zeros(5, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"as many images as text lengths and captions; received \(2, 1, 2\)"):
        Batch(images, tokens, (5,), ("a", "b"))
    with pytest.raises(ValueError, match=r"token_ids must be one row per token, \[4\] by the text lengths; received \[5\]"):
        Batch(images, tokens, (2, 2), ("a", "b"))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_batch_loader_keeps_batches_full_past_broken_pairs(mixed, pairs, tokenizer, num_threads):
    transform = ImageTransform(8, max_pixels=3000)
    loader = BatchLoader(mixed, transform, tokenizer, 5, num_threads=num_threads)
    batches = list(loader)
    assert [batch.batch_size for batch in batches] == [5, 5, 5, 5, 3]
    assert [caption for batch in batches for caption in batch.captions] == [pair.caption for pair in pairs]
    assert loader.skips.counts == FAILURES
    assert loader.num_batches == 7
    assert "6 broken image (truncated, empty, text, gif, header, ...)" in loader.skips.summary()
    assert len(list(loader)) == 5
    assert loader.skips.counts == FAILURES


def test_batch_loader_drop_last(pairs, tokenizer):
    loader = BatchLoader(pairs, TRANSFORM, tokenizer, 5, drop_last=True)
    assert [batch.batch_size for batch in loader] == [5] * 4
    assert loader.num_batches == 4
    assert BatchLoader(pairs, TRANSFORM, tokenizer, 5).num_batches == 5


def test_batch_loader_shuffles_each_pass_and_is_deterministic(pairs, tokenizer):
    def order(loader, epoch):
        return torch.cat([batch.images[:, 0, 0, 0] for batch in loader.batches(epoch)]).tolist()

    loader, again = (BatchLoader(pairs, TRANSFORM, tokenizer, 4, shuffle=True, seed=7) for _ in range(2))
    plain = order(BatchLoader(pairs, TRANSFORM, tokenizer, 4), 0)
    assert order(loader, 0) == order(again, 0) != order(loader, 1)
    assert sorted(order(loader, 0)) == sorted(order(loader, 1)) == sorted(plain)
    assert order(loader, 0) != plain
    assert order(loader, 0) != order(BatchLoader(pairs, TRANSFORM, tokenizer, 4, shuffle=True, seed=8), 0)


@pytest.mark.parametrize("stream", [False, True])
def test_batch_loader_same_bits_whatever_the_threads(image_bytes, bad_images, tokenizer, stream):
    pairs = [ImageTextPair(image_bytes(None, (20, 20)), WORDS[i % 5], str(i)) for i in range(20)]
    pairs.insert(3, ImageTextPair(bad_images["truncated"], "a photo", "bad"))

    class Stream:
        def __iter__(self):
            return iter(pairs)

    source = Stream() if stream else pairs
    loaders = [BatchLoader(source, TRAIN, tokenizer, 6, shuffle=True, num_threads=threads) for threads in (0, 0, 3)]
    for _ in range(2):
        passes = [list(loader) for loader in loaders]
        assert all(same(a, b) and same(a, c) for a, b, c in zip(*passes, strict=True))
    first, second = (next(loaders[0].batches(epoch)) for epoch in (0, 1))
    assert not torch.equal(first.images, second.images)


def test_batch_loader_shuffles_a_stream_longer_than_its_buffer(image_bytes, tokenizer, monkeypatch):
    monkeypatch.setattr("vlp_fast.data.batches.SHUFFLE_BUFFER", 4)
    pairs = [ImageTextPair(image_bytes(f"rgb({i}, 0, 0)"), "a photo", str(i)) for i in range(30)]
    source = type("Stream", (), {"__iter__": lambda self: iter(pairs)})()
    loader = BatchLoader(source, ImageTransform(8, "inception"), tokenizer, 30, shuffle=True)
    red = ((next(iter(loader)).images[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()
    assert sorted(red) == list(range(30))
    assert red != list(range(30))
    assert all(value <= place + 4 for place, value in enumerate(red))


def test_batch_loader_iterations_are_passes(pairs, tokenizer):
    loader = BatchLoader(pairs, TRANSFORM, tokenizer, 4, shuffle=True)
    passes = [list(loader) for _ in range(3)]
    assert loader.epoch == 3
    for epoch, batches in enumerate(passes):
        assert all(same(a, b) for a, b in zip(batches, loader.batches(epoch), strict=True))


def test_batch_loader_steps_crosses_passes(pairs, tokenizer):
    loader = BatchLoader(pairs, TRANSFORM, tokenizer, 10, shuffle=True, drop_last=True, num_threads=1)
    assert [batch.batch_size for batch in loader.steps(7)] == [10] * 7
    assert loader.epoch == 4
    assert list(loader.steps(0)) == []


def test_batch_loader_ranks_share_the_pairs(pairs, tokenizer):
    loaders = [BatchLoader(pairs, TRANSFORM, tokenizer, 4, shuffle=True, rank=rank, world_size=3) for rank in range(3)]
    greys = [value for loader in loaders for batch in loader for value in batch.images[:, 0, 0, 0].tolist()]
    assert len(greys) == len(set(greys)) == 23
    assert [loader.num_batches for loader in loaders] == [2, 2, 2]


def test_batch_loader_survives_files_that_vanish(tmp_path, image_bytes, tokenizer):
    from vlp_fast.data import folder_pairs

    for index in range(6):
        (tmp_path / f"{index}.png").write_bytes(image_bytes())
        (tmp_path / f"{index}.txt").write_text("a photo")
    loader = BatchLoader(folder_pairs(tmp_path), TRANSFORM, tokenizer, 2)
    batches = iter(loader)
    next(batches)
    os.remove(tmp_path / "3.png")
    os.remove(tmp_path / "4.txt")
    assert [batch.batch_size for batch in batches] == [2]
    assert loader.skips.names == {"missing file": ["3.png"], "empty caption": ["4.png"]}


@pytest.mark.parametrize("num_threads", [0, 2])
def test_batch_loader_without_a_batch_says_why(bad_images, pairs, tokenizer, num_threads):
    bad = [ImageTextPair(bad_images["empty"], "a photo", "x.png")]
    loader = BatchLoader(bad, TRANSFORM, tokenizer, 2, num_threads=num_threads)
    message = r"a list of 1 pairs gives no batch: 0 good pairs for batch_size=2, .* Skipped 1: 1 broken image \(x.png\)"
    with pytest.raises(ValueError, match=message):
        list(loader)
    with pytest.raises(ValueError, match="3 good pairs for batch_size=4, drop_last=True"):
        list(BatchLoader(pairs[:3], TRANSFORM, tokenizer, 4, drop_last=True).steps(5))


def test_batch_loader_passes_errors_of_a_tokenizer_on(pairs):
    class Broken:
        def encode(self, captions, max_length):
            raise RuntimeError("not the data's fault")

    with pytest.raises(RuntimeError, match="not the data's fault"):
        list(BatchLoader(pairs, TRANSFORM, Broken(), 4, num_threads=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; received 0"),
        ({"max_length": 1}, "max_length must be at least 2; received 1"),
        ({"seed": -1}, "seed must be at least 0; received -1"),
        ({"num_threads": -1}, "num_threads must not be negative; received -1"),
        ({"rank": 2, "world_size": 2}, r"rank must lie in \[0, world_size\); received rank=2, world_size=2"),
    ],
)
def test_batch_loader_errors(pairs, tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        BatchLoader(pairs, TRANSFORM, tokenizer, **{"batch_size": 4, **arguments})
