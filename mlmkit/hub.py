"""Datasets of the hub, through the `datasets` library: `hub:NAME[:CONFIG][@SPLIT][#FILES]`."""

import contextlib
import logging
import re
from collections.abc import Iterator
from typing import Any

from mlmkit.errors import UserError, first_line, require

HUB = "hub:"


def configurations(location: str) -> list[str]:
    """The dataset. A `*` for the configuration means all of them, sorted by name."""
    if not re.match(f"{HUB}[^@#]+:\\*", location):
        return [location]
    require("train", "datasets")
    import datasets

    with _hub_errors(location):
        names = sorted(datasets.get_dataset_config_names(location.removeprefix(HUB).partition(":*")[0]))
    return [location.replace(":*", f":{name}", 1) for name in names]


def load_hub(location: str) -> Any:
    """Return the `datasets.Dataset` that `hub:NAME[:CONFIG][@SPLIT][#FILES]` names.

    Raises `UserError` if it cannot be loaded or `datasets` is not installed.
    """
    require("train", "datasets")
    import datasets

    location, _, files = location.partition("#")
    name, _, split = location.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    split = split or "train"
    with _hub_errors(location):
        return datasets.load_dataset(
            name,
            config or None,
            split=split,
            data_files={split: files} if files else None,
            verification_mode="no_checks" if files else None,  # the dataset card counts the rows of all files
        )


@contextlib.contextmanager
def _hub_errors(location: str) -> Iterator[None]:
    """Turn any error into a one-line `UserError`: datasets raises many kinds (a missing name or split, the network)."""
    import datasets

    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"{location}: cannot be loaded: {type(cause).__name__}: {first_line(cause)}") from None
