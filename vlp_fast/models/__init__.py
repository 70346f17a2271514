"""Whole models assembled from the modules: BLIP, CoCa, BEiT-3. Each file reads top to bottom like the paper's figure."""

from vlp_fast.models.beit3 import Beit3, Beit3Config, beit3_preset
from vlp_fast.models.blip import Blip, BlipConfig, blip_preset
from vlp_fast.models.coca import Coca, CocaConfig, coca_preset

__all__ = ["Beit3", "Beit3Config", "Blip", "BlipConfig", "Coca", "CocaConfig", "beit3_preset", "blip_preset", "coca_preset"]
