"""Writing and ranking captions with BLIP, CoCa and BEiT-3: greedy, beams, sampling; every image is encoded and projected once."""

from vlp_fast.generation.decoders import Beit3Decoder, BlipDecoder, CocaDecoder, Decoder, Texts, Writing
from vlp_fast.generation.generate import Captions, generate
from vlp_fast.generation.ranking import Ranking, rank_captions

__all__ = [
    "Beit3Decoder",
    "BlipDecoder",
    "Captions",
    "CocaDecoder",
    "Decoder",
    "Ranking",
    "Texts",
    "Writing",
    "generate",
    "rank_captions",
]
