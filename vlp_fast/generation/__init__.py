"""Writing and ranking captions and answers with BLIP, CoCa and BEiT-3: greedy, beams, sampling; each image is encoded once."""

from vlp_fast.generation.beit3_decoder import Beit3Decoder
from vlp_fast.generation.decoders import (
    BlipAnswerDecoder,
    BlipDecoder,
    CocaDecoder,
    CocaPalmDecoder,
    Decoder,
    Questions,
    Texts,
    Writing,
)
from vlp_fast.generation.generate import Captions, generate
from vlp_fast.generation.ranking import AnswerRanking, Ranking, rank_answers, rank_captions

__all__ = [
    "AnswerRanking",
    "Beit3Decoder",
    "BlipAnswerDecoder",
    "BlipDecoder",
    "Captions",
    "CocaDecoder",
    "CocaPalmDecoder",
    "Decoder",
    "Questions",
    "Ranking",
    "Texts",
    "Writing",
    "generate",
    "rank_answers",
    "rank_captions",
]
