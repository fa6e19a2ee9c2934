"""Which steps are looked at: densely at first, then at growing intervals, within a share of the time.

A look reads tensors on both sides of a step and costs a good part of a short one. Each interval is chosen so that what
happens every tenth or sixteenth step is met soon, whichever of them it is.
"""

from __future__ import annotations

from collections import Counter
from random import Random
from time import perf_counter

DENSE = 8  # steps that are all looked at
SHARE = 0.003  # of the loop's time that looks may take
ALLOWANCE_S = 0.02  # which looks in the first steps may take beyond it
EARLY_GAPS = ((64, 2, 6), (256, 4, 12))  # up to a step: from how many steps to how many lie between two looks
PERIODS = (16, 12, 10)  # of steps, and their divisors, in which something may happen
LEAST = 8  # mean number of steps between two looks after those


class LookSchedule:
    """Says of each step whether it is looked at.

    Args: every: at least one step in so many is looked at, whatever it costs.
    """

    def __init__(self, every: int) -> None:
        self.every, self.random = every, Random(0)
        self.next, self.looks = 0, 0
        self.met: Counter[tuple[int, int]] = Counter()  # looks by period and the place in it
        self.spent_s, self.look_s, self.step_s = 0.0, 0.0, 0.0  # in all; the last look's, and the last steps' mean
        self.began = self.last = perf_counter()
        self.last_step = 0

    def due(self, step: int) -> bool:
        return step >= self.next

    def finish_look(self, step: int, cost_s: float) -> None:
        """After a look at `step`, which took `cost_s` of the processor's time: says when the next one is."""
        now = perf_counter()
        self.step_s = max(0.0, now - self.last - cost_s) / max(1, step - self.last_step)
        self.last, self.last_step, self.look_s = now, step, cost_s
        self.looks += 1
        self.met.update((period, step % period) for period in PERIODS)
        self.spent_s += cost_s if self.looks > 2 else 0.0  # the first calls prepare what later ones use
        self.next = step + 1 if step + 1 < DENSE else self._choose(step)

    def _choose(self, step: int) -> int:
        """The step after this one, among those at usual distances, whose places have been met least."""
        low, high = (min(self.every, each) for each in self._gaps(step + 1))
        later = self.random.sample(range(step + low, step + high + 1), high - low + 1)  # of equals any
        return min(later, key=lambda each: sum(self.met[period, each % period] for period in PERIODS))

    def _gaps(self, step: int) -> tuple[int, int]:
        """Least and most steps to the next look."""
        affordable = self.spent_s < ALLOWANCE_S + SHARE * (self.last - self.began)
        early = next(((low, high) for until, low, high in EARLY_GAPS if step < until), None)
        if early is None or (not affordable and step >= EARLY_GAPS[0][0]):
            mean = max(LEAST, int(self.look_s / max(SHARE * self.step_s, 1e-9)))
            early = (max(1, mean // 2), mean + mean // 2)
        return early
