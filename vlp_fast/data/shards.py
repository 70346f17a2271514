"""Webdataset tars of image-text pairs, read as a stream: nothing is extracted, nothing is unpickled.

``tarfile`` reads the members, so that a member's type and size are checked before a byte of it is read; webdataset expands the
names of shards and groups members into samples. A shard holds ``KEY.jpg`` (or .jpeg, .png, .webp) next to ``KEY.txt`` or
``KEY.json`` with a "caption"; every other member is left out and counted.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vlp_fast.data.pairs import ImageTextPair, SkipReport

__all__ = ["ShardPairs", "webdataset_pairs"]

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp")
CAPTION_KEYS = ("caption", "text", "title")
MAX_MEMBER_BYTES = 64 * 2**20


class ShardPairs:
    """Pairs streamed from tar shards; how many is not known beforehand. Made by `webdataset_pairs`.

    Attributes:
        shards: their paths.
        skips: what the latest pass over the shards left out.
    """

    def __init__(self, name: str, shards: Sequence[Path]) -> None:
        self.name, self.shards = name, tuple(shards)
        self.skips = SkipReport()

    def __iter__(self) -> Iterator[ImageTextPair]:
        return self._pairs(self.shards)

    def shuffled(self, seed: int) -> Iterator[ImageTextPair]:
        """One pass with the shards in an order drawn from `seed`; within a shard the order stays."""
        order = np.random.default_rng(seed).permutation(len(self.shards))
        return self._pairs([self.shards[index] for index in order])

    def _pairs(self, shards: Sequence[Path]) -> Iterator[ImageTextPair]:
        group_by_keys = _webdataset().tariterators.group_by_keys
        skips = self.skips = SkipReport()
        for shard in shards:

            def duplicate(error: Exception, shard: Path = shard, skips: SkipReport = skips) -> bool:
                skips.add("duplicate member", f"{shard.name}: {error.args[0]}")
                return True

            for sample in group_by_keys(_members(shard, skips), handler=duplicate):
                pair = _pair(sample, f"{shard.name}/{sample['__key__']}", skips)
                if pair is not None:
                    yield pair

    def __repr__(self) -> str:
        return f"ShardPairs({self.name!r}, shards={len(self.shards)})"


def webdataset_pairs(shards: str | Path | Sequence[str | Path]) -> ShardPairs:
    """Pairs of webdataset tars.

    Args:
        shards: a path, a brace pattern ("cc3m/{00000..00331}.tar"), or a list of these; local files only.

    Raises:
        ImportError: webdataset, extra ``vlp_fast[data]``, is not installed.
        FileNotFoundError: a shard is missing.
        ValueError: no shard holds a pair.
    """
    patterns = [shards] if isinstance(shards, str | Path) else list(shards)
    expand = _webdataset().shardlists.expand_urls
    paths = [Path(name).expanduser() for pattern in patterns for name in expand(str(pattern))]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards are missing, the first is {missing[0]}.")
    name = str(patterns[0]) if len(patterns) == 1 else f"{len(paths)} shards"
    source = ShardPairs(name, paths)
    if next(iter(source), None) is None:
        raise ValueError(f"{len(paths)} shards ({name}) hold no image-caption pairs. {source.skips.summary()}")
    return source


def _webdataset() -> Any:
    try:
        import webdataset.shardlists
        import webdataset.tariterators
    except ImportError as error:
        raise ImportError("tar shards need webdataset; install it with: pip install 'vlp_fast[data]'.") from error
    return webdataset


def _members(shard: Path, skips: SkipReport) -> Iterator[dict[str, Any]]:
    """The allowed members of one shard as webdataset's ``{"fname", "data", "__url__"}``; a damaged rest is counted once."""
    try:
        with tarfile.open(shard, mode="r|*") as stream:
            for member in stream:
                if member.isreg() and _allowed(member, shard, skips):
                    file = stream.extractfile(member)
                    data = b"" if file is None else file.read()
                    yield {"fname": member.name, "data": data, "__url__": str(shard)}
                stream.members = []  # type: ignore[attr-defined]  # else tarfile remembers every member it has passed
    # tarfile lets errors of the decompressors and of damaged headers through, of many types.
    except Exception as error:
        skips.add("broken shard", f"{shard.name}: {type(error).__name__}: {error}")


def _allowed(member: tarfile.TarInfo, shard: Path, skips: SkipReport) -> bool:
    suffix = Path(member.name).name.partition(".")[2].lower()
    if suffix not in (*IMAGE_MEMBERS, "txt", "json"):
        skips.add("member type not allowed", f"{shard.name}/{member.name}")
    elif member.size > MAX_MEMBER_BYTES:
        skips.add("over-size member", f"{shard.name}/{member.name}")
    else:
        return True
    return False


def _pair(sample: dict[str, Any], name: str, skips: SkipReport) -> ImageTextPair | None:
    image = next((sample[suffix] for suffix in IMAGE_MEMBERS if suffix in sample), None)
    if image is None:
        skips.add("caption without image", name)
    elif "txt" not in sample and "json" not in sample:
        skips.add("image without caption", name)
    else:
        text = sample["txt"].decode("utf-8", errors="replace") if "txt" in sample else _json_caption(sample["json"])
        return ImageTextPair(image, text.strip(), name)
    return None


def _json_caption(data: bytes) -> str:
    """The caption in a .json member; empty, and so counted as an empty caption, where there is none."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError):
        return ""
    found = next((record[key] for key in CAPTION_KEYS if record.get(key)), "") if isinstance(record, dict) else ""
    return found if isinstance(found, str) else ""
