"""Folders and manifests of image-text pairs, and `open_pairs`, which tells them apart."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vlp_fast.data.easy_vqa import easy_vqa_pairs
from vlp_fast.data.pairs import ListedPairs, PairSource, SkipReport
from vlp_fast.data.shards import webdataset_pairs

__all__ = ["folder_pairs", "open_pairs"]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
MANIFEST_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv")
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")
IMAGE_KEYS = ("image", "filepath", "image_path", "file_name", "path")
CAPTION_KEYS = ("caption", "title", "text")

Record = tuple[str, Any]  # a name for reports, and what stands there


def open_pairs(spec: str | Path, *, root: str | Path | None = None) -> PairSource:
    """The pairs that `spec` names.

    Args:
        spec: "easy-vqa" or "easy-vqa:test" (needs the extra ``vlp_fast[demo]``); tar shards, a brace pattern of them, or a
            folder that holds some (`webdataset_pairs`); a folder of images and captions, or a .json, .jsonl, .csv or .tsv
            manifest (`folder_pairs`).
        root: as in `folder_pairs`.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: there is something, but no pair in it, or of a kind not known.
        ImportError: an extra is needed; the message names it.
    """
    text = os.fspath(spec)
    if text == "easy-vqa" or text.startswith("easy-vqa:"):
        return easy_vqa_pairs(text.partition(":")[2] or "train")
    if text.lower().endswith(SHARD_SUFFIXES):
        return webdataset_pairs(text)
    path = Path(text).expanduser()
    if path.is_dir():
        shards = sorted(str(file) for file in path.iterdir() if file.name.lower().endswith(SHARD_SUFFIXES))
        if shards:
            return webdataset_pairs(shards)
    return folder_pairs(path, root=root)


def folder_pairs(path: str | Path, *, root: str | Path | None = None) -> ListedPairs:
    """Pairs of a folder or of a manifest; files are opened when they are used.

    * A folder: every .jpg, .jpeg, .png and .webp in it and below, with the caption in a .txt of the same stem. A folder without
      such pairs but with a single manifest stands for the manifest.
    * .json: a list of ``{"image": path, "caption": text or list of texts}`` (BLIP, ALBEF); each text makes a pair.
    * .jsonl: one such object a line.
    * .csv, .tsv: a header, then ``filepath`` and ``title`` (open_clip), separated by commas or tabs.

    Also understood are the names filepath, image_path, file_name and path for images, title and text for captions.

    Args:
        path: the folder or manifest.
        root: paths of images are relative to it, and no image outside it is read, symbolic links followed. Default: the folder,
            or the folder of the manifest. Give ``root="/"`` to allow absolute paths to anywhere.

    Raises:
        FileNotFoundError: no such folder or file.
        ValueError: not a known manifest, or no pair in it.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path} to read image-caption pairs from.")
    if path.is_dir():
        return _folder(path, root)
    if path.suffix.lower() not in MANIFEST_SUFFIXES:
        raise ValueError(
            f"pairs are read from a folder, a tar or a {', '.join(MANIFEST_SUFFIXES)} manifest; received the file {path}."
        )
    return _manifest(path, root)


def _folder(folder: Path, root: str | Path | None) -> ListedPairs:
    base = _absolute(folder if root is None else root)
    skips, images = SkipReport(), 0
    entries: list[tuple[str, str]] = []
    manifests: list[Path] = []
    for name in _files(_absolute(folder)):
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in MANIFEST_SUFFIXES:
            manifests.append(Path(name))
        if suffix.lower() not in IMAGE_SUFFIXES:
            continue
        images += 1
        if not os.path.isfile(f"{stem}.txt"):
            skips.add("image without caption", os.path.relpath(name, folder))
        elif not _is_below(name, base):
            skips.add("path outside the data root", name)
        else:
            entries.append((os.path.relpath(name, base), os.path.relpath(f"{stem}.txt", base)))
    if not entries and len(manifests) == 1:
        return _manifest(manifests[0], folder if root is None else root)
    if not entries:
        raise ValueError(
            f"folder {folder} holds no image-caption pairs: {images} images, none with a .txt of the same stem below the data "
            f"root, and {len(manifests)} manifests ({', '.join(MANIFEST_SUFFIXES)}), where one would be read. {skips.summary()}"
        )
    return ListedPairs(str(folder), entries, base, captions_are_files=True, skips=skips)


