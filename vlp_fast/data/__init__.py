"""From files to packed batches: pairs, images, tokens, masks.

::

    source = open_pairs("easy-vqa")                                    # or a folder, JSON, JSONL, CSV, TSV, tar shards
    tokenizer = WordPieceTokenizer.train((pair.caption for pair in source), vocab_size=512)
    loader = BatchLoader(source, ImageTransform(64, train=True), tokenizer, batch_size=64, shuffle=True)
    for batch in loader.steps(200):
        ...                                                            # batch.images, batch.token_ids, batch.segments()
    print(loader.skips.summary())

A broken image, an empty caption or a missing file is skipped, counted and named in a `SkipReport`; it never ends a run.
"""

from vlp_fast.data.batches import Batch, BatchLoader, collate
from vlp_fast.data.codebook import PatchCodebook
from vlp_fast.data.easy_vqa import easy_vqa_pairs
from vlp_fast.data.images import ImageError, ImageTransform, decode_image
from vlp_fast.data.masking import blockwise_mask, mask_tokens
from vlp_fast.data.pairs import ImageTextPair, ListedPairs, PairSource, RootedPath, SkipReport
from vlp_fast.data.shards import ShardPairs, webdataset_pairs
from vlp_fast.data.sources import folder_pairs, open_pairs
from vlp_fast.data.tokenizer import WordPieceTokenizer, clean_caption

__all__ = [
    "Batch",
    "BatchLoader",
    "ImageError",
    "ImageTextPair",
    "ImageTransform",
    "ListedPairs",
    "PairSource",
    "PatchCodebook",
    "RootedPath",
    "ShardPairs",
    "SkipReport",
    "WordPieceTokenizer",
    "blockwise_mask",
    "clean_caption",
    "collate",
    "decode_image",
    "easy_vqa_pairs",
    "folder_pairs",
    "mask_tokens",
    "open_pairs",
    "webdataset_pairs",
]
