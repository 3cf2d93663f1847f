"""Splits of the scored tokens: by treatment, frequency, word or subword, position and length.

A split is a function of the rows of `tokens.parquet`, so that evaluation, report and comparison cut alike.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

EDGES = (8, 16, 32, 64, 128, 256, 512)
BANDS = ("0-7", "8-15", "16-31", "32-63", "64-127", "128-255", "256-511", "512+")


@dataclass(frozen=True)
class Split:
    """`codes` maps token rows and the mask id to an index into `labels`, `[scored]`."""

    name: str
    labels: tuple[str, ...]
    codes: Callable[[pa.Table, int], NDArray[np.int64]]


def _treatment(tokens: pa.Table, mask_id: int) -> NDArray[np.int64]:
    """By what the model saw: a random token that happens to be the original counts as kept."""
    shown, original = tokens["input_id"].to_numpy(), tokens["token_id"].to_numpy()
    return np.select([shown == mask_id, shown != original], [0, 1], 2)


def _frequency(tokens: pa.Table, _: int) -> NDArray[np.int64]:
    return np.searchsorted([2, 10, 100, 1000, 10000], tokens["frequency"].to_numpy(), side="right")


def _piece(tokens: pa.Table, _: int) -> NDArray[np.int64]:
    return tokens["piece"].to_numpy().astype(np.int64)


def _band(column: str) -> Callable[[pa.Table, int], NDArray[np.int64]]:
    return lambda tokens, _: np.searchsorted(EDGES, tokens[column].to_numpy(), side="right")


SPLITS = (
    Split("treatment", ("masked", "random", "kept"), _treatment),
    Split("frequency", ("1", "2-9", "10-99", "100-999", "1000-9999", "10000+"), _frequency),
    Split("piece", ("whole-word", "first-piece", "later-piece"), _piece),
    Split("position", BANDS, _band("offset")),
    Split("length", BANDS, _band("length")),
)
