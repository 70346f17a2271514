"""``vlp-fast bench``: images and tokens a second, for embedding and for whole pretraining steps."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from vlp_fast.bench import DTYPES, Benchmark, Settings, Throughput, prepare_process
from vlp_fast.cli._output import fail, output_console
from vlp_fast.cli.suites import run_suites
from vlp_fast.ops import BACKENDS
from vlp_fast.training import MODELS, SIZES

__all__ = ["bench", "print_benchmark", "run_with_progress", "warn_if_busy"]

BUSY = 0.7  # load per core from which timings suffer
INTERRUPTED = 130  # what a shell reports for Ctrl-C


def bench(
    context: typer.Context,
    models: Annotated[
        list[str] | None,
        typer.Argument(help=f"Some of {', '.join(MODELS)}; default: all. With --suite: parts of cases' names."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option(
            help="Side by side with published code instead: kernels, embed, steps, generate, memory, scaling or changes; repeatable."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="With --suite: smaller models and fewer calls.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="With --suite: the peak memory of each provider too.")] = False,
    compare: Annotated[
        Path | None, typer.Option(help="With --suite: an earlier report; what moved beyond the spread is named.")
    ] = None,
    blip_source: Annotated[Path | None, typer.Option(help="With --suite: a clone of github.com/salesforce/BLIP.")] = None,
    size: Annotated[list[str] | None, typer.Option(help=f"{', '.join(SIZES)}; repeatable.  [default: base]")] = None,
    data: Annotated[
        str, typer.Option(help="easy-vqa, a folder, a .json/.jsonl/.csv/.tsv manifest, or tar shards.")
    ] = "easy-vqa",
    batch: Annotated[int, typer.Option(help="Image-text pairs in a batch.")] = 8,
    dtype: Annotated[str, typer.Option(help=f"{', '.join(DTYPES)}; the last two are autocast over fp32 weights.")] = "fp32",
    backend: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(BACKENDS)}; repeatable.  [default: the device's, see info]")
    ] = None,
    losses: Annotated[
        str | None, typer.Option(help="Losses of the pretraining steps, such as itc,itm.  [default: all]")
    ] = None,
    steps: Annotated[int, typer.Option(help="Calls to measure of each task.")] = 10,
    seconds: Annotated[float, typer.Option(help="Stop measuring a task after this long, but not before 3 calls.")] = 30.0,
    image_size: Annotated[int | None, typer.Option(help="Side of the images.  [default: 224, ALBEF 256; tiny: 64]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of torch on the CPU.  [default: torch's choice]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.  [default: cuda where there is one]")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, batches and masks.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    png_file: Annotated[Path | None, typer.Option("--png", help="Write a plot (needs matplotlib).")] = None,
) -> None:
    """Measure embedding and pretraining steps (forward, losses, backward) on real images and captions; or a suite, side by side.

    Weights are random. Reading and decoding files is not in the numbers. What cannot run is listed with the reason; the exit
    code is not 0 where nothing was measured.

    \b
    JSON (schema 1):
      stamp    versions, commit, date, device, threads, dtype, losses, batch, seed, data
      rows     [{model, size, backend, task, images_per_second, tokens_per_second, ms_median, ms_q1,
               ms_q3, ms_min, ms_max, steps, peak_mb, batch, dtype, image_size, note}]
      skipped  [{reason, count, names}] of pairs that could not be read

    \b
    A suite runs named cases by every provider that is installed: first checked against each other, then timed in turns. Those absent
    are listed with the reason. With --suite, --seconds is for a case (default: the suite's), and the JSON has schema 2:
      stamp     as above
      ceilings  {gflops_per_second, copy_gb_per_second} of this machine
      rows      [{case, provider, ours, speedup, ms_median, ms_q1, ms_q3, ms_min, ms_max, steps, gflops,
                gflops_per_second, ceiling_share, gb_per_second, copy_share, per_second, unit, peak_mb,
                memory_ratio, rise_mb, rise_ratio}]
      wrong, absent  [{case, provider, reason}]
    """
    if suite:
        _bench_suites(context, suite, models, size, batch, dtype, seconds, threads, device, seed, json_file, png_file)
        return
    try:
        _check_needs_suite(context)
        prepare_process(threads)
        settings = Settings(
            models=tuple(dict.fromkeys(models or MODELS)),
            sizes=tuple(dict.fromkeys(size or ("base",))),
            backends=tuple(backend or ()),
            data=data,
            batch=batch,
            dtype=dtype,
            losses=() if losses is None else tuple(losses.split(",")),
            steps=steps,
            seconds=seconds,
            image_size=image_size,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            seed=seed,
        )
        _check_outputs(json_file, png_file)
    except (ValueError, RuntimeError, OSError) as error:
        fail("bench", error, code=2)
    try:
        benchmark = Benchmark(settings)
        warn_if_busy(benchmark)
        finished = run_with_progress(benchmark)
    except (ValueError, OSError, ImportError) as error:
        fail("bench", error)
    if not any(row.measured for row in benchmark.rows):
        if not finished:
            raise typer.Exit(INTERRUPTED)
        reasons = dict.fromkeys(row.note for row in benchmark.rows)
        fail("bench", f"nothing was measured. {' '.join(sentence.removesuffix('.') + '.' for sentence in reasons)}")
    report = benchmark.report()
    print_benchmark(report, benchmark.rows, output_console())
    if benchmark.skips.total:
        typer.echo(benchmark.skips.summary())
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if png_file is not None:
        from vlp_fast.cli.plots import plot_throughput, save

        save(plot_throughput(report), png_file)
    if not finished:
        raise typer.Exit(INTERRUPTED)


def _given(context: typer.Context, *names: str) -> list[str]:
    """Those options that the command line names."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]


def _check_needs_suite(context: typer.Context) -> None:
    given = _given(context, "quick", "memory", "compare", "blip_source")
    if given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for --suite, which is not given.")


def _bench_suites(
    context: typer.Context,
    suites: list[str],
    models: list[str] | None,
    size: list[str] | None,
    batch: int,
    dtype: str,
    seconds: float,
    threads: int | None,
    device: str | None,
    seed: int,
    json_file: Path | None,
    png_file: Path | None,
) -> None:
    try:
        unfit = _given(context, "data", "backend", "losses", "steps", "image_size")
        if unfit:
            raise ValueError(f"--{unfit[0].replace('_', '-')} is not for --suite, whose cases have their own.")
        if size is not None and len(size) > 1:
            raise ValueError(f"a suite runs at one --size; received {', '.join(size)}.")
        prepare_process(threads)
        options = {
            "device": device or ("cuda" if torch.cuda.is_available() else "cpu"),
            "dtype": dtype,
            "size": size[0] if size else None,
            "batch": batch,
            "seconds": seconds if _given(context, "seconds") else None,
            "only": tuple(models or ()),
            "seed": seed,
            **{name: context.params[name] for name in ("quick", "memory", "blip_source")},
        }
        run_suites(suites, options, json_file, png_file, context.params["compare"])
    except (ValueError, OSError) as error:
        fail("bench", error, code=2)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def _check_outputs(json_file: Path | None, png_file: Path | None) -> None:
    """What would fail after minutes of measuring fails before."""
    for path in (json_file, png_file):
        if path is not None and not path.absolute().parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} in.")
    if png_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError("a plot needs matplotlib, which is not installed (pip install 'vlp_fast[report]').")


