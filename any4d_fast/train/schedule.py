"""What changes with the step: the learning rate and the decay of the weights' average."""

from __future__ import annotations

import math

from .config import ScheduleOptions


def learning_rate_factor(step: int, options: ScheduleOptions) -> float:
    """Share of the peak learning rate at a step, counted from 0.

    Step `warmup` is the first at the peak; the last step of the run has `final`.
    """
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    last = options.steps - 1 - options.warmup
    progress = min(1.0, (step - options.warmup) / last) if last > 0 else 1.0
    return options.final + (1 - options.final) * 0.5 * (1 + math.cos(math.pi * progress))


def ema_decay(step: int, options: ScheduleOptions) -> float:
    """Decay of the average after step `step` (from 0): low at first, so that random weights are soon forgotten."""
    return min(options.ema, (1 + step) / (10 + step))


def step_seed(seed: int, rank: int, step: int) -> int:
    """The seed of what a step draws in one process: nothing but these numbers decides it, so a run can be resumed."""
    # Odd multipliers of 64 bits spread neighbouring numbers (splitmix64, Steele et al., OOPSLA 2014).
    mixed = (seed * 0x9E3779B97F4A7C15 + rank * 0xBF58476D1CE4E5B9 + step * 0x94D049BB133111EB) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (mixed ^ (mixed >> 31)) >> 1
