"""mlmkit: train, export, evaluate and serve masked language models.

The Python API: `mlmkit.load`, `mlmkit.evaluate` and `mlmkit.pseudo_log_likelihood`. They raise `mlmkit.UserError` and
`mlmkit.CheckError`.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlmkit.errors import CheckError, UserError

if TYPE_CHECKING:
    from mlmkit.backends import load
    from mlmkit.eval.api import Evaluation, evaluate
    from mlmkit.eval.score_texts import pseudo_log_likelihood

# ONNX Runtime reads this on import. Without it, a device id and an event queue are written to the user's cache folder;
# turning telemetry off later is too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["CheckError", "Evaluation", "UserError", "evaluate", "load", "pseudo_log_likelihood"]

_HOMES = {
    "load": "mlmkit.backends",
    "Evaluation": "mlmkit.eval.api",
    "evaluate": "mlmkit.eval.api",
    "pseudo_log_likelihood": "mlmkit.eval.score_texts",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `mlmkit --help` does not wait for numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mlmkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