def _files(folder: Path) -> Iterator[str]:
    """All files below a folder, in a fixed order."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (os.path.join(parent, name) for name in sorted(names))


def _manifest(path: Path, root: str | Path | None) -> ListedPairs:
    base = _absolute(path.parent if root is None else root)
    skips, records = SkipReport(), 0
    entries: list[tuple[str, str]] = []
    for name, record in READERS[path.suffix.lower()](path):
        records += 1
        image, captions = _fields(record)
        if image is None or not captions:
            skips.add("record without image and caption", name)
        elif not _is_below(os.path.join(base, image), base):
            skips.add("path outside the data root", image)
        else:
            kept = [caption.strip() for caption in captions if caption.strip()]
            entries.extend((image, caption) for caption in kept)
            for _ in range(len(captions) - len(kept)):
                skips.add("empty caption", name)
    if not entries:
        raise ValueError(f"manifest {path} holds no image-caption pairs: {records} records. {skips.summary()}")
    return ListedPairs(str(path), entries, base, skips=skips)


def _fields(record: Any) -> tuple[str | None, list[str]]:
    """The image path and the captions of one record of a manifest."""
    if not isinstance(record, dict):
        return None, []
    image = next((record[key] for key in IMAGE_KEYS if record.get(key)), None)
    found: Any = next((record[key] for key in CAPTION_KEYS if record.get(key) is not None), [])
    captions = [found] if isinstance(found, str) else found
    if not isinstance(image, str) or "\0" in image or not isinstance(captions, list):
        return None, []
    return image, [caption for caption in captions if isinstance(caption, str)]


def _json_records(path: Path) -> Iterator[Record]:
    try:
        records = json.loads(path.read_text("utf-8-sig", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    if not isinstance(records, list):
        raise ValueError(
            f'{path} must hold a list of {{"image": ..., "caption": ...}} objects; it holds a {type(records).__name__}.'
        )
    yield from ((f"{path.name} record {index}", record) for index, record in enumerate(records))


def _jsonl_records(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            yield f"{path.name} line {number}", record


def _table_records(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        header = file.readline()
        delimiter = "\t" if path.suffix.lower() == ".tsv" or "\t" in header else ","
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if not set(names) & set(IMAGE_KEYS) or not set(names) & set(CAPTION_KEYS):
            raise ValueError(
                f"the header of {path} must name an image column ({', '.join(IMAGE_KEYS)}) and a caption column "
                f"({', '.join(CAPTION_KEYS)}); it reads {header.strip()[:200]!r}."
            )
        rows = csv.reader(file, delimiter=delimiter)
        for cells in _rows(rows):
            record = None if cells is None else dict(zip(names, cells, strict=False))
            yield f"{path.name} line {rows.line_num + 1}", record


def _rows(rows: Iterator[list[str]]) -> Iterable[list[str] | None]:
    """Rows of a table without blank ones; None for one that cannot be read (a cell beyond csv's size limit)."""
    while True:
        try:
            cells = next(rows)
        except StopIteration:
            return
        except csv.Error:
            yield None
            continue
        if cells:
            yield cells


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _json_records,
    ".jsonl": _jsonl_records,
    ".csv": _table_records,
    ".tsv": _table_records,
}


def _absolute(path: str | Path) -> Path:
    return Path(os.path.abspath(os.path.expanduser(path)))


def _is_below(path: str, base: Path) -> bool:
    """Whether a path, read as text, leads below `base`; links are followed later, when the file is opened."""
    return os.path.normpath(path).startswith(os.path.join(base, ""))
