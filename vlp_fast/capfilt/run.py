"""CapFilt over a whole source: reading ahead, batches, chunks, and going on where an earlier run stopped."""

from __future__ import annotations

import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlp_fast.capfilt.engine import CapFilt, CapFiltSettings
from vlp_fast.capfilt.output import KeptCaption, ResumeError, open_output
from vlp_fast.data import (
    ImageError,
    ImageTextPair,
    ImageTransform,
    PairSource,
    RootedPath,
    SkipReport,
    clean_caption,
    decode_image,
)
from vlp_fast.data.shards import MAX_MEMBER_BYTES
from vlp_fast.environment import stamp

__all__ = ["COUNTS", "run_capfilt"]

NAMES = 1000  # of skipped pairs that a report holds for each reason
COUNTS = ("pairs", "images", "original", "original_kept", "synthetic", "synthetic_kept", "pairs_kept")


class _Loaded(NamedTuple):
    """A pair that was read: views for captioner and filter, and what the output keeps of the image; or why it could not be."""

    pair: ImageTextPair
    views: tuple[Tensor, Tensor] | None = None
    image: bytes | str = b""
    problem: str = ""


class _Batch(NamedTuple):
    """Pairs `position`, `position` + 1, ... of the data."""

    position: int
    pairs: list[_Loaded]


