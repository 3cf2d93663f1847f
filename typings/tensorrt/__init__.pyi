# Without this, a type checker on a machine without TensorRT takes mlmkit/backends/tensorrt/ for it.
# What mlmkit uses of the real module is checked by tests/test_tensorrt_api.py.
from typing import Any

def __getattr__(name: str) -> Any: ...
