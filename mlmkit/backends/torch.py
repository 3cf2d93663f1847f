"""Runs a checkpoint on torch: the reference that every other backend is compared with."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel

from mlmkit.backends.protocol import Batch, ModelInfo, Scored
from mlmkit.errors import UserError
from mlmkit.model import MaskedLM, sees_padding
from mlmkit.pretrained import load_pretrained
from mlmkit.tokenizer import Tokenizer


class TorchBackend:
    """`MaskedLM` in float32, with TF32 off.

    Raises `UserError` if the checkpoint cannot be loaded or the device is not available.
    """

    name = "torch"
    manifest = None

    def __init__(self, path: str, device: str = "auto", *, trust_remote_code: bool = False) -> None:
        self.model, self.tokenizer = load_pretrained(path, trust_remote_code=trust_remote_code)
        self.device = pick_device(device)
        self.info = model_info(path, self.model, self.tokenizer)
        self.model.to(self.device)
        # A forward pass keeps its positions in the module (`MaskedLM.logits`), so calls cannot overlap.
        self._lock = threading.Lock()

    def score(self, batch: Batch) -> Scored:
        with self._lock, _full_float32(), torch.inference_mode():
            scores = self.model(*(torch.from_numpy(array).to(self.device) for array in batch))
            return Scored(*(output.cpu().numpy() for output in scores))


@contextmanager
def _full_float32() -> Iterator[None]:
    """Multiply matrices and convolve in full float32, then restore the settings of the process."""
    cudnn: Any = torch.backends.cudnn  # its older `allow_tf32` raises if the process has set `conv.fp32_precision`
    before, convolutions = torch.get_float32_matmul_precision(), cudnn.conv.fp32_precision
    torch.set_float32_matmul_precision("highest")
    cudnn.conv.fp32_precision = "ieee"  # otherwise TF32 for the convolutions of ConvBERT and SqueezeBERT
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        cudnn.conv.fp32_precision = convolutions


def model_info(path: str, model: MaskedLM, tokenizer: Tokenizer) -> ModelInfo:
    """The properties of a checkpoint that `result.json` and the manifest record."""
    config = model.network.config
    return ModelInfo(
        path=path,
        fingerprint=weights_fingerprint(model.network),
        architecture=config.model_type,
        vocabulary_size=model.vocabulary_size,
        max_length=model.max_length(tokenizer.limit),
        precision="fp32",
        top_k=model.top_k,
        sees_padding=sees_padding(model, tokenizer.pad_id),
    )


def weights_fingerprint(network: PreTrainedModel) -> str:
    """SHA-256 over names, types, shapes and bytes of the weights, hexadecimal. Does not depend on the file layout."""
    digest = sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def pick_device(device: str) -> str:
    """`cpu` or `cuda`; `auto` is `cuda` if torch finds a device. Raises `UserError` for `cuda` if it does not."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here: use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
