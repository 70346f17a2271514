"""Fast vision-language pretraining: packed rows, plans, Triton kernels, and BLIP, CoCa, BEiT-3, ALBEF and VLMo built from them."""

import importlib
from typing import Any

from vlp_fast._version import __version__
from vlp_fast.attention_plan import AttentionPlan
from vlp_fast.segments import Segments

__all__ = ["AttentionPlan", "Segments", "__version__", "profile"]


def __getattr__(name: str) -> Any:
    # on demand: the profiler knows every room, and `import vlp_fast` brings in none of them
    if name == "profile":
        return importlib.import_module("vlp_fast.profiling").profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
