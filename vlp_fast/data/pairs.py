"""An image with its caption, the sources they come from, and the count of what had to be left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

from PIL import Image

__all__ = ["ImageSource", "ImageTextPair", "ListedPairs", "PairSource", "RootedPath", "SkipReport"]

MAX_CAPTION_BYTES = 64 * 1024  # of a caption file; what lies beyond is not read


class RootedPath(NamedTuple):
    """An image file that must lie below `root`, symbolic links followed, when it is opened."""

    path: str
    root: str


ImageSource: TypeAlias = "Image.Image | RootedPath | Path | str | bytes"


@dataclass(frozen=True)
class ImageTextPair:
    """One image and one caption.

    Attributes:
        image: a decoded image, or a path, or the bytes of a file, which `ImageTransform` decodes when the pair is used.
        caption: the text, not yet cleaned.
        source: the name under which a `SkipReport` counts the pair.
    """

    image: ImageSource
    caption: str
    source: str


@runtime_checkable
class PairSource(Protocol):
    """Anything that can be iterated over, again and again, for `ImageTextPair`; a list of pairs is one.

    Where a source also has ``len`` and integer indices, `BatchLoader` shuffles it whole; where it has
    ``shuffled(seed) -> Iterator``, that is used; anything else is shuffled through a buffer. What the source itself leaves out
    it counts in an attribute ``skips``, a `SkipReport`, if it has one.
    """

    def __iter__(self) -> Iterator[ImageTextPair]: ...


class SkipReport:
    """What was left out and why: a count per reason, and the first few names of each.

    Attributes:
        counts: reason -> how many.
        names: reason -> the first `keep` names.
    """

    def __init__(self, keep: int = 5) -> None:
        self.keep = keep
        self.counts: dict[str, int] = {}
        self.names: dict[str, list[str]] = {}

    def add(self, reason: str, name: str) -> None:
        """Count one more `name` left out for `reason`."""
        self._add(reason, 1, [name if name.isprintable() else name.encode("unicode_escape").decode()])

    def merge(self, other: SkipReport) -> SkipReport:
        """Add the counts and names of `other` to this report; returns this report."""
        for reason, count in other.counts.items():
            self._add(reason, count, other.names[reason])
        return self

    def _add(self, reason: str, count: int, names: list[str]) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        kept = self.names.setdefault(reason, [])
        kept.extend(names[: self.keep - len(kept)])

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def summary(self) -> str:
        """One sentence: how many were left out, why, and the first names of each reason."""
        if not self.counts:
            return "Nothing was skipped."
        reasons = []
        for reason, count in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            more = ", ..." if count > len(self.names[reason]) else ""
            reasons.append(f"{count} {reason} ({', '.join(self.names[reason])}{more})")
        return f"Skipped {self.total}: {'; '.join(reasons)}."

    def __repr__(self) -> str:
        return f"SkipReport({self.summary()!r})"


class ListedPairs(Sequence[ImageTextPair]):
    """Pairs whose names are all known: a folder or a manifest. Files are opened only when their pair is used.

    Args:
        name: of the source, for messages.
        entries: (image path relative to `root` or absolute, caption) of each pair.
        root: the folder below which every image file must lie.
        captions_are_files: `entries` hold the paths of caption files instead of captions.
        skips: what was left out while listing.

    Indices are whole numbers; ``len`` counts the pairs listed, of which some may prove broken when they are opened.
    """

    def __init__(
        self,
        name: str,
        entries: list[tuple[str, str]],
        root: Path,
        *,
        captions_are_files: bool = False,
        skips: SkipReport | None = None,
    ) -> None:
        self.name, self.root = name, root
        self.captions_are_files = captions_are_files
        self.skips = SkipReport() if skips is None else skips
        self._entries = entries

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> ImageTextPair:  # type: ignore[override]
        image, caption = self._entries[index]
        if self.captions_are_files:
            caption = _read_caption(self.root / caption)
        return ImageTextPair(RootedPath(str(self.root / image), str(self.root)), caption, image)

    def __repr__(self) -> str:
        return f"ListedPairs({self.name!r}, pairs={len(self)})"


def _read_caption(path: Path) -> str:
    """The text of a caption file; empty, and so counted as an empty caption, where it cannot be read."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_CAPTION_BYTES).decode("utf-8-sig", errors="replace").strip()
    except OSError:
        return ""
