"""Whole models assembled from the modules: BLIP, CoCa, BEiT-3, ALBEF, VLMo. Each file reads top to bottom like the paper's figure."""

from vlp_fast.models.albef import Albef, AlbefConfig, albef_preset
from vlp_fast.models.beit3 import Beit3, Beit3Config, Beit3MaskedModel, beit3_preset
from vlp_fast.models.beit3_scoring import masked_word_scores
from vlp_fast.models.beit3_tasks import (
    Beit3Captioner,
    Beit3Classifier,
    Beit3QuestionAnswering,
    Beit3Reasoning,
    Beit3Retrieval,
)
from vlp_fast.models.blip import Blip, BlipCaptioner, BlipConfig, BlipRetriever, blip_preset
from vlp_fast.models.blip_tasks import BlipNlvr2, BlipVqa
from vlp_fast.models.coca import Coca, CocaConfig, coca_preset
from vlp_fast.models.coca_experts import CocaExperts
from vlp_fast.models.coca_open_clip import OpenClipCoca, OpenClipCocaConfig, open_clip_coca_preset
from vlp_fast.models.coca_palm import CocaPalm, CocaPalmConfig, coca_palm_preset
from vlp_fast.models.visual_tokenizer import VqTokenizer, VqTokenizerConfig
from vlp_fast.models.vlmo import Vlmo, VlmoConfig, vlmo_preset

__all__ = [
    "Albef",
    "AlbefConfig",
    "Beit3",
    "Beit3Captioner",
    "Beit3Classifier",
    "Beit3Config",
    "Beit3MaskedModel",
    "Beit3QuestionAnswering",
    "Beit3Reasoning",
    "Beit3Retrieval",
    "Blip",
    "BlipCaptioner",
    "BlipConfig",
    "BlipNlvr2",
    "BlipRetriever",
    "BlipVqa",
    "Coca",
    "CocaConfig",
    "CocaExperts",
    "CocaPalm",
    "CocaPalmConfig",
    "OpenClipCoca",
    "OpenClipCocaConfig",
    "Vlmo",
    "VlmoConfig",
    "VqTokenizer",
    "VqTokenizerConfig",
    "albef_preset",
    "beit3_preset",
    "blip_preset",
    "coca_palm_preset",
    "coca_preset",
    "masked_word_scores",
    "open_clip_coca_preset",
    "vlmo_preset",
]
