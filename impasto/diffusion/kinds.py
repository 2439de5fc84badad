"""The words that choose a loss, apart from what computes it: a recipe is checked without torch."""

from __future__ import annotations

from typing import Literal

Kind = Literal["mse", "l1", "huber", "smooth_l1"]
DeltaSchedule = Literal["constant", "exponential", "snr"]
Weighting = Literal["none", "min_snr", "debiased", "p2"]