def warn_if_busy(benchmark: Benchmark) -> None:
    """Says on stderr that other processes disturb what is going to be measured on the CPU."""
    load = benchmark.load_per_core
    if benchmark.settings.device == "cpu" and load is not None and load > BUSY:
        typer.echo(
            f"vlp-fast bench: other processes keep this machine busy ({load} per core); timings will be slow and uneven. "
            "OMP_WAIT_POLICY=PASSIVE in the environment helps: waiting threads then leave the cores to others.",
            err=True,
        )


def run_with_progress(benchmark: Benchmark, until: float | None = None) -> bool:
    """Runs it with a progress bar on stderr, or silently where that is no terminal; False if it was interrupted."""
    columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(file=sys.stderr)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=benchmark.num_rows)
        try:
            for _ in benchmark.run(lambda text: progress.update(bar, description=text), until):
                progress.advance(bar)
        except KeyboardInterrupt:
            return False
    return True


def print_benchmark(report: dict[str, Any], rows: list[Throughput], console: Console) -> None:
    """The measured rows as a table, then what could not be measured and why."""
    stamp = report["stamp"]
    losses = f"losses {' '.join(stamp['losses'])}, " if stamp["losses"] else ""
    console.print(
        f"{stamp['device_name']}, {stamp['threads']} threads, torch {stamp['torch']}, {stamp['dtype']}, {losses}batch {stamp['batch']},"
        f" {stamp['pairs']} pairs of {stamp['data']}, {stamp['tokens_per_caption']} tokens a caption; medians and quartiles of n calls"
    )
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for name in ("model", "size", "task", "backend"):
        table.add_column(name, no_wrap=True)
    for name in ("images/s", "tokens/s", "median ms", "quartiles", "n", "peak MB"):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        if previous not in (None, (row.model, row.size)):
            table.add_section()
        previous = (row.model, row.size)
        spread, calls = (f"{_number(row.ms_q1)}-{_number(row.ms_q3)}", str(row.steps)) if row.measured else ("-", "-")
        rates = [_number(x) for x in (row.images_per_second, row.tokens_per_second, row.ms_median)]
        peak = "-" if row.peak_mb is None else f"{row.peak_mb:,.0f}"
        table.add_row(row.model, row.size, row.task, row.backend, *rates, spread, calls, peak)
    console.print(table)
    for line in _notes(rows):
        console.print(line)


def _notes(rows: list[Throughput]) -> list[str]:
    """Each reason once, with the rows it holds for."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        if row.note:
            by_note.setdefault(row.note, []).append(f"{row.model} {row.size} {row.task} {row.backend}")
    return [f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''}: {note}" for note, names in by_note.items()]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
