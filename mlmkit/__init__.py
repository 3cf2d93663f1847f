"""mlmkit: masked language models from text to checkpoint, engine, measurement and use.

From Python: `mlmkit.load`, `mlmkit.evaluate` and `mlmkit.pseudo_log_likelihood`, and `mlmkit.UserError` and
`mlmkit.CheckError`, which they raise.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mlmkit.errors import CheckError, UserError

if TYPE_CHECKING:
    from mlmkit.backends import load
    from mlmkit.eval.api import Evaluation, evaluate, pseudo_log_likelihood

# ONNX Runtime reads this while it is imported. Otherwise it writes a device id and a queue of events into the user's
# cache folder; turning its telemetry off later comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
__all__ = ["CheckError", "Evaluation", "UserError", "evaluate", "load", "pseudo_log_likelihood"]

_HOMES = {
    "load": "mlmkit.backends",
    "Evaluation": "mlmkit.eval.api",
    "evaluate": "mlmkit.eval.api",
    "pseudo_log_likelihood": "mlmkit.eval.api",
}


def __getattr__(name: str) -> Any:
    """Import on first use: `mlmkit --help` must not wait for numpy."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mlmkit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
