"""``vlp-fast capfilt``: captions for web images, and which captions describe theirs."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from vlp_fast.capfilt import CapFilt, CapFiltSettings, ResumeError, run_capfilt
from vlp_fast.capfilt.output import Output, open_output
from vlp_fast.cli._output import fail, output_console
from vlp_fast.cli.convert import config_fields
from vlp_fast.data import WordPieceTokenizer, open_pairs
from vlp_fast.models.checkpoints.registry import OWN, load_model
from vlp_fast.ops import packed_weights

__all__ = ["capfilt"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INTERRUPTED = 130  # what a shell reports for Ctrl-C
NAMED = 5  # skipped pairs shown for each reason


def capfilt(
    data: Annotated[str, typer.Argument(help="easy-vqa, a folder, a .json/.jsonl/.csv/.tsv manifest, or tar shards.")],
    captioner: Annotated[Path, typer.Option(metavar="FILE", help="Weights of a Blip or BlipCaptioner.")],
    vocab: Annotated[Path, typer.Option(metavar="FILE", help="The models' WordPiece vocabulary, a piece a line.")],
    out: Annotated[Path, typer.Option(metavar="PLACE", help="A folder, for webdataset shards, or a .jsonl file.")],
    captioner_format: Annotated[str, typer.Option(metavar="NAME", help="Its format, as of convert.")] = OWN,
    captioner_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="config.json beside the weights (hf-blip): what no tensor shows.")
    ] = None,
    filter_file: Annotated[
        Path | None,
        typer.Option("--filter", metavar="FILE", help="Weights of a Blip or BlipRetriever.  [default: the captioner's]"),
    ] = None,
    filter_format: Annotated[
        str | None, typer.Option(metavar="NAME", help="Its format.  [default: the captioner's format]")
    ] = None,
    filter_config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Likewise.  [default: the captioner's, without --filter]")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Paths of DATA are relative to it.  [default: DATA's folder]")] = None,
    limit: Annotated[int | None, typer.Option(help="Take the first so many pairs only.")] = None,
    prompt: Annotated[str, typer.Option(help="What captions begin with; it is cut from them.")] = "a picture of ",
    captions: Annotated[int, typer.Option(help="Synthetic captions per image.")] = 1,
    top_p: Annotated[float, typer.Option(help="Probability of the nucleus that words are drawn from.")] = 0.9,
    repetition_penalty: Annotated[float, typer.Option(help="Of words already in the caption.")] = 1.1,
    min_length: Annotated[int, typer.Option(help="Tokens of a caption, [DEC] and prompt counted.")] = 5,
    max_length: Annotated[int, typer.Option(help="Likewise.")] = 20,
    threshold: Annotated[
        float | None, typer.Option(help="Least probability of a match.  [default: the larger logit decides]")
    ] = None,
    cosine_threshold: Annotated[float | None, typer.Option(help="Least cosine of the features, asked besides.")] = None,
    seed: Annotated[int, typer.Option(help="Of the words drawn.")] = 0,
    batch: Annotated[int, typer.Option(help="Pairs worked on at once.")] = 16,
    shard_size: Annotated[int, typer.Option(help="Pairs of DATA for each shard, and what a kill can cost.")] = 1000,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = None,
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "fp32",
    workers: Annotated[int, typer.Option(help="Threads that read and decode images.")] = 4,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
) -> None:
    """Caption every image, score original and synthetic captions with the filter, and write those that pass.

    A run that was killed goes on when the same command is given again, and leaves the same bytes as one that was not. Other
    settings, models or data are refused. Settings, hashes, versions and commit are written beside the captions: capfilt.json in
    a folder, NAME.capfilt.json for NAME.jsonl.

    \b
    A shard holds KEY.jpg (.png, .webp), the file unchanged, and KEY.json for each caption; a line of .jsonl is such a record
    with "image", a path relative to --root. A record:
      caption, source (original | synthetic), itm (probability of a match), cosine,
      pair (its name in DATA), position (its number in DATA)

    \b
    JSON (schema 1):
      out, provenance   the captions, and the file that says what made them
      pairs, images     pairs of DATA, and those whose image could be read
      original, original_kept, synthetic, synthetic_kept, pairs_kept   captions scored and kept
      chunks            shards
      skipped           [{reason, count, names}]
      root              of a .jsonl: its paths are relative to it
      run               {pairs, seconds} of this call
    """
    torch.set_flush_denormal(True)
    try:
        settings = CapFiltSettings(
            prompt=prompt,
            captions=captions,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            min_length=min_length,
            max_length=max_length,
            threshold=threshold,
            cosine_threshold=cosine_threshold,
            seed=seed,
            batch=batch,
            shard_size=shard_size,
            limit=limit,
        )
        place = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; received {dtype!r}.")
        if workers < 1:
            raise ValueError(f"workers must be at least 1; received {workers}.")
        output = open_output(out)
        if json_file is not None and not json_file.absolute().parent.is_dir():
            raise ValueError(f"--json must name a file in a folder that exists; received {json_file}.")
    except ValueError as error:
        fail("capfilt", error, code=2)
    own = _Weights(captioner, captioner_format, captioner_config)
    other = own if filter_file is None else _Weights(filter_file, captioner_format, None)
    weights = {
        "captioner": own,
        "filter": other._replace(format=filter_format or other.format, config=filter_config or other.config),
    }
    try:
        source = open_pairs(data, root=root)
        tokenizer = WordPieceTokenizer.from_vocab_file(vocab)
        loaded = {spec: spec.load().eval().to(place, DTYPES[dtype]) for spec in dict.fromkeys(weights.values())}
        writer, matcher = (loaded[spec] for spec in weights.values())
        engine = CapFilt(writer, matcher, tokenizer, settings)  # type: ignore[arg-type]  # CapFilt checks what they are
        report = _run(engine, source, output, data, root, weights, vocab, workers)
    except ResumeError as error:
        fail("capfilt", error, code=2)
    except (ValueError, TypeError, OSError, ImportError) as error:
        fail("capfilt", error)
    except KeyboardInterrupt:
        fail("capfilt", f"interrupted; the same command goes on, after the shards in {output.folder}.", INTERRUPTED)
    _print(report, output, output_console())
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if not report["images"]:
        fail("capfilt", f"none of the {report['pairs']} images could be read.")


class _Weights(NamedTuple):
    """A model on disk."""

    path: Path
    format: str
    config: Path | None

    def load(self) -> torch.nn.Module:
        return load_model(
            self.path, self.format, **(config_fields(self.config, self.format) if self.config is not None else {})
        )


def _run(
    engine: CapFilt,
    source: Any,
    output: Output,
    data: str,
    root: Path | None,
    weights: dict[str, _Weights],
    vocab: Path,
    workers: int,
) -> dict[str, Any]:
    files = {"vocab": vocab}
    for name, spec in weights.items():
        files |= {name: spec.path} if spec.config is None else {name: spec.path, f"{name}_config": spec.config}
    hashes = {path: _sha256(path) for path in set(files.values())}
    provenance = {
        "data": data if data.startswith("easy-vqa") else os.path.abspath(os.path.expanduser(data)),
        "root": None if root is None else os.path.abspath(root),
        **{f"{name}_format": spec.format for name, spec in weights.items()},
        **{f"{name}_sha256": hashes[path] for name, path in files.items()},
    }
    notes = {name: str(path) for name, path in files.items()}
    begin, done = time.perf_counter(), []
    with _progress() as show:

        def progress(pairs: int, total: int | None) -> None:
            done.append(pairs)
            show(pairs, total)

        with ExitStack() as blocks:
            # weights stay as they are for the whole run; oneDNN has no layout of its own for fp16
            parameter = next(engine.captioner.parameters())
            if parameter.device.type == "cpu" and parameter.dtype != torch.float16 and torch.backends.mkldnn.is_available():
                for model in {engine.captioner, engine.matcher}:
                    blocks.enter_context(packed_weights(model))
            report = run_capfilt(
                engine, source, output.path, provenance=provenance, notes=notes, workers=workers, progress=progress
            )
    run = {"pairs": done[-1] - done[0] if done else 0, "seconds": round(time.perf_counter() - begin, 3)}
    return {"schema": 1, "out": str(output.path), "provenance": str(output.provenance), **report, "run": run}


@contextmanager
def _progress() -> Iterator[Callable[[int, int | None], None]]:
    """A progress bar on stderr, or nothing where that is no terminal."""
    columns = (TextColumn("pairs"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("pairs", total=None)
        yield lambda pairs, total: bars.update(bar, completed=pairs, total=total)


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu or cuda; received {name!r}.")
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda is not available: torch finds no CUDA device; give --device cpu.")
    return torch.device(name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _print(report: dict[str, Any], output: Output, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("captions", no_wrap=True)
    for name in ("scored", "kept", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("original", "synthetic"):
        scored, kept = report[name], report[f"{name}_kept"]
        table.add_row(name, f"{scored:,}", f"{kept:,}", f"{kept / scored:.1%}" if scored else "-")
    console.print(table)
    run = report["run"]
    speed = f"; this call: {run['pairs']:,} pairs in {run['seconds']:.1f} s" if run["pairs"] else "; all was done before"
    console.print(
        f"{report['pairs']:,} pairs, {report['images']:,} images read, {report['pairs_kept']:,} with a caption kept{speed}"
    )
    for entry in report["skipped"]:
        more = ", ..." if entry["count"] > NAMED else ""
        console.print(f"skipped: {entry['count']:,} {entry['reason']} ({', '.join(entry['names'][:NAMED])}{more})")
    where = f"{report['chunks']:,} shards in {output.path}" if output.keeps_bytes else f"{output.path}, root {report['root']}"
    console.print(f"written: {where}; what made it: {output.provenance}")
