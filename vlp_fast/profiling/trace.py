"""A profile as a Chrome trace, for chrome://tracing and Perfetto."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlp_fast.profiling.rows import StepProfile

__all__ = ["chrome_trace"]

_LANES = {"forward": 1, "backward": 2}


def chrome_trace(profiles: Sequence[StepProfile]) -> dict[str, Any]:
    """The JSON object of a trace: a process per profile, and an event per forward and per backward of a tower's call.

    Time counts operations only, so the gaps are work outside the towers. Where two calls' backwards interleave, their events overlap.

    Raises: ValueError for a profile of the meta device, which has no times.
    """
    events: list[dict[str, Any]] = []
    for process, profile in enumerate(profiles, 1):
        if profile.totals["ms"] is None:
            raise ValueError(
                f"a trace needs times; {profile.title} was profiled on {profile.device} (device cpu or cuda has them)."
            )
        events.append({"name": "process_name", "ph": "M", "pid": process, "tid": 0, "args": {"name": profile.title}})
        events.extend(
            {"name": "thread_name", "ph": "M", "pid": process, "tid": lane, "args": {"name": phase}}
            for phase, lane in _LANES.items()
        )
        for call in profile.calls:
            events.append(
                {
                    "name": f"{call.module} ({call.loss})",
                    "cat": call.phase,
                    "ph": "X",
                    "pid": process,
                    "tid": _LANES[call.phase],
                    "ts": call.start * 1e3,
                    "dur": (call.end - call.start) * 1e3,
                    "args": {
                        "serves": call.serves,
                        "gradient": call.grad,
                        "sequences": call.sequences,
                        "tokens": call.tokens,
                        "gflops": call.gflops,
                    },
                }
            )
    return {"traceEvents": events, "displayTimeUnit": "ms"}
