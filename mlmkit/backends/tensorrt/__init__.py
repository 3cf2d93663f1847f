"""Runs TensorRT plans, with TensorRT 10.13 and later or TensorRT for RTX.

`backend` checks and loads a plan, `batch_splitting` cuts a batch into parts that a profile holds, `execution_contexts`
runs a part on the memory and streams of `cuda`. `mlmkit.export` needs `bindings` and `rtx` only.
"""