def run_capfilt(
    capfilt: CapFilt,
    source: PairSource | Sequence[ImageTextPair],
    out: str | Path,
    *,
    provenance: Mapping[str, Any] | None = None,
    notes: Mapping[str, Any] | None = None,
    workers: int = 4,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Captions and filters all pairs of a source; continues what an earlier call with the same settings left unfinished.

    Args:
        source: read in its own order, which must stay the same. An image that cannot be read is left out, counted and named; a pair
            with an empty caption gets synthetic ones, and so does each pair of an image that has several.
        out: a folder, for webdataset shards that `open_pairs` reads, or a .jsonl file, where images are files: a path in it is
            relative to the root of the data.
        provenance: what else makes the result, such as hashes of the models' files. It is written beside the result together with the
            settings, and a call that continues must give the same.
        notes: written there too, with versions, commit, date and device, for every call that works on the result; they may differ.
        workers: threads that read and decode images.
        progress: called with (pairs done, pairs in all, None where not known) at the start and after each batch.

    Returns:
        A dict of plain values: counts of `COUNTS`, "chunks", "skipped": [{reason, count, names}], and "root" of a .jsonl's images.

    Raises:
        ResumeError: `out` was begun with other settings or other data, holds something else, or is being written by another process.
        ValueError: decoded images, of which there is no file to keep, or images without a path for a .jsonl.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1; received {workers}.")
    output, s = open_output(out), capfilt.settings
    size = len(source) if isinstance(source, Sequence) else None
    total = size if size is None or s.limit is None else min(size, s.limit)
    settings = {
        **asdict(s),
        **{
            f"{name}_model": type(model).__name__
            for name, model in (("captioner", capfilt.captioner), ("filter", capfilt.matcher))
        },
        "dtype": str(next(capfilt.captioner.parameters()).dtype).removeprefix("torch."),
        "device": capfilt.device.type,
        "pairs": size,
        **(provenance or {}),
    }
    with output.locked():
        report = output.done(settings)
        if report is not None:
            return report
        records = output.records()
        start = sum(record["pairs"] for record in records)
        pairs = _from(source, start, s.limit, records[-1]["last"] if records else None, out)
        output.enter(settings, stamp(capfilt.device, **(notes or {})))
        if progress is not None:
            progress(start, total)

        def load(pair: ImageTextPair) -> _Loaded:
            return _load(pair, capfilt.transforms, output.keeps_bytes)

        batches = _read_ahead(_batches(pairs, start, s), load, workers)
        for index, batches_of_chunk in itertools.groupby(batches, key=lambda batch: batch.position // s.shard_size):
            record: dict[str, Any] = {}
            with output.chunk(index, record) as add:
                counts, skips = Counter(dict.fromkeys(COUNTS, 0)), SkipReport(keep=s.shard_size)
                for batch in batches_of_chunk:
                    for kept in _capfilt_batch(capfilt, batch, counts, skips):
                        add(kept)
                    if progress is not None:
                        progress(batch.position + len(batch.pairs), total)
                record.update(counts, last=batch.pairs[-1].pair.source, skipped=_plain(skips))
        report = _report(output.records(), source)
        if not output.keeps_bytes:
            report["root"] = str(getattr(source, "root", "/"))
        output.finish(report)
        return report


def _capfilt_batch(capfilt: CapFilt, batch: _Batch, counts: Counter[str], skips: SkipReport) -> Iterator[KeptCaption]:
    """The captions of a batch that stay, in order; counts what was read, scored and kept."""
    counts["pairs"] += len(batch.pairs)
    for loaded in batch.pairs:
        if loaded.problem:
            skips.add(loaded.problem, loaded.pair.source)
    good = [(place, loaded) for place, loaded in enumerate(batch.pairs) if loaded.views is not None]
    if not good:
        return
    counts["images"] += len(good)
    views = [loaded.views for _, loaded in good if loaded.views is not None]
    own, matching = (torch.stack([view[i] for view in views]) for i in range(2))
    # an image that cannot be read keeps its row, blank: the words drawn for the others do not depend on it
    images = own.new_zeros(len(batch.pairs), *own.shape[1:])
    images[[place for place, _ in good]] = own
    written = capfilt.captions(images, batch.position)
    texts = []
    for place, loaded in good:
        # half a surrogate pair, which JSON can spell, is no text to a tokenizer
        original = clean_caption(loaded.pair.caption.encode("utf-8", "replace").decode("utf-8"))
        texts.append([(number, text) for number, text in enumerate([original, *written[place]]) if text])
    scores = capfilt.scores(matching, [[text for _, text in found] for found in texts])
    for (place, loaded), found, scored in zip(good, texts, scores, strict=True):
        any_kept = False
        for (number, text), score in zip(found, scored, strict=True):
            kind = "synthetic" if number else "original"
            counts[kind] += 1
            if capfilt.keeps(score):
                any_kept = True
                counts[f"{kind}_kept"] += 1
                caption = text if number else loaded.pair.caption.strip()
                yield KeptCaption(
                    batch.position + place, number, loaded.pair.source, loaded.image, caption, score.itm, score.cosine
                )
        counts["pairs_kept"] += any_kept


def _from(
    source: PairSource | Sequence[ImageTextPair], start: int, limit: int | None, last: str | None, out: str | Path
) -> Iterator[ImageTextPair]:
    """The pairs from number `start` on. The one before must have the name `last`: else the data is not what was begun with."""
    first = max(start - 1, 0)
    pairs: Iterator[ImageTextPair]
    if isinstance(source, Sequence):
        stop = len(source) if limit is None else min(len(source), limit)
        pairs = (source[i] for i in range(first, stop))
    else:
        pairs = itertools.islice(iter(source), first, limit)
    if start:
        before = next(pairs, None)
        found = None if before is None else before.source
        if found != last:
            raise ResumeError(f"{out} was begun with other data: pair {start - 1} was {last!r} and is {found!r}.")
    return pairs


def _batches(
    pairs: Iterator[ImageTextPair], position: int, settings: CapFiltSettings
) -> Iterator[tuple[int, list[ImageTextPair]]]:
    """Runs of pairs with the position of the first; a chunk ends with a batch."""
    while batch := list(itertools.islice(pairs, min(settings.batch, settings.shard_size - position % settings.shard_size))):
        yield position, batch
        position += len(batch)


def _read_ahead(
    batches: Iterable[tuple[int, list[ImageTextPair]]], load: Callable[[ImageTextPair], _Loaded], workers: int
) -> Iterator[_Batch]:
    """The batches, read and decoded by threads, one batch ahead of the caller."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="vlp_fast-capfilt")
    try:
        waiting: deque[tuple[int, Iterator[_Loaded]]] = deque()
        for position, pairs in batches:
            waiting.append((position, pool.map(load, pairs)))
            if len(waiting) > 1:
                ready, loaded = waiting.popleft()
                yield _Batch(ready, list(loaded))
        for ready, loaded in waiting:
            yield _Batch(ready, list(loaded))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _load(pair: ImageTextPair, transforms: tuple[ImageTransform, ...], keeps_bytes: bool) -> _Loaded:
    """A pair's image as both models take it, and what the output keeps of it."""
    if isinstance(pair.image, Image.Image):
        raise ValueError(f"capfilt keeps image files as they are; the image of {pair.source} is already decoded.")
    if not keeps_bytes and isinstance(pair.image, bytes):
        raise ValueError(f"a .jsonl names image files, and {pair.source} is not one: let out be a folder, for shards.")
    try:
        pixels = decode_image(pair.image)
        first = transforms[0](pixels)
        same = transforms[0].image_size == transforms[1].image_size
        views = (first, first if same else transforms[1](pixels))
        return _Loaded(pair, views, _file(pair) if keeps_bytes else _path(pair))
    except ImageError as error:
        return _Loaded(pair, problem=error.reason)


def _file(pair: ImageTextPair) -> bytes:
    """The bytes of an image's file, of a path that `decode_image` has accepted."""
    image = pair.image
    assert not isinstance(image, Image.Image)
    try:
        data = image if isinstance(image, bytes) else Path(image.path if isinstance(image, RootedPath) else image).read_bytes()
    except OSError as error:
        raise ImageError("missing file", f"{error}.") from error
    # `webdataset_pairs` would not read it back
    if len(data) > MAX_MEMBER_BYTES:
        raise ImageError("over-size image", f"{pair.source} is a file of more than {MAX_MEMBER_BYTES} bytes.")
    return data


def _path(pair: ImageTextPair) -> str:
    image = pair.image
    assert not isinstance(image, Image.Image | bytes)
    return os.path.relpath(image.path, image.root) if isinstance(image, RootedPath) else os.path.abspath(image)


def _report(records: Sequence[Mapping[str, Any]], source: object) -> dict[str, Any]:
    """Counts and skips of all chunks, and what the source itself left out."""
    skips = SkipReport(keep=NAMES).merge(getattr(source, "skips", None) or SkipReport())
    for record in records:
        found = SkipReport()
        for entry in record["skipped"]:
            found.counts[entry["reason"]], found.names[entry["reason"]] = entry["count"], entry["names"]
        skips.merge(found)
    counts = {name: sum(record[name] for record in records) for name in COUNTS}
    return {**counts, "chunks": len(records), "skipped": _plain(skips)}


def _plain(skips: SkipReport) -> list[dict[str, Any]]:
    return [{"reason": reason, "count": count, "names": skips.names[reason]} for reason, count in sorted(skips.counts.items())]
