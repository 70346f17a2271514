"""What CapFilt leaves on disk: kept captions in chunks, each whole or not there, and the provenance beside them.

A chunk is written under another name, forced to the disk and renamed; the record of what was counted in it follows in the same way.
A chunk with a record is done, and how far a run has come follows from the records alone: there is no other state to lose.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

try:
    import fcntl
except ImportError:  # no such locks on this system
    fcntl = None  # type: ignore[assignment]

__all__ = ["KeptCaption", "Output", "ResumeError", "open_output"]

SCHEMA = 1  # of the provenance file


class ResumeError(ValueError):
    """What is there was begun otherwise, is no output of CapFilt, or is being written by another process."""


class KeptCaption(NamedTuple):
    """A caption that passed the filter.

    Attributes:
        position: of its pair in the data, from 0. number: 0 for the original caption, from 1 for synthetic ones.
        pair: the pair's name in the data. image: the bytes of the image's file, or its path.
        itm: probability of "matches". cosine: of the contrastive features.
    """

    position: int
    number: int
    pair: str
    image: bytes | str
    caption: str
    itm: float
    cosine: float

    def fields(self) -> dict[str, Any]:
        """What is written beside the image."""
        return {
            "caption": self.caption,
            "source": "synthetic" if self.number else "original",
            "itm": round(self.itm, 6),
            "cosine": round(self.cosine, 6),
            "pair": self.pair,
            "position": self.position,
        }


class Output(ABC):
    """Chunks 0, 1, ... in a folder, a record of each, and a file that says what made them.

    Attributes:
        path: as the user gave it. provenance: the file that holds settings, runs and, when all is done, the report.
    """

    suffix: ClassVar[str]
    keeps_bytes: ClassVar[bool]

    def __init__(self, path: Path, folder: Path, provenance: Path) -> None:
        self.path, self.folder, self.provenance = path, folder, provenance

    @abstractmethod
    def _writing(self, file: BinaryIO) -> AbstractContextManager[Callable[[KeptCaption], None]]:
        """What appends a caption to an open chunk."""

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes out; the system lifts the lock when this one ends, however it ends."""
        self._check_place()
        self.folder.mkdir(parents=True, exist_ok=True)
        if fcntl is None:
            yield
            return
        handle = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise ResumeError(f"another process is writing to {self.path}; let it end, or end it.") from None
        except OSError:
            pass  # a file system without locks
        try:
            yield
        finally:
            os.close(handle)

    def done(self, settings: Mapping[str, Any]) -> dict[str, Any] | None:
        """The report where all was done before, else None.

        Raises: ResumeError: what is there was begun with other settings.
        """
        settings = json.loads(json.dumps(settings))
        provenance = self._read_provenance()
        if provenance is None:
            return None
        begun = provenance["settings"]
        different = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
        if different:
            changes = "; ".join(f"{name} was {begun.get(name)!r} and is {settings.get(name)!r}" for name in different)
            raise ResumeError(
                f"{self.path} was begun with other settings: {changes}. Give those it was begun with, or another place to write to."
            )
        if provenance["report"] is not None:
            if not self._is_whole(provenance["report"]):
                raise ResumeError(
                    f"{self.provenance} says that all was done, but what was written is not all there; remove the rest, or name "
                    "another place to write to."
                )
            self._clear()
        return provenance["report"]

    def enter(self, settings: Mapping[str, Any], run: Mapping[str, Any]) -> None:
        """Enters a run into the provenance, before it writes anything."""
        provenance = self._read_provenance() or {"schema": SCHEMA, "settings": settings, "runs": [], "report": None}
        provenance["runs"].append({**run, "chunks_before": len(self.records())})
        _write(self.provenance, provenance)

    def records(self) -> list[dict[str, Any]]:
        """The records of the chunks that are done: all from the first to the one before the first that is not."""
        found: list[dict[str, Any]] = []
        while self._path(len(found), self.suffix).is_file() and (path := self._path(len(found), ".json")).is_file():
            found.append(json.loads(path.read_text(encoding="utf-8")))
        return found

    @contextmanager
    def chunk(self, index: int, record: Mapping[str, Any]) -> Iterator[Callable[[KeptCaption], None]]:
        """Gives what appends captions to chunk `index`; the chunk, and `record` as it then is, come into being when the block ends."""
        with _whole(self._path(index, self.suffix)) as file, self._writing(file) as add:
            yield add
        _write(self._path(index, ".json"), record)

    def finish(self, report: Mapping[str, Any]) -> None:
        """All chunks are done: the output takes its last shape, and the report enters the provenance."""
        self._join()
        provenance = self._read_provenance()
        assert provenance is not None
        _write(self.provenance, {**provenance, "report": report})
        self._clear()

    def _join(self) -> None:  # noqa: B027
        """Makes one file of all chunks, where the output is one."""

    def _clear(self) -> None:  # noqa: B027
        """Removes what only an unfinished output needs."""

    @abstractmethod
    def _is_whole(self, report: Mapping[str, Any]) -> bool:
        """Whether what a complete run wrote is still there."""

    @abstractmethod
    def _check_place(self) -> None:
        """Raises ResumeError where something else lies at the place to write to."""

    def _path(self, index: int, suffix: str) -> Path:
        return self.folder / f"{index:06d}{suffix}"

    def _read_provenance(self) -> dict[str, Any] | None:
        if not self.provenance.is_file():
            return None
        try:
            found = json.loads(self.provenance.read_text(encoding="utf-8"))
            if found["schema"] == SCHEMA and isinstance(found["settings"], dict):
                return found
        except (ValueError, KeyError, TypeError):
            pass
        raise ResumeError(f"{self.provenance} is no provenance of schema {SCHEMA}, which this version of vlp_fast writes.")


