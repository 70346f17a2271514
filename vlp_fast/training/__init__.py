"""Pretraining steps: a model, its passes and its losses, as one module whose forward makes every loss of a step."""

from vlp_fast.training.beit3 import Beit3Inputs, Beit3Pretraining
from vlp_fast.training.blip import BlipMomentum, BlipPretraining
from vlp_fast.training.coca import CocaPretraining
from vlp_fast.training.objective import SCHEDULES, PretrainingObjective
from vlp_fast.training.registry import MODELS, SIZES, build_pretraining, caption_lengths, preset, synthetic_batch

__all__ = [
    "MODELS",
    "SCHEDULES",
    "SIZES",
    "Beit3Inputs",
    "Beit3Pretraining",
    "BlipMomentum",
    "BlipPretraining",
    "CocaPretraining",
    "PretrainingObjective",
    "build_pretraining",
    "caption_lengths",
    "preset",
    "synthetic_batch",
]
