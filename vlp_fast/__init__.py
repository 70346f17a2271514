"""Fast vision-language pretraining: packed rows, plans, Triton kernels, and BLIP, CoCa, BEiT-3, ALBEF and VLMo built from them."""

from vlp_fast._version import __version__
from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.segments import Segments

__all__ = ["AttentionPlan", "Segments", "__version__"]