class ShardFolder(Output):
    """Webdataset shards: ``KEY.jpg`` (.png, .webp), the image file unchanged, and ``KEY.json`` for each kept caption."""

    suffix, keeps_bytes = ".tar", True

    def __init__(self, path: Path) -> None:
        super().__init__(path, path, path / "capfilt.json")

    @contextmanager
    def _writing(self, file: BinaryIO) -> Iterator[Callable[[KeptCaption], None]]:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:

            def add(kept: KeptCaption) -> None:
                assert isinstance(kept.image, bytes)
                key = f"{kept.position:09d}-{kept.number}"
                for suffix, data in ((_image_suffix(kept.image), kept.image), ("json", json.dumps(kept.fields()).encode())):
                    # a member's time, owner and mode are TarInfo's constants: the same captions make the same bytes
                    member = tarfile.TarInfo(f"{key}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))

            yield add

    def _is_whole(self, report: Mapping[str, Any]) -> bool:
        return len(self.records()) >= report["chunks"]

    def _check_place(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()) and not self.provenance.is_file():
            names = sorted(entry.name for entry in self.path.iterdir())
            # of a run that was ended while it wrote its first file
            if names != [f"{self.provenance.name}.partial"]:
                raise ResumeError(f"{self.path} holds other files ({names[0]}, ...): name a new or empty folder.")


class JsonLines(Output):
    """One .jsonl file, a line per kept caption with the path of its image; its chunks lie beside it until it is complete."""

    suffix, keeps_bytes = ".jsonl", False

    def __init__(self, path: Path) -> None:
        super().__init__(path, path.with_name(f"{path.name}.parts"), path.with_suffix(".capfilt.json"))

    @contextmanager
    def _writing(self, file: BinaryIO) -> Iterator[Callable[[KeptCaption], None]]:
        def add(kept: KeptCaption) -> None:
            file.write(json.dumps({"image": kept.image, **kept.fields()}).encode() + b"\n")

        yield add

    def _is_whole(self, report: Mapping[str, Any]) -> bool:
        return self.path.is_file()

    def _join(self) -> None:
        with _whole(self.path) as whole:
            for index in range(len(self.records())):
                with self._path(index, self.suffix).open("rb") as part:
                    shutil.copyfileobj(part, whole)

    def _clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_place(self) -> None:
        if self.path.exists() and not self.provenance.is_file():
            raise ResumeError(f"{self.path} exists, and no {self.provenance.name} beside it says that CapFilt wrote it.")


def open_output(path: str | Path) -> Output:
    """Where captions go: a .jsonl file, or a folder of shards. Nothing is created yet.

    Raises: ValueError: a name with another ending of a file, or a file where the folder would be.
    """
    path = Path(path).expanduser()
    if path.suffix == ".jsonl":
        return JsonLines(path)
    if path.suffix in (".json", ".csv", ".tsv", ".tar", ".txt") or path.is_file():
        raise ValueError(f"out must be a folder, for shards, or a .jsonl file; received {path}.")
    return ShardFolder(path)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when the block has ended and its bytes are on the disk, or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    if os.name == "posix":  # the new name is an entry of the folder, which has to reach the disk too
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with _whole(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _image_suffix(data: bytes) -> str:
    """By what the file holds, which its name need not say."""
    return "jpg" if data.startswith(b"\xff\xd8") else "png" if data.startswith(b"\x89PNG") else "webp"
