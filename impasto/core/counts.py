"""Steps as people count them: a whole number of them, or a share of all."""

from __future__ import annotations

import math


def steps_of(count: int | float, total: int) -> int:
    """So many steps out of `total`: a whole number (an int) as it is, a share of them (a float below 1) rounded up."""
    return count if isinstance(count, int) else math.ceil(count * total)


def check_steps(count: int | float | None, what: str = "") -> None:
    """Raises `ValueError` for a float that is no share; `what` is how it is called in front of that."""
    if isinstance(count, float) and count >= 1:
        named = f"{what} of {count} is" if what else "is"
        raise ValueError(f"{named} neither a whole number of steps nor a share below 1")
