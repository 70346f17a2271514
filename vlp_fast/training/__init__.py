"""Pretraining steps: a model, its passes and its losses, as one module whose forward makes every loss of a step."""

from vlp_fast.training.albef import AlbefInputs, AlbefMomentum, AlbefPretraining
from vlp_fast.training.beit3 import Beit3Inputs, Beit3Pretraining
from vlp_fast.training.beit3_tasks import Beit3Captioning, Beit3Contrast
from vlp_fast.training.blip import BlipMomentum, BlipPretraining
from vlp_fast.training.blip_tasks import captioning_loss, nlvr2_loss, vqa_loss
from vlp_fast.training.coca import CocaPretraining
from vlp_fast.training.coca_palm import CocaPalmPretraining
from vlp_fast.training.graph import GraphedStep
from vlp_fast.training.objective import SCHEDULES, PretrainingObjective
from vlp_fast.training.registry import MODELS, SIZES, build_pretraining, caption_lengths, preset, synthetic_batch
from vlp_fast.training.visual_tokenizer import train_visual_tokenizer, visual_tokenizer_losses
from vlp_fast.training.vlmo import VlmoInputs, VlmoPretraining

__all__ = [
    "MODELS",
    "SCHEDULES",
    "SIZES",
    "AlbefInputs",
    "AlbefMomentum",
    "AlbefPretraining",
    "Beit3Captioning",
    "Beit3Contrast",
    "Beit3Inputs",
    "Beit3Pretraining",
    "BlipMomentum",
    "BlipPretraining",
    "CocaPalmPretraining",
    "CocaPretraining",
    "GraphedStep",
    "PretrainingObjective",
    "VlmoInputs",
    "VlmoPretraining",
    "build_pretraining",
    "caption_lengths",
    "captioning_loss",
    "nlvr2_loss",
    "preset",
    "synthetic_batch",
    "train_visual_tokenizer",
    "visual_tokenizer_losses",
    "vqa_loss",
]
