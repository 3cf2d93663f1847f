"""Age of acquisition: when in its training a model learns a word (Chang and Bergen 2022).

surprisals of a word at checkpoints → `fit_sigmoid` → where the curve crosses the cutoff
"""

import numpy as np
from numpy.typing import NDArray

GRID, ROUNDS, SHRINKAGE = np.linspace(-1.0, 1.0, 21), 8, 0.3  # of the search: the last step is 3e-5 of the range of x
PARAMETERS = 4  # of the curve, so it needs as many checkpoints

Values = NDArray[np.float64]


def age_of_acquisition(x: Values, surprisal: Values, chance: float) -> float:
    """Where the sigmoid fitted to `surprisal` over `x`, `[checkpoints]` each, crosses the cutoff; in the unit of `x`.

    The cutoff is halfway between `chance`, the surprisal of a uniform guess, and the lowest surprisal. NaN if the curve
    crosses it nowhere between the first and the last checkpoint.
    """
    lower, height, middle, width = fit_sigmoid(x, surprisal)
    cutoff = (chance + surprisal.min()) / 2
    with np.errstate(invalid="ignore", divide="ignore"):
        age = middle + width * np.log(height / (cutoff - lower) - 1)
    return float(age) if x.min() <= age <= x.max() else np.nan


def fit_sigmoid(x: Values, y: Values) -> tuple[np.float64, ...]:
    """The falling curve `lower + height / (1 + exp((x - middle) / width))` with the least squared error.

    Returns (lower, height, middle, width). For a given middle and width the other two follow from a linear regression,
    so only these are searched, on a grid that shrinks around its best point. The middle may lie outside the range of x.
    """
    span = np.ptp(x)
    centre, reach = np.array([x.mean(), np.log(span / 10)]), np.array([1.5 * span, np.log(30)])
    best = ()
    for _ in range(ROUNDS):
        middle, width = np.meshgrid(centre[0] + reach[0] * GRID, np.exp(centre[1] + reach[1] * GRID))
        curve = 1 / (1 + np.exp(np.clip((x - middle[..., None]) / width[..., None], -500, 500)))
        mean = curve.mean(axis=-1)
        deviation = curve - mean[..., None]
        covariance, variance = deviation @ y, np.maximum((deviation**2).sum(axis=-1), 1e-12)
        height = np.maximum(covariance, 0) / variance
        at = np.unravel_index(np.argmax(height * covariance), height.shape)  # what the curve explains of the variance
        best = y.mean() - height[at] * mean[at], height[at], middle[at], width[at]
        centre, reach = np.array([middle[at], np.log(width[at])]), SHRINKAGE * reach
    return best
