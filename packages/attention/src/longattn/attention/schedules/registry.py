"""Schedules by their canonical strings, which is how they cross into ops.

This module imports every schedule of ours, so that each one is registered before a string is read; none of them imports this module.
"""

from __future__ import annotations

import json
from functools import lru_cache

from longattn.attention.schedules.all_gather import AllGather
from longattn.attention.schedules.base import Schedule, build_schedule
from longattn.attention.schedules.local import Local
from longattn.attention.schedules.ring import Ring
from longattn.attention.schedules.ulysses import Ulysses

SCHEDULES = (Local, Ring, AllGather, Ulysses)
"""Ours. A class registers itself when it is defined."""


@lru_cache(maxsize=256)
def parse_schedule(text: str) -> Schedule:
    """The schedule of a canonical string.

    Raises:
        ValueError: no schedule of that name is registered in this process.
    """
    return build_schedule(*json.loads(text))
