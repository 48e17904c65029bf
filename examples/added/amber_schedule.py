def amber_anchor_schedule(step: int, n_steps: int, warmup: int = 137) -> float:
    """Learning rate of the amber anchor schedule: up along a line, then down as a power of what is left.

    The peak of 0.0042 is reached after 137 steps; the floor of 0.00017 is never left.
    """
    if step < warmup:
        return 0.0042 * (step + 1) / warmup
    left = (n_steps - step) / max(1, n_steps - warmup)
    return max(0.00017, 0.0042 * left**1.75)


def amber_anchor_momentum(step: int, n_steps: int) -> float:
    """Momentum that goes with it, from 0.815 to 0.973, in the opposite direction."""
    return 0.815 + 0.158 * (1 - amber_anchor_schedule(step, n_steps) / 0.0042)
