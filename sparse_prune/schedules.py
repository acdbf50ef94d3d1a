"""How the density falls while a model trains: pure functions of progress, and a validated schedule over steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .errors import SparsePruneError
from .masks import check_density


def oneshot(progress: float, density: float) -> float:
    """The final density at once: 1 at progress 0, `density` for progress in (0, 1]."""
    return 1.0 if progress <= 0.0 else density


def linear(progress: float, density: float) -> float:
    """1 + (density - 1) * progress, for progress in [0, 1]."""
    return 1.0 + (density - 1.0) * progress


def cubic(progress: float, density: float) -> float:
    """density + (1 - density) * (1 - progress)^3: fast while much is redundant, slow near the end (Zhu & Gupta 2017)."""
    return density + (1.0 - density) * (1.0 - progress) ** 3


def iterative(progress: float, density: float, rounds: int) -> float:
    """density^(i / rounds) in round i = ceil(progress * rounds): each round keeps the same share of what is left.

    Frankle & Carbin 2019. Round i begins just after progress (i - 1) / rounds, so that every round is followed by training.
    """
    return density ** (math.ceil(progress * rounds) / rounds)


SCHEDULES = ("oneshot", "linear", "cubic", "iterative")


@dataclass(frozen=True)
class Schedule:
    """Density at each training step.

    kind         "oneshot", "linear", "cubic" or "iterative"
    density      final kept fraction, in (0, 1]
    total_steps  training steps in all
    warmup       steps at the start that prune nothing
    cooldown     steps at the end that keep the final masks, for the weights to settle
    rounds       how often "iterative" prunes

    Raises SparsePruneError when a field is out of its range or warm-up and cool-down leave no step to prune in.
    """

    kind: str
    density: float
    total_steps: int
    warmup: int = 0
    cooldown: int = 0
    rounds: int = 5

    def __post_init__(self) -> None:
        if self.kind not in SCHEDULES:
            raise SparsePruneError("schedule", f"one of {', '.join(SCHEDULES)}", self.kind, "choose one of these")
        check_density(self.density)
        for name, least in (("total_steps", 1), ("warmup", 0), ("cooldown", 0), ("rounds", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise SparsePruneError(name, f"an integer of at least {least}", value, "count it in optimizer steps")
        if self.warmup + self.cooldown >= self.total_steps:
            raise SparsePruneError(
                "warmup + cooldown",
                f"less than total_steps={self.total_steps}",
                self.warmup + self.cooldown,
                "train longer or shorten them, so that a step is left to prune in",
            )

    @property
    def end(self) -> int:
        """The step from which on the density is final."""
        return self.total_steps - self.cooldown

    def density_at(self, step: int) -> float:
        """Kept fraction after `step` optimizer steps: 1.0 up to the warm-up, `density` from `end` on, falling between."""
        if step <= self.warmup:
            return 1.0
        if step >= self.end:
            return self.density
        progress = (step - self.warmup) / (self.end - self.warmup)
        if self.kind == "iterative":
            return iterative(progress, self.density, self.rounds)
        return {"oneshot": oneshot, "linear": linear, "cubic": cubic}[self.kind](progress, self.density)

    def progress_at(self, step: int) -> float:
        """Share of the pruning done after `step` steps, from 0 to 1: (1 - density_at) / (1 - density); 1 if density is 1."""
        return (1.0 - self.density_at(step)) / (1.0 - self.density) if self.density < 1.0 else 1.0
