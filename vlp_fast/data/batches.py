"""Batches: stacked images and packed captions, collated from pairs, loaded from a source without ever stopping at a bad one."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from vlp_fast.data.images import ImageError, ImageTransform
from vlp_fast.data.pairs import ImageTextPair, PairSource, SkipReport
from vlp_fast.data.tokenizer import clean_caption
from vlp_fast.segments import Segments, _int_array, _to_device

__all__ = ["Batch", "BatchLoader", "collate"]

SHUFFLE_BUFFER = 1024  # pairs held, undecoded, to shuffle a stream
In = TypeVar("In")
Out = TypeVar("Out")


class Encoder(Protocol):
    """What a batch needs of a tokenizer; `WordPieceTokenizer` and any other that has it."""

    def encode(self, captions: Sequence[str], max_length: int) -> list[list[int]]: ...


class Sample(NamedTuple):
    """A pair that could be read, ready to be stacked."""

    image: Tensor
    caption: str


@dataclass(frozen=True, eq=False)
class Batch:
    """Image-text pairs as a model takes them: images stacked, the tokens of all captions packed one after the other.

    Attributes:
        images: float32 ``[batch, 3, image_size, image_size]``.
        token_ids: int64 ``[rows]``, all captions without padding.
        text_lengths: tokens of each caption, on the host; they sum to ``rows``.
        captions: the cleaned texts the tokens stand for.
        image_index: the image that each caption describes, on the host, where an image has several; None: caption i describes image i.

    Raises:
        ValueError: the parts do not describe the same pairs.
    """

    images: Tensor
    token_ids: Tensor
    text_lengths: tuple[int, ...]
    captions: tuple[str, ...]
    image_index: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        described = self.images.shape[0] if self.image_index is None else len(self.image_index)
        counts = (described, len(self.text_lengths), len(self.captions))
        if len(set(counts)) != 1:
            raise ValueError(f"a batch needs as many images as text lengths and captions; received {counts}.")
        if self.image_index is not None and not all(0 <= i < len(self.images) for i in self.image_index):
            raise ValueError(f"image_index must name one of the {len(self.images)} images; received {list(self.image_index)}.")
        if self.token_ids.shape != (sum(self.text_lengths),):
            raise ValueError(
                f"token_ids must be one row per token, [{sum(self.text_lengths)}] by the text lengths; received "
                f"{list(self.token_ids.shape)}."
            )

    @property
    def batch_size(self) -> int:
        return len(self.captions)

    @property
    def num_text_tokens(self) -> int:
        return sum(self.text_lengths)

    def image_of(self) -> list[int]:
        """The image that each caption describes."""
        return list(range(len(self.captions)) if self.image_index is None else self.image_index)

    def of_captions(self, x: Tensor) -> Tensor:
        """Rows of images, ``[images, ...]``, as often as captions describe them: ``[captions, ...]``."""
        return x if self.image_index is None else x[_to_device(_int_array(self.image_index, "image_index"), x.device)]

    def segments(self) -> Segments:
        """The captions as segments of `token_ids`, on the same device."""
        return Segments(self.text_lengths, self.token_ids.device)

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> Batch:
        """The batch on `device`; from pinned memory the copy does not wait."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked host memory (needs CUDA)."""
        return self._each(Tensor.pin_memory)

    def _each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return replace(self, images=function(self.images), token_ids=function(self.token_ids))


def collate(
    pairs: Iterable[ImageTextPair],
    transform: ImageTransform,
    tokenizer: Encoder,
    max_length: int = 30,
    report: SkipReport | None = None,
    *,
    clean: Callable[[str], str] = clean_caption,
    generator: torch.Generator | None = None,
) -> Batch:
    """A batch of the given pairs; one that cannot be read is left out and counted, so the batch may be smaller, even empty.

    Args:
        pairs: of any source.
        transform: image -> float32 ``[3, S, S]``.
        tokenizer: `WordPieceTokenizer`, or anything with its `encode`.
        max_length: most tokens of a caption, [CLS] and [SEP] included.
        report: where to count what was left out.
        clean: applied to every caption before it is tokenized; `str.strip` keeps it as it is.
        generator: draws the transform's random crops and flips.
    """
    samples = []
    for pair in pairs:
        try:
            samples.append(_sample(pair, transform, clean, generator))
        except ImageError as error:
            if report is not None:
                report.add(error.reason, pair.source)
    return _assemble(samples, transform, tokenizer, max_length)


