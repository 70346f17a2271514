"""What the pretraining steps of ALBEF and BLIP share: slow copies of encoders, and queues of the features they made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Momentum"]


class Momentum(nn.Module):
    """Slow copies of a model's encoders and a queue of their features: the keys that contrast is made against.

    A subclass makes modules under the names they have in the model, then calls `_start`.

    Buffers: image_queue, text_queue ``[queue_size, embed_dim]``, L2-normalised; queue_position, where the next keys go. No parameter
    here is trained; `update` moves them towards the model, `enqueue` replaces the oldest keys. Neither waits for the device.
    """

    momentum: float
    image_queue: Tensor
    text_queue: Tensor
    queue_position: Tensor

    def _start(self, model: Any) -> None:
        """Copies the weights of `model` and fills the queues with random keys."""
        config = model.config
        self.momentum = config.momentum
        self.requires_grad_(False)
        for name in ("image_queue", "text_queue"):
            queue = nn.functional.normalize(torch.randn(config.queue_size, config.embed_dim), dim=1)
            self.register_buffer(name, queue)
        self.register_buffer("queue_position", torch.zeros((), dtype=torch.int64))
        self.update(model, momentum=0.0)

    @torch.no_grad()
    def update(self, model: nn.Module, momentum: float | None = None) -> None:
        """own = momentum * own + (1 - momentum) * model's, for every parameter, in one fused call per dtype."""
        online = dict(model.named_parameters())
        own: list[Tensor] = []
        other: list[Tensor] = []
        for name, parameter in self.named_parameters():
            source = online[name]
            own.append(parameter)
            # a tower with fewer experts than the model's has the first of them: BLIP's encoder without the decoder
            other.append(source if source.shape == parameter.shape else source[: parameter.shape[0]])
        torch._foreach_lerp_(own, other, 1.0 - (self.momentum if momentum is None else momentum))

    def keys(self, image_features: Tensor, text_features: Tensor) -> tuple[Tensor, Tensor]:
        """Features of this batch, then the queue: ``[batch + queue_size, embed_dim]`` for images and for captions."""
        return (
            torch.cat([image_features, self.image_queue.to(image_features.dtype)]),
            torch.cat([text_features, self.text_queue.to(text_features.dtype)]),
        )

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor) -> None:
        """Replaces the oldest keys by these ``[batch, embed_dim]``; a batch larger than the queue keeps its last rows."""
        size = len(self.image_queue)
        count = min(len(image_features), size)
        rows = (self.queue_position + torch.arange(count, device=self.queue_position.device)) % size
        self.image_queue.index_copy_(0, rows, image_features[-count:].to(self.image_queue.dtype))
        self.text_queue.index_copy_(0, rows, text_features[-count:].to(self.text_queue.dtype))
        self.queue_position.copy_((self.queue_position + count) % size)
