"""Keys and values of the texts being written: one buffer a layer, written in place, read through a `DecodePlan`.

The rows of a head follow one another, so that a step's scores are plain products of matrices, as long as they are.

A text is a slot of fixed capacity. Image rows that share a softmax with the text (BEiT-3) lie once in front of the slots; images that
are read by cross-attention (BLIP, CoCa) lie in buffers of their own. Neither is repeated for the beams of an image.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from vlp_fast.decode_plan import DecodePlan
from vlp_fast.segments import Segments, _to_device

__all__ = ["TextCache", "cached_dtype"]


def cached_dtype(x: Tensor) -> torch.dtype:
    """In which dtype keys and values like x are kept: 16 bits on a CPU become 32, once, in which each step sums its scores there."""
    return torch.float32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else x.dtype


class TextCache:
    """The self-attention cache of ``images * copies`` texts, text ``i * copies + j`` being the j-th of image i.

    Args:
        prompts: the rows with which each image's texts begin. copies: texts of an image. steps: rows that
            each text may grow by. shared: image rows in front of the slots, so many of each image. drafts: rows behind a text that the
            next step writes over.

    Attributes:
        plans: ``plans[d]`` reads each text with its first d drafts (and its image's shared rows), as long as it is now.
    """

    def __init__(self, prompts: Segments, copies: int, steps: int, *, shared: int = 0, drafts: int = 0) -> None:
        self.prompts, self.copies, self.device = prompts, copies, prompts.device
        images, self.rows = len(prompts), len(prompts) * copies
        self.capacity = prompts.max_length + steps + drafts
        self.shared_rows = images * shared
        lengths = np.repeat(np.asarray(prompts.lengths, np.int64), copies)
        starts = self.shared_rows + self.capacity * np.arange(self.rows)
        self.plans = [
            DecodePlan.from_edges(
                [1] * self.rows,
                [*range(0, self.shared_rows, shared or 1), *starts.tolist()],
                [*[shared] * (images if shared else 0), *(lengths + d).tolist()],
                _edges(self.rows, copies, images if shared else 0),
                capacities=[*[shared] * (images if shared else 0), *[self.capacity] * self.rows],
                growing=[*[False] * (images if shared else 0), *[True] * self.rows],
                device=self.device,
            )
            for d in range(drafts + 1)
        ]
        self._next = _to_device(starts + lengths, self.device)  # the row of the buffer that each text writes next
        self._common, self._longest = min(prompts.lengths) if images else 0, prompts.max_length
        self._end = self._longest
        self._prompt_from, self._prompt_to = self._places_of_prompts(starts)
        self._buffers: dict[int, Tensor] = {}  # of each layer, [2, heads, rows, head_dim]
        self._slots: dict[int, Tensor] = {}  # views of them, [2, heads, texts, capacity, head_dim]

    def _places_of_prompts(self, starts: np.ndarray) -> tuple[Tensor, Tensor]:
        """Rows of the packed prompts, for every copy, and the rows of the buffer where they go."""
        chosen = [row // self.copies for row in range(self.rows)]
        rows, taken = self.prompts.take(chosen)
        shift = np.repeat(starts - taken.host_offsets[:-1], np.asarray(taken.lengths, np.int64))
        return rows, _to_device(np.arange(taken.rows) + shift, self.device)

    def start(self, layer: int, kv: Tensor, shared: Tensor | None = None) -> None:
        """Keys and values ``[rows, 2, heads, head_dim]`` of the packed prompts, and those of the images' shared rows."""
        rows, (_, two, heads, width) = self.shared_rows + self.rows * self.capacity, kv.shape
        self._buffers[layer] = kv.new_empty(two, heads, rows, width, dtype=cached_dtype(kv))
        if shared is not None:
            self._buffers[layer][:, :, : self.shared_rows] = shared.permute(1, 2, 0, 3)
        self._slots[layer] = self._buffers[layer][:, :, self.shared_rows :].unflatten(2, (self.rows, self.capacity))
        self._put(layer, self._prompt_to, kv[self._prompt_from])

    @property
    def layers(self) -> Iterable[int]:
        return self._buffers

    def advance(self) -> None:
        """Every text has one row more; `write` says what it holds."""
        for plan in self.plans:
            plan.advance(1)
        self._next.add_(1)
        self._end += 1

    def write(self, layer: int, kv: Tensor, draft: int = 0) -> None:
        """Keys and values ``[texts, 2, heads, head_dim]`` of the newest row of each text, or of a draft behind it."""
        if self._common == self._longest:  # texts grow side by side
            self._slots[layer].select(3, self._end + draft - 1).copy_(kv.permute(1, 2, 0, 3))
        else:
            self._put(layer, self._next + (draft - 1), kv)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The layer's keys and values, ``[buffer_rows, heads, head_dim]`` each; the rows of a head follow one another."""
        k, v = self._buffers[layer].transpose(1, 2).unbind(0)
        return k, v

    def reorder(self, index: Tensor) -> None:
        """Text i goes on as a copy of text ``index[i]`` of the same image. The rows of prompts are the same and stay."""
        for layer in self._buffers:  # a copy of one layer stays in the processor's cache
            grown = self._slots[layer][:, :, :, self._common : self._end]
            grown.copy_(grown.index_select(2, index))

    def _put(self, layer: int, places: Tensor, kv: Tensor) -> None:
        buffer = self._buffers[layer]
        buffer.index_copy_(2, places, kv.permute(1, 2, 0, 3).to(buffer.dtype))


def _edges(rows: int, copies: int, images: int) -> list[tuple[int, int]]:
    """Each text reads its image's shared rows, where there are any, then itself."""
    own = [(row, images + row) for row in range(rows)]
    return own if not images else [edge for row in range(rows) for edge in ((row, row // copies), own[row])]
