"""The cache of keys and values: what moves when texts are reordered."""

import torch

from vlp_fast.generation.cache import TextCache
from vlp_fast.segments import Segments


def test_reordering_moves_texts_and_leaves_shared_rows():
    prompts = Segments([1, 2])
    cache = TextCache(prompts, 3, 2, shared=4)
    generator = torch.Generator().manual_seed(0)
    for layer in range(2):
        cache.start(layer, torch.randn(3, 2, 2, 4, generator=generator), torch.randn(8, 2, 2, 4, generator=generator))
    cache.advance()
    for layer in range(2):
        cache.write(layer, torch.randn(6, 2, 2, 4, generator=generator))

    def texts():
        return [
            [cache._buffers[layer][:, :, s : s + n].clone() for s, n in zip(plan.host_starts, plan.host_lengths, strict=True)]
            for layer in range(2)
            for plan in cache.plans
        ]

    before, index = texts(), [2, 0, 0, 3, 5, 4]
    cache.reorder(torch.tensor(index))
    for old, new in zip(before, texts(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old[:2], new[:2], strict=True))
        for slot, parent in enumerate(index):
            assert torch.equal(new[2 + slot], old[2 + parent])
