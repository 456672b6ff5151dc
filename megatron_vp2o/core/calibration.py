"""What a distance between barycenters costs in nats, learnt from the steps of a run.

D, the trust region's distance, has no unit that means anything to the policy: how much a step of D = 0.1 changes what the model
says depends on the model. A run sees pairs of D and of the policy's measured drift (mean |log pi - log pi_actor| of a response
token). Both are 0 where nothing moved, and both are linear in a small step, so a line through the origin joins them. This
project's, not the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass

MIN_PAIRS = 4
"""Pairs before the slope is used."""
LARGEST_DELTA = 2.0
"""Barycenters have at most unit length, so no two are further apart."""


@dataclass
class Calibration:
    """Slope of drift over D by least squares through the origin, in which older pairs count less.

    Attributes:
        product: weighted sum of D * drift.
        square: weighted sum of D^2.
        pairs: how many pairs there were.

    Example:
        >>> calibration = Calibration()
        >>> for distance in (0.1, 0.2, 0.3, 0.4):
        ...     calibration.observe(distance, drift=3.0 * distance)
        >>> round(calibration.delta(nats=0.6, otherwise=1.0), 6)
        0.2
    """

    decay: float = 0.9
    product: float = 0.0
    square: float = 0.0
    pairs: int = 0

    def observe(self, distance: float, drift: float) -> None:
        """Take in a pair. One where D is 0 says nothing of the slope, and one with a number that is not finite nothing at all."""
        if not (0 < distance < float("inf") and 0 <= drift < float("inf")):
            return
        self.product = self.decay * self.product + distance * drift
        self.square = self.decay * self.square + distance * distance
        self.pairs += 1

    @property
    def slope(self) -> float | None:
        """Nats of drift for a D of 1; None before there are MIN_PAIRS pairs, or where the policy never moved."""
        return self.product / self.square if self.pairs >= MIN_PAIRS and self.product > 0 else None

    def delta(self, nats: float, otherwise: float) -> float:
        """The D of a step that costs so many nats, at most LARGEST_DELTA; `otherwise` where the slope is not known yet."""
        slope = self.slope
        return otherwise if slope is None else min(nats / slope, LARGEST_DELTA)
