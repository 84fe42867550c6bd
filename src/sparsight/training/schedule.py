"""The learning rate over a run."""

from __future__ import annotations


def learning_rate_factor(step: int, n_steps: int, warmup: float, decay: float) -> float:
    """Return the share of the peak learning rate that a step uses.

    Args:
        step: number of the step, from 0.
        n_steps: number of steps of the run.
        warmup: share of the run in which the rate rises linearly.
        decay: share of the run, at its end, in which the rate falls linearly towards 0.
    """
    rise, fall = warmup * n_steps, decay * n_steps
    up = min(1.0, (step + 1) / rise) if rise >= 1 else 1.0
    down = min(1.0, (n_steps - step) / fall) if fall >= 1 else 1.0
    return min(up, down)
