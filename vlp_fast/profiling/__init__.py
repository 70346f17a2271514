"""Which loss costs which forward passes: a count of what a pretraining step really ran, ours or anybody's.

Hooks count every call of a tower; every operation's FLOPs (and, on a real device, its time) go to the call or to the loss it runs
for; in the backward they go to the call whose forward made the autograd node. Which losses a call serves is read off the autograd
graph. Nothing is taken from a table of what the model ought to do.
"""

from vlp_fast.profiling.rows import Call, ProfileRow, StepProfile
from vlp_fast.profiling.step import Profile, profile, profile_model, profile_step
from vlp_fast.profiling.table import (
    COLUMNS,
    SUMMARY_COLUMNS,
    TEXT,
    number,
    row_cells,
    shown_columns,
    summary_cells,
    total_cells,
)
from vlp_fast.profiling.trace import chrome_trace

__all__ = [
    "COLUMNS",
    "SUMMARY_COLUMNS",
    "TEXT",
    "Call",
    "Profile",
    "ProfileRow",
    "StepProfile",
    "chrome_trace",
    "number",
    "profile",
    "profile_model",
    "profile_step",
    "row_cells",
    "shown_columns",
    "summary_cells",
    "total_cells",
]