class BatchLoader:
    """Batches of a source, in a fixed order given the seed, each full: a pair that cannot be read is replaced by the next.

    Iterating passes over the source once; the next iteration is the next pass, shuffled and augmented differently. Each pass is
    a function of (`seed`, number of the pass) only, so `batches(epoch)` repeats it, whatever `num_threads` is.

    Args:
        source: a `PairSource`: what `open_pairs` returns, or a list of pairs.
        transform, tokenizer, max_length, clean: as in `collate`.
        batch_size: pairs in a batch.
        shuffle: a new order every pass: all of a source with a length; of a stream shards, and pairs through a buffer of 1,024.
        seed: of the order and of the transform's random crops.
        drop_last: leave out a last batch with fewer pairs.
        num_threads: threads that decode ahead of the caller, one batch at least; 0 decodes when a batch is asked for.
        rank, world_size: of this process; it takes every `world_size`-th pair. Processes may find different numbers of broken
            pairs and so make different numbers of batches in a pass: take `steps` where all must make equally many.

    Attributes:
        skips: what the latest pass has left out so far, and what the source itself left out.
        epoch: number of the pass that the next iteration makes.
        num_batches: batches of a pass if no pair is broken; None for a stream.

    Raises:
        ValueError: a size or number that makes no sense; when a pass is over and made no batch at all, so that a training loop
            cannot spin on an empty source.
    """

    def __init__(
        self,
        source: PairSource | Sequence[ImageTextPair],
        transform: ImageTransform,
        tokenizer: Encoder,
        batch_size: int,
        *,
        max_length: int = 30,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_threads: int = 0,
        clean: Callable[[str], str] = clean_caption,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("max_length", max_length, 2), ("seed", seed, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}; received {value}.")
        if num_threads < 0:
            raise ValueError(f"num_threads must not be negative; received {num_threads}.")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must lie in [0, world_size); received rank={rank}, world_size={world_size}.")
        self.source: Any = source
        self.transform, self.tokenizer, self.clean = transform, tokenizer, clean
        self.batch_size, self.max_length = batch_size, max_length
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self.num_threads, self.rank, self.world_size = num_threads, rank, world_size
        self.epoch = 0
        self._skips = SkipReport()

    def __iter__(self) -> Iterator[Batch]:
        self.epoch += 1
        return self.batches(self.epoch - 1)

    def batches(self, epoch: int) -> Iterator[Batch]:
        """The batches of pass number `epoch`, always the same."""
        skips = self._skips = SkipReport()
        samples, made = self._samples(epoch, skips), 0
        while chunk := list(itertools.islice(samples, self.batch_size)):
            if len(chunk) < self.batch_size and self.drop_last:
                break
            yield _assemble(chunk, self.transform, self.tokenizer, self.max_length)
            made += 1
        if not made:
            name = f"a list of {len(self.source)} pairs" if isinstance(self.source, list) else repr(self.source)
            raise ValueError(
                f"{name} gives no batch: {len(chunk)} good pairs for batch_size={self.batch_size}, drop_last={self.drop_last}, "
                f"rank {self.rank} of {self.world_size}. {self.skips.summary()}"
            )

    def steps(self, num_steps: int) -> Iterator[Batch]:
        """Exactly `num_steps` batches, over as many passes as that takes."""
        endless = itertools.chain.from_iterable(iter(self) for _ in itertools.count())
        return itertools.islice(endless, num_steps)

    @property
    def num_batches(self) -> int | None:
        if not hasattr(self.source, "__len__"):
            return None
        pairs = len(range(self.rank, len(self.source), self.world_size))
        return pairs // self.batch_size if self.drop_last else -(-pairs // self.batch_size)

    @property
    def skips(self) -> SkipReport:
        of_source = getattr(self.source, "skips", None) or SkipReport()
        return SkipReport().merge(of_source).merge(self._skips)

    def _samples(self, epoch: int, skips: SkipReport) -> Iterator[Sample]:
        """The good pairs of a pass that are this process's, decoded."""
        jobs = itertools.islice(enumerate(self._ordered(epoch)), self.rank, None, self.world_size)

        def load(job: tuple[int, ImageTextPair]) -> Sample | tuple[str, str]:
            position, pair = job
            try:
                return _sample(pair, self.transform, self.clean, self._generator(epoch, position))
            except ImageError as error:
                return error.reason, pair.source

        if self.num_threads:
            results = _threaded_map(load, jobs, self.num_threads, self.batch_size + self.num_threads)
        else:
            results = map(load, jobs)
        for result in results:
            if isinstance(result, Sample):
                yield result
            else:
                skips.add(*result)

    def _generator(self, epoch: int, position: int) -> torch.Generator | None:
        """Every pair its own random numbers, so that they do not depend on who is decoded first."""
        if not self.transform.train:
            return None
        state = np.random.SeedSequence([self.seed, epoch, position]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(state[0]) << 31 | int(state[1]) >> 1)

    def _ordered(self, epoch: int) -> Iterator[ImageTextPair]:
        if not self.shuffle:
            return iter(self.source)
        rng = np.random.default_rng([self.seed, epoch])
        if hasattr(self.source, "__len__") and hasattr(self.source, "__getitem__"):
            return (self.source[int(index)] for index in rng.permutation(len(self.source)))
        if hasattr(self.source, "shuffled"):
            return _through_buffer(self.source.shuffled(int(rng.integers(2**31))), rng)
        return _through_buffer(iter(self.source), rng)


def _sample(
    pair: ImageTextPair, transform: ImageTransform, clean: Callable[[str], str], generator: torch.Generator | None
) -> Sample:
    """A pair cleaned and decoded; ImageError, with the reason, where that cannot be done."""
    # Half a surrogate pair, which JSON can spell, is no text to a tokenizer.
    caption = clean(pair.caption.encode("utf-8", "replace").decode("utf-8"))
    if not caption:
        raise ImageError("empty caption", pair.source)
    return Sample(transform(pair.image, generator), caption)


def _assemble(samples: Sequence[Sample], transform: ImageTransform, tokenizer: Encoder, max_length: int) -> Batch:
    size = transform.image_size
    captions = tuple(sample.caption for sample in samples)
    token_ids = tokenizer.encode(captions, max_length)
    return Batch(
        images=torch.stack([sample.image for sample in samples]) if samples else torch.zeros(0, 3, size, size),
        token_ids=torch.tensor([token for caption in token_ids for token in caption], dtype=torch.int64),
        text_lengths=tuple(len(caption) for caption in token_ids),
        captions=captions,
    )


def _threaded_map(function: Callable[[In], Out], items: Iterator[In], num_threads: int, ahead: int) -> Iterator[Out]:
    """`map` in order, with up to `ahead` items in work before they are asked for."""
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="vlp_fast-data")
    try:
        waiting: deque[Future[Out]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _through_buffer(pairs: Iterator[ImageTextPair], rng: np.random.Generator) -> Iterator[ImageTextPair]:
    """A stream in random order within a window: each pair drawn makes room for the next."""
    held = list(itertools.islice(pairs, SHUFFLE_BUFFER))
    for pair in pairs:
        index = int(rng.integers(len(held)))
        held[index], pair = pair, held[index]
        yield pair
    yield from (held[int(index)] for index in rng.permutation(len(held)))
