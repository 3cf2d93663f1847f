"""A checkpoint on torch: the reference that every other backend is held to."""

from hashlib import sha256

import torch
from transformers import PreTrainedModel

from mlmkit.backends import Batch, ModelInfo, Predicted, Scored
from mlmkit.errors import UserError
from mlmkit.model import TOP_K, MaskedLM, Scores, load_pretrained, sees_padding
from mlmkit.tokenizer import Tokenizer


class TorchBackend:
    """`MaskedLM` in float32, with TF32 off: what it says is what others are compared with."""

    name = "torch"

    def __init__(self, path: str, device: str = "auto") -> None:
        self.model, self.tokenizer = load_pretrained(path)
        self.device = pick_device(device)
        self.info = model_info(path, self.model, self.tokenizer)
        self.model.to(self.device)
        torch.set_float32_matmul_precision("highest")

    def score(self, batch: Batch) -> Scored:
        """See `Backend`."""
        scores = self._run(batch, top_k=0)
        return Scored(scores.log_prob.cpu().numpy(), scores.rank.cpu().numpy())

    def predict(self, batch: Batch, *, at_least: int | None = None) -> Predicted:
        """See `Backend`."""
        return Predicted(*(output.cpu().numpy() for output in self._run(batch, at_least or self.info.top_k)))

    def _run(self, batch: Batch, top_k: int) -> Scores:
        self.model.top_k = top_k
        with torch.inference_mode():
            return self.model(*(torch.from_numpy(array).to(self.device) for array in batch))


def model_info(path: str, model: MaskedLM, tokenizer: Tokenizer) -> ModelInfo:
    """What `result.json` and the manifest say of a checkpoint."""
    config = model.network.config
    return ModelInfo(
        path=path,
        fingerprint=weights_fingerprint(model.network),
        architecture=config.model_type,
        vocabulary_size=model.vocabulary_size,
        max_length=model.max_length(tokenizer.limit),
        precision="fp32",
        top_k=min(TOP_K, model.vocabulary_size),
        sees_padding=sees_padding(model, tokenizer.pad_id),
    )


def weights_fingerprint(network: PreTrainedModel) -> str:
    """SHA-256 over the weights' names, types, shapes and bytes: the same for a checkpoint wherever it lies."""
    digest = sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data if tensor.ndim else b"")
    return digest.hexdigest()


def pick_device(device: str) -> str:
    """`auto` is CUDA where torch finds it. Raises `UserError` for CUDA where it does not."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("torch finds no CUDA device here: use --device cpu")
    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
