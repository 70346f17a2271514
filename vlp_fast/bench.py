"""How fast the models are: embedding and whole pretraining steps on real pairs, per backend. Measures; prints nothing.

What is compared is measured in turns (A B A B ...), with the same weights, on the same batches, after warm-up. Batches are read
and moved to the device before, so reading files is not in the numbers. Throughput is that of the median call.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from vlp_fast.data import Batch, BatchLoader, ImageTransform, PatchCodebook, SkipReport, WordPieceTokenizer, open_pairs
from vlp_fast.environment import cuda_report, load_per_core, stamp
from vlp_fast.measuring import Timing, measure, peak_memory, prepare_process
from vlp_fast.ops import BACKENDS, backend_status, default_backend
from vlp_fast.training import MODELS, SIZES, PretrainingObjective, build_pretraining, preset

__all__ = ["Benchmark", "DTYPES", "Settings", "TASKS", "Throughput", "Timing", "measure", "peak_memory", "prepare_process"]

TASKS = ("embed_image", "embed_text", "pretrain_step")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
ROTATION = 4  # different batches that calls take in turns
TOKENIZER_PAIRS = 20_000  # captions from which the vocabulary is learned
VOCABULARY = 30_522  # at most; bert-base-uncased's, so that captions split as they do in training
CODEBOOK_ITERATIONS = 2  # the codebook's quality does not change the cost of a step
OVER = "not measured: the time allowed was over"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        models, sizes: names, as `vlp_fast.training.preset` takes them. backends: of attention; empty: the device's default.
        data: as `vlp_fast.data.open_pairs` takes it. batch: pairs. dtype: "fp32", or "bf16" / "fp16": `torch.autocast` over fp32
        weights. losses: of the pretraining steps; empty: all. steps, seconds, warmup: as in `measure`, for each task. image_size:
        default: the preset's. device: "cpu" or "cuda". seed: of weights, batches and masks.

    Raises:
        ValueError: an unknown name or a number out of range. RuntimeError: the device, the dtype on it, or every backend asked
        for is not available.
    """

    models: tuple[str, ...] = MODELS
    sizes: tuple[str, ...] = ("base",)
    backends: tuple[str, ...] = ()
    data: str = "easy-vqa"
    batch: int = 8
    dtype: str = "fp32"
    losses: tuple[str, ...] = ()
    steps: int = 10
    seconds: float | None = None
    warmup: int = 2
    image_size: int | None = None
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, values, known in (
            ("model", self.models, MODELS),
            ("size", self.sizes, SIZES),
            ("backend", self.backends, BACKENDS),
            ("dtype", (self.dtype,), DTYPES),
            ("device", (self.device,), DEVICES),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise ValueError(f"{argument} must be one of {', '.join(known)}; received {unknown[0]!r}.")
        for argument, number in (("batch", self.batch), ("steps", self.steps), ("image_size", self.image_size)):
            if number is not None and number < 1:
                raise ValueError(f"{argument} must be at least 1; received {number}.")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds must be more than 0; received {self.seconds}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative; received {self.seed}.")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError(f"device 'cuda' is not available: {cuda_report()['reason']}.")
        if self.dtype == "fp16" and self.device == "cpu":
            raise RuntimeError("dtype 'fp16' is not available on the CPU, which has no arithmetic for it; use bf16 or fp32.")
        if self.dtype == "bf16" and self.device == "cuda" and not torch.cuda.is_bf16_supported():
            raise RuntimeError("dtype 'bf16' is not available on this CUDA device; use fp16 or fp32.")
        if not self.runnable and self.backends:
            reasons = "; ".join(f"{name}: {backend_status(name, self.device).reason}" for name in self.backends)
            raise RuntimeError(f"no backend asked for is available on {self.device}: {reasons}.")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The backends, each once, the device's default where none is named."""
        return tuple(dict.fromkeys(self.backends)) or (default_backend(self.device),)

    @property
    def runnable(self) -> tuple[str, ...]:
        """Those of `chosen` that can run on the device."""
        return tuple(name for name in self.chosen if backend_status(name, self.device).available)


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """One task of one model on one backend; numbers are None where it could not be measured, and `note` says why.

    Attributes:
        images_per_second: at the median call; None for texts. tokens_per_second: tokens of captions (special tokens counted once,
        however many passes read them); None for images. ms_*: of a call. steps: calls measured. peak_mb: see `peak_memory`.
    """

    model: str
    size: str
    backend: str
    task: str
    images_per_second: float | None = None
    tokens_per_second: float | None = None
    ms_median: float | None = None
    ms_q1: float | None = None
    ms_q3: float | None = None
    ms_min: float | None = None
    ms_max: float | None = None
    steps: int = 0
    peak_mb: float | None = None
    batch: int
    dtype: str
    image_size: int
    note: str = ""

    @property
    def measured(self) -> bool:
        return self.ms_median is not None


@dataclass
class _Feed:
    """Batches of one image size, for the models that normalise alike."""

    batches: list[Batch]
    codebooks: dict[tuple[int, int], PatchCodebook] = field(default_factory=dict)

    @property
    def tokens(self) -> float:
        """Of a batch's captions, on average."""
        return sum(batch.num_text_tokens for batch in self.batches) / len(self.batches)

    def codebook(self, patch_size: int, num_codes: int, seed: int) -> PatchCodebook:
        """A visual tokenizer of these images, with no more codes than they have patches."""
        images = torch.cat([batch.images for batch in self.batches])
        codes = min(num_codes, len(images) * (images.shape[-1] // patch_size) ** 2)
        if (patch_size, codes) not in self.codebooks:
            generator = torch.Generator().manual_seed(seed)
            self.codebooks[patch_size, codes] = PatchCodebook.fit(images, patch_size, codes, CODEBOOK_ITERATIONS, generator)
        return self.codebooks[patch_size, codes]


class Benchmark:
    """Measures what `settings` ask for; `rows` and `skips` grow while `run` goes on.

    Raises: what `open_pairs` and `WordPieceTokenizer.train` raise, for data that is not there or holds no pair.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.load_per_core = load_per_core()  # of others: nothing has been measured yet
        self.source = open_pairs(settings.data)
        captions = (pair.caption for pair in itertools.islice(self.source, TOKENIZER_PAIRS))
        self.tokenizer = WordPieceTokenizer.train(captions, VOCABULARY)
        self.rows: list[Throughput] = []
        self.skips = SkipReport()
        self._feeds: dict[tuple[int, str], _Feed] = {}

    @property
    def num_rows(self) -> int:
        s = self.settings
        return len(s.models) * len(s.sizes) * len(s.chosen) * len(TASKS)

    def run(self, tick: Callable[[str], None] | None = None, until: float | None = None) -> Iterator[Throughput]:
        """Every row, as soon as it is known.

        Args:
            tick: told what is being done. until: value of `time.monotonic` from which nothing new is begun.

        Raises: ValueError where the data gives no full batch.
        """
        pairs = list(itertools.product(self.settings.sizes, self.settings.models))
        for done, (size, model) in enumerate(pairs):
            # each model may use an equal part of the time that is left
            share = None if until is None else time.monotonic() + (until - time.monotonic()) / (len(pairs) - done)
            for row in self._run_model(model, size, tick or (lambda text: None), math.inf if until is None else until, share):
                self.rows.append(row)
                yield row

    def report(self) -> dict[str, Any]:
        """The documented JSON of ``vlp-fast bench --json``: schema, stamp, rows, and what was skipped in the data."""
        s = self.settings
        feed = next(iter(self._feeds.values()), None)
        about = stamp(
            s.device,
            dtype=s.dtype,
            losses=list(s.losses) or None,
            batch=s.batch,
            seed=s.seed,
            data=s.data,
            pairs=len(feed.batches) * s.batch if feed else 0,
            tokens_per_caption=round(feed.tokens / s.batch, 2) if feed else None,
            float32_matmul_precision=torch.get_float32_matmul_precision(),
            load_per_core=self.load_per_core,
        )
        skipped = [{"reason": r, "count": n, "names": self.skips.names[r]} for r, n in self.skips.counts.items()]
        return {"schema": 1, "stamp": about, "rows": [asdict(row) for row in self.rows], "skipped": skipped}

    def _run_model(
        self, model: str, size: str, tick: Callable[[str], None], until: float, share: float | None
    ) -> Iterator[Throughput]:
        s = self.settings
        try:
            image_size = s.image_size or preset(model, size).image_size
            absent = ""
        except ValueError as error:  # ALBEF has no large model
            image_size, absent = 0, _reason(error)

        def row(task: str, backend: str, **values: Any) -> Throughput:
            known: dict[str, Any] = {"model": model, "size": size, "batch": s.batch, "dtype": s.dtype, "image_size": image_size}
            return Throughput(task=task, backend=backend, **known, **values)

        if absent:
            yield from (row(task, backend, note=absent) for task in TASKS for backend in s.chosen)
            return
        for backend in s.chosen:
            if backend not in s.runnable:
                note = f"unavailable: {backend_status(backend, s.device).reason}"
                yield from (row(task, backend, note=note) for task in TASKS)
        if time.monotonic() > until:
            yield from (row(task, backend, note=OVER) for task in TASKS for backend in s.runnable)
            return
        tick(f"{model} {size}: reading pairs, making weights")
        feed = self._feed(image_size, "inception" if model == "beit3" else "clip")
        try:
            steps = self._objectives(model, size, feed)
        except (ValueError, RuntimeError) as error:
            yield from (row(task, backend, note=_reason(error)) for task in TASKS for backend in s.runnable)
            return
        for task in TASKS:
            if time.monotonic() > until:
                yield from (row(task, backend, note=OVER) for backend in s.runnable)
                continue
            calls: dict[str, Callable[[], object]] = {}
            values: dict[str, dict[str, Any]] = {}
            for backend, objective in steps.items():
                tick(f"{model} {size} {task} {backend}: first call")
                try:
                    calls[backend] = self._call(task, objective, feed)
                    peak, _, own = peak_memory(calls[backend], s.device)
                    values[backend] = {"peak_mb": peak, "note": "" if own else "peak memory is the whole process's so far"}
                except (ValueError, RuntimeError) as error:
                    calls.pop(backend, None)
                    yield row(task, backend, note=_reason(error))
            timings = measure(
                calls,
                steps=s.steps,
                seconds=s.seconds,
                until=share,
                warmup=max(s.warmup - 1, 0),
                device=s.device,
                tick=lambda text, task=task: tick(f"{model} {size} {task}: {text}"),  # type: ignore[misc]
            )
            for backend, timing in timings.items():
                rate = 1e3 / timing.median
                yield row(
                    task,
                    backend,
                    images_per_second=None if task == "embed_text" else s.batch * rate,
                    tokens_per_second=None if task == "embed_image" else feed.tokens * rate,
                    ms_median=timing.median,
                    ms_q1=timing.q1,
                    ms_q3=timing.q3,
                    ms_min=timing.minimum,
                    ms_max=timing.maximum,
                    steps=timing.count,
                    **values[backend],
                )

    def _feed(self, image_size: int, normalization: str) -> _Feed:
        if (image_size, normalization) not in self._feeds:
            s = self.settings
            transform = ImageTransform(image_size, normalization)
            loader = BatchLoader(self.source, transform, self.tokenizer, s.batch, shuffle=True, seed=s.seed, drop_last=True)
            batches = list(itertools.islice(loader.batches(0), ROTATION))
            # every feed reads the same pairs: their broken ones are counted once
            self.skips = loader.skips
            self._feeds[image_size, normalization] = _Feed(batches)
        return self._feeds[image_size, normalization]

    def _objectives(self, model: str, size: str, feed: _Feed) -> dict[str, PretrainingObjective]:
        """One objective per backend; all share the first one's weights."""
        s = self.settings
        changes: dict[str, Any] = {} if s.image_size is None else {"image_size": s.image_size}
        if model == "beit3":
            config = preset(model, size, self.tokenizer, **changes)
            changes["visual_tokenizer"] = feed.codebook(config.patch_size, config.visual_vocab_size, s.seed)
        built: dict[str, PretrainingObjective] = {}
        for backend in s.runnable:
            torch.manual_seed(s.seed)
            with torch.device("meta" if built else s.device):
                objective = build_pretraining(
                    model, size, losses=s.losses or None, tokenizer=self.tokenizer, backend=backend, **changes
                )
            if built:
                first = built[s.runnable[0]]
                objective.load_state_dict(first.state_dict(keep_vars=True), assign=True)
            built[backend] = objective
        return built

    def _call(self, task: str, objective: PretrainingObjective, feed: _Feed) -> Callable[[], object]:
        """One call of a task, on the next batch each time."""
        s = self.settings
        autocast = torch.autocast(s.device, DTYPES[s.dtype], enabled=s.dtype != "fp32")
        model: Any = objective.model
        objective.train(task == "pretrain_step")
        if task == "pretrain_step":
            generator = torch.Generator().manual_seed(s.seed)
            inputs = itertools.cycle([objective.prepare(batch, generator).to(s.device) for batch in feed.batches])

            def step() -> None:
                with autocast:
                    total = objective.total(objective(next(inputs)))
                total.backward()
                objective.zero_grad(set_to_none=True)

            return step
        batches = itertools.cycle([batch.to(s.device) for batch in feed.batches])

        def embed() -> object:
            batch = next(batches)
            with torch.inference_mode(), autocast:
                if task == "embed_image":
                    return model.encode_image(batch.images)
                return model.encode_text(batch.token_ids, batch.segments())

        return embed


def _reason(error: Exception) -> str:
    """Why a row could not be measured, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "unavailable: out of memory on the device; use a smaller batch"
    return f"unavailable: {str(error).strip().partition(chr(10))[0] or type(error).__name__}"
