"""`MaskedLM`: one forward for training, evaluation and export, over any masked LM of transformers.

No code for any single architecture: a forward hook on `base_model` gathers the hidden rows at the masked positions
before the vocabulary head runs. Nearly every masked-LM head works on each position alone, so the head's cost falls to
the masked share. Whether this one does is found out when it is wrapped; otherwise the logits are gathered behind it.
"""

import copy
import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_files

from mlmkit.artifact import is_artifact
from mlmkit.bounds import check_folder, check_tokenizer, weight_names
from mlmkit.errors import UserError, first_line, require
from mlmkit.files import locate_model
from mlmkit.loss import linear_cross_entropy_sum
from mlmkit.tokenizer import PANIC, Tokenizer

log = logging.getLogger(__name__)

TOP_K = 100
CONVERT = "python -c \"import transformers as t; t.AutoModelForMaskedLM.from_pretrained('.').save_pretrained('.')\""
OWN_CODE = (
    "it needs Python code of its own (auto_map), and mlmkit never runs a model's code: use a model whose architecture "
    "and tokenizer are part of transformers"
)
FLOOR = 4 << 20  # weights, 16 MiB: not worth counting
# What a network raises when it is asked for what it cannot do.
PROBE_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)


class Scores(NamedTuple):
    """The scoring graph's outputs. `log_prob` float32 and `rank` int64 `[masked]`; `top_*` `[masked, k]`."""

    log_prob: Tensor
    rank: Tensor
    top_log_prob: Tensor
    top_id: Tensor


class MaskedLM(nn.Module):
    """A masked LM of transformers whose vocabulary head sees the masked positions only.

    Raises `UserError` for a network that gives no logits for each id, or other ones each time.
    """

    def __init__(self, network: PreTrainedModel, top_k: int = TOP_K) -> None:
        super().__init__()
        self.network = network
        self.vocabulary_size: int = network.config.get_text_config().vocab_size
        self.top_k = min(top_k, self.vocabulary_size)
        self._positions: Tensor | None = None
        network.base_model.register_forward_hook(self._gather)
        on_meta = network.device.type == "meta"
        self.gathers_before_head = on_meta or self._probe_head()
        self.ends_in_linear = not on_meta and self._probe_decoder()

    def _gather(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """`[batch, seq, hidden]` → `[1, masked, hidden]`, in a tuple or a ModelOutput as the architecture has it."""
        if self._positions is None:
            return output
        rows = output[0].flatten(0, 1).index_select(0, self._positions).unsqueeze(0)
        if isinstance(output, ModelOutput):
            output["last_hidden_state"] = rows
            return output
        return (rows, *output[1:])

    def logits(self, positions: Tensor, **inputs: Any) -> Tensor:
        """Logits at flat `positions` `[masked]` (index into batch x seq), `[masked, vocabulary]`, in the model's dtype.

        `inputs` go to the transformers model as they are: `input_ids` and `attention_mask`, or what `packed_inputs`
        makes.
        """
        if not self.gathers_before_head:
            return self._dense_logits(**inputs).flatten(0, 1).index_select(0, positions)
        self._positions = positions
        try:
            return self.network(**inputs).logits.squeeze(0)
        finally:
            self._positions = None

    def _dense_logits(self, **inputs: Any) -> Tensor:
        """`[batch, seq, vocabulary]`. Perceiver decodes all the places that it has, whatever the length of the row."""
        return self.network(**inputs).logits[:, : inputs["input_ids"].shape[1]]

    def _probe_head(self) -> bool:
        """Whether the head gives gathered rows the logits that it gives them among all others."""
        network, kind = self.network, self.network.config.model_type
        seq = max(min(5, self.max_length()), 1)
        places = torch.arange(2 * seq, device=network.device)
        ids = (self.vocabulary_size - 1 - places % (self.vocabulary_size // 2 or 1)).view(2, seq)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        positions = places.flip(0)[::3]
        try:
            with _probing(network):
                dense = self._dense_logits(**inputs)
                if dense.shape != (2, seq, self.vocabulary_size):
                    raise UserError(f"a {kind} model gives no logits for each token: mlmkit cannot score with it")
                # Half the digits: a head that mixes positions is further off, rounding is not.
                bound = torch.finfo(dense.dtype).eps ** 0.5 * float(dense.abs().nan_to_num().max())
                expected = dense.flatten(0, 1)[positions]
                try:
                    self.gathers_before_head = True
                    found = self.logits(positions, **inputs)
                    if found.shape == expected.shape and _close(found, expected, bound):
                        return True
                except PROBE_ERRORS as error:
                    log.debug("the head takes no gathered rows: %s", error)
                if not _close(self._dense_logits(**inputs), dense, bound):
                    raise UserError(f"this {kind} model gives other logits each time: there is nothing to evaluate")
        except PROBE_ERRORS as error:
            raise UserError(f"a {kind} model cannot score token ids alone: {first_line(error)}") from error
        log.info("the head of %s needs every position: it runs at all of them", kind)
        return False

    def _probe_decoder(self) -> bool:
        """Whether the logits are the output embeddings' `Linear` over what `_decoder_input` gives, and no more."""
        decoder = self.network.get_output_embeddings()
        if not (self.gathers_before_head and isinstance(decoder, nn.Linear)):
            return False
        inputs = probe_inputs(self, [max(min(5, self.max_length()), 1)])
        try:
            with _probing(self.network):
                expected = self.logits(**inputs)
                found = F.linear(self._decoder_input(decoder, **inputs), decoder.weight, decoder.bias)
            # Tight: whatever a head does besides, a soft cap for example, may hardly show on random weights.
            bound = 16 * torch.finfo(expected.dtype).eps * float(expected.abs().nan_to_num().max())
            return found.shape == expected.shape and _close(found, expected, bound)
        except PROBE_ERRORS as error:
            log.debug("the head is more than its matrix: %s", error)
            return False

    def _decoder_input(self, decoder: nn.Linear, positions: Tensor, **inputs: Any) -> Tensor:
        """The states `[masked, width]` that the vocabulary's matrix would be multiplied with."""
        decoder.forward = lambda input: input
        try:
            return self.logits(positions, **inputs)
        finally:
            del decoder.forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor) -> Scores:
        """The scoring graph (`docs/architecture.md`).

        `input_ids` and `attention_mask` `[batch, seq]`; `positions`, flat, and `targets` `[masked]`; all int64.
        The log-softmax is float32 whatever the model computes in. `rank` counts the other ids whose logit is at least
        the target's, so ties count against the model.
        """
        logits = self.logits(positions, input_ids=input_ids, attention_mask=attention_mask).float()
        # Not logsumexp: ONNX Runtime's is slower, three times less exact, and fails without a masked position.
        log_probs = torch.log_softmax(logits, dim=-1)
        target = targets.unsqueeze(-1)
        # A matrix product, exact up to 2**24 ids: ONNX Runtime's ReduceSum takes five times as long, and its
        # shape is wrong without a masked position.
        at_least = (logits >= logits.gather(-1, target)).float() @ torch.ones(logits.shape[-1], 1, device=logits.device)
        rank = at_least.squeeze(-1).long() - 1
        top_id = torch.topk(logits, self.top_k, dim=-1).indices
        return Scores(log_probs.gather(-1, target).squeeze(-1), rank, log_probs.gather(-1, top_id), top_id)

    def loss_sum(self, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """The summed cross-entropy over `[masked]` targets: divide by the global count, not the batch's.

        float32, or float64 for a model in float64. Memory does not grow with targets x vocabulary, except in the few
        architectures whose logits are more than a matrix product.
        """
        if self.ends_in_linear:
            decoder: Any = self.network.get_output_embeddings()
            hidden = self._decoder_input(decoder, positions, **inputs)
            return linear_cross_entropy_sum(hidden, decoder.weight, decoder.bias, targets)
        logits = self.logits(positions, **inputs)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.network.device

    @property
    def position_offset(self) -> int:
        """The first token's position id: 0, or `padding_idx + 1` for the RoBERTa family."""
        for name, module in self.network.base_model.named_modules():
            if name.endswith("position_embeddings"):
                padding_idx = getattr(module, "padding_idx", None)
                return 0 if padding_idx is None else padding_idx + 1
        return 0

    def max_length(self, tokenizer_limit: int | None = None) -> int:
        """Tokens a row can hold, special tokens included: what the position table and the tokenizer allow."""
        table = getattr(self.network.config.get_text_config(), "max_position_embeddings", None) or (1 << 30)
        limit = table - self.position_offset
        return min(limit, tokenizer_limit or limit)


# ---------------------------------------------------------------- loading


def load_pretrained(path: str, *, dtype: torch.dtype = torch.float32) -> tuple[MaskedLM, Tokenizer]:
    """A checkpoint folder or hub name, ready to score: evaluation mode, float32 unless told otherwise.

    Weights are read from safetensors only. Raises `UserError` for what is not a complete masked LM with its tokenizer.
    """
    path = locate_model(path)
    config = load_config(path)
    network, info = from_pretrained(
        AutoModelForMaskedLM,
        path,
        config=config,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{path} is no masked LM checkpoint: it lacks weights for {', '.join(missing[:3])}")
    if mismatched := sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(f"{path}: the weights do not have the shapes that config.json asks for: {mismatched[0]}")
    tokenizer = load_tokenizer(path)
    model = MaskedLM(network.eval())
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocabulary_size - 1} but the model's vocabulary has "
            f"{model.vocabulary_size}: the two do not belong together"
        )
    if not sees_context(model):
        raise UserError(
            f"{path}: what this {config.model_type} model predicts for a token does not depend on the others: its "
            "weights are empty, or transformers lacks a kernel for it here"
        )
    return model, tokenizer


def load_config(path: str) -> PreTrainedConfig:
    """The configuration of a masked LM. Raises `UserError` for another kind of model."""
    folder = Path(path)
    if is_artifact(folder):
        raise UserError(f"{path} is an artifact: name the checkpoint that it came from")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{path} holds no config.json: it is neither a checkpoint nor an artifact")
    if folder.is_dir() and not any(folder.glob("*.safetensors*")):
        raise UserError(f"{path} holds no model.safetensors: if it has a pytorch_model.bin, run in it {CONVERT}")
    config = from_pretrained(AutoConfig, path)
    refuse_other_models(config, path)
    return config


def refuse_other_models(config: PreTrainedConfig, name: str) -> None:
    """Raise `UserError` unless this configures a masked language model."""
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"{name} is a {config.model_type} model, which transformers has no masked LM for")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{name} is a causal model (is_decoder): mlmkit is for masked language models")


def load_tokenizer(path: str) -> Tokenizer:
    """The checkpoint's tokenizer. Raises `UserError` when there is none that mlmkit can use."""
    path = locate_model(path)
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        if any(folder.glob("*.model")):
            require("train", "sentencepiece")  # transformers converts with it, and asks for tiktoken without
        elif not any(folder.glob("*vocab*")):
            raise UserError(f"{path} holds no tokenizer.json: save or copy the model's tokenizer there")
    loaded = from_pretrained(AutoTokenizer, path)
    with as_user_error(path):
        tokenizer = Tokenizer.from_transformers(loaded)
    if not len(tokenizer.masking.ordinary):
        # transformers makes one up, of special tokens alone, where the files are missing.
        raise UserError(f"{path}: the tokenizer has no ordinary token: are its files (tokenizer.json) there?")
    return tokenizer


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """`save_pretrained` of transformers. Raises `OSError` also for what the tokenizers library cannot write."""
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # it has no type of its own
        raise OSError(f"cannot write {folder}: {first_line(error)}") from error


def from_pretrained(kind: Any, path: str, **options: Any) -> Any:
    """`kind.from_pretrained(path)`, which never runs code of the folder's own and never asks whether it may.

    Raises `UserError` for what cannot be loaded so.
    """
    with as_user_error(path):
        present = _fetch(path, ("config.json", "tokenizer_config.json", "adapter_config.json"))
        folder = present[0].parent if present else Path(path)
        config = check_folder(folder) if folder.is_dir() else {}
        if kind is AutoTokenizer:
            for file in _fetch(path, ["tokenizer.json"]):
                check_tokenizer(json.loads(file.read_bytes()))
        if kind is AutoModelForMaskedLM:
            _fetch(path, ("model.safetensors", "model.safetensors.index.json"))
            _refuse_unheld(options["config"], _fetch(path, weight_names(folder, config)))
        return kind.from_pretrained(path, trust_remote_code=False, **options)


def _fetch(path: str, names: Sequence[str]) -> list[Path]:
    """Where those files of a model's folder that there are lie, once fetched if it is the hub's."""
    silent: Any = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    return [Path(file) for name in names for file in cached_files(path, [name], **silent) or ()]


def _refuse_unheld(config: PreTrainedConfig, files: Sequence[Path]) -> None:
    """Raise `UserError` if the weight files hold much less than what the configuration asks memory for."""
    held = 0
    for file in files:
        with safe_open(file, "pt") as tensors:
            held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    text, most = config.get_text_config(), 2 * held + FLOOR
    # A table of sines is in no file, and is filled by a loop of Python.
    asked = max(text.vocab_size, getattr(text, "max_position_embeddings", 0) * getattr(text, "hidden_size", 0) // 2)
    if asked <= most:
        with torch.device("meta"):
            network = AutoModelForMaskedLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        asked = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if asked > most:
        raise UserError(f"its configuration asks for {asked:,} weights, and its files hold {held:,}")


@contextmanager
def as_user_error(path: str) -> Iterator[None]:
    """transformers raises OSError or ValueError with pages of advice: keep the first line."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        cause = error if isinstance(error, UserError) else f"cannot be loaded: {first_line(error)}"
        raise UserError(f"{path}: {OWN_CODE if 'trust_remote_code' in str(error) else cause}") from error


def _close(found: Tensor, expected: Tensor, bound: float) -> bool:
    return torch.allclose(found, expected, atol=bound, rtol=0, equal_nan=True)


# ---------------------------------------------------------------- probes


@contextmanager
def _probing(network: PreTrainedModel) -> Iterator[None]:
    """Without dropout and gradients, and in the mode that it had afterwards."""
    training = network.training
    try:
        with torch.no_grad():
            network.eval()
            yield
    finally:
        network.train(training)


def sees_context(model: MaskedLM) -> bool:
    """Whether what a model on the CPU predicts for a token changes with the others, found by a probe.

    It does not where transformers leaves the attention out: MRA's gives zeros without its CUDA kernel.
    """
    inputs = probe_inputs(model, [5])
    others = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    middle = torch.tensor([2])
    with _probing(model.network):
        before, after = (model.logits(**(each | {"positions": middle})) for each in (inputs, others))
    return not torch.equal(before, after)


def sees_padding(model: MaskedLM, pad_id: int) -> bool:
    """Whether a row's logits change with the padding behind it, found by a probe on a model on the CPU.

    They do where an architecture mixes positions without asking the attention mask: FNet's Fourier transform, the
    convolutions of ConvBERT, Nystromformer's landmarks, MobileBERT's embeddings of three neighbours.
    """
    inputs = probe_inputs(model, [5])
    padded = {
        name: F.pad(inputs[name], (0, 4), value=fill) for name, fill in (("input_ids", pad_id), ("attention_mask", 0))
    }
    with _probing(model.network):
        alone, behind = model.logits(**inputs), model.logits(inputs["positions"], **padded)
    return not torch.allclose(alone, behind, atol=2e-5, rtol=1e-5)


def probe_inputs(model: MaskedLM, lengths: Sequence[int]) -> dict[str, Any]:
    """Documents of arbitrary ids from the upper half of the vocabulary, end to end in one row `[1, total]`."""
    last = model.vocabulary_size - 1
    ids = torch.cat([last - torch.arange(length) % (last // 2) for length in lengths]).unsqueeze(0)
    return {"positions": torch.arange(ids.shape[1]), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
