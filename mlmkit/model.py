"""`MaskedLM`: one forward for training, evaluation and export, over any masked LM of transformers.

There is no code per architecture. A forward hook on `base_model` gathers the hidden rows at the masked positions before
the vocabulary head runs. Nearly every masked-LM head treats positions independently, so the head costs only the masked
share. `MaskedLM` tests this when it wraps a network; if the head does mix positions, it gathers the logits instead.
For the same reason, the last layer leaves out rows (`last_layer.py`).
"""

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from mlmkit.errors import UserError, first_line
from mlmkit.last_layer import ScoredRows, skippable
from mlmkit.loss import linear_cross_entropy_sum

log = logging.getLogger(__name__)

TOP_K = 100
# What a network may raise when it cannot do what a probe asks.
PROBE_ERRORS = (ValueError, TypeError, RuntimeError, AttributeError, LookupError, AssertionError)


class Scores(NamedTuple):
    """The scoring graph's outputs: `log_prob` float32 and `rank` int64 `[masked]`; `top_*` likewise `[masked, k]`."""

    log_prob: Tensor
    rank: Tensor
    top_log_prob: Tensor
    top_id: Tensor


class MaskedLM(nn.Module):
    """A masked LM of transformers whose vocabulary head runs at the masked positions only.

    Raises `UserError` for a network that does not give logits per token, or gives different ones each time.
    """

    def __init__(self, network: PreTrainedModel, top_k: int = TOP_K) -> None:
        super().__init__()
        self.network = network
        self.vocabulary_size: int = network.config.get_text_config().vocab_size
        self.top_k = min(top_k, self.vocabulary_size)
        self.skips_rows = False  # in the last layer: `_skip_rows`
        self._scored = ScoredRows()
        network.base_model.register_forward_hook(self._gather)
        on_meta = network.device.type == "meta"
        self.gathers_before_head = on_meta or self._probe_head()
        self.ends_in_linear = not on_meta and self._probe_decoder()
        if self.gathers_before_head and not on_meta:
            self._skip_rows()

    def _gather(self, _module: nn.Module, _inputs: Any, output: Any) -> Any:
        """Turn `[batch, seq, hidden]` into `[1, masked, hidden]`, in a tuple or ModelOutput as it came."""
        if self._scored.positions is None:
            return output
        rows = output[0].flatten(0, 1).index_select(0, self._scored.positions).unsqueeze(0)
        if isinstance(output, ModelOutput):
            output["last_hidden_state"] = rows
            return output
        return (rows, *output[1:])

    def logits(self, positions: Tensor, **inputs: Any) -> Tensor:
        """Logits `[masked, vocabulary]` at flat `positions` `[masked]` (index into batch x seq), in the model's dtype.

        `inputs` go to the transformers model unchanged: `input_ids` and `attention_mask`, or `packed_inputs`.
        """
        if not self.gathers_before_head:
            return self.dense_logits(**inputs).flatten(0, 1).index_select(0, positions)
        self._scored.positions = positions
        self._scored.shape = inputs["input_ids"].shape if self.skips_rows else None
        try:
            return self.network(**inputs).logits.squeeze(0)
        finally:
            self._scored.positions = self._scored.shape = None

    def dense_logits(self, **inputs: Any) -> Tensor:
        """Logits `[batch, seq, vocabulary]`. Perceiver returns its maximum length, whatever the row's: cut to seq."""
        return self.network(**inputs).logits[:, : inputs["input_ids"].shape[1]]

    def _probe_head(self) -> bool:
        """Whether the head gives gathered rows the same logits as it gives them among all others."""
        network, kind = self.network, self.network.config.model_type
        seq = max(min(5, self.max_length()), 1)
        flat = torch.arange(2 * seq, device=network.device)
        ids = (self.vocabulary_size - 1 - flat % (self.vocabulary_size // 2 or 1)).view(2, seq)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        positions = flat.flip(0)[::3]
        try:
            with probing(network):
                dense = self.dense_logits(**inputs)
                if dense.shape != (2, seq, self.vocabulary_size):
                    raise UserError(f"a {kind} model does not give logits per token: mlmkit cannot score with it")
                # Half the digits: rounding stays below, a head that mixes positions does not.
                bound = torch.finfo(dense.dtype).eps ** 0.5 * _largest(dense)
                expected = dense.flatten(0, 1)[positions]
                try:
                    self.gathers_before_head = True
                    if _close(self.logits(positions, **inputs), expected, bound):
                        return True
                except PROBE_ERRORS as error:
                    log.debug("the head does not accept gathered rows: %s", error)
                if not _close(self.dense_logits(**inputs), dense, bound):
                    raise UserError(f"this {kind} model gives different logits each time, so it cannot be evaluated")
        except PROBE_ERRORS as error:
            raise UserError(f"a {kind} model cannot score from token ids alone: {first_line(error)}") from error
        log.info("the head of %s needs every position: it runs at all of them", kind)
        return False

    def _probe_decoder(self) -> bool:
        """Whether the logits are exactly the output embeddings' `Linear` applied to `_decoder_input`."""
        decoder = self.network.get_output_embeddings()
        if not (self.gathers_before_head and isinstance(decoder, nn.Linear)):
            return False
        inputs = probe_inputs(self, [max(min(5, self.max_length()), 1)])
        try:
            with probing(self.network):
                expected = self.logits(**inputs)
                product = F.linear(self._decoder_input(decoder, **inputs), decoder.weight, decoder.bias)
            # Tight: anything else that a head does, such as a soft cap, may hardly show on random weights.
            bound = 16 * torch.finfo(expected.dtype).eps * _largest(expected)
            return _close(product, expected, bound)
        except PROBE_ERRORS as error:
            log.debug("the head does more than a matrix product: %s", error)
            return False

    def compute_all_rows(self) -> None:
        """Leave out no rows of the last layer any more."""
        self.skips_rows = False
        self._scored.detach()

    def _skip_rows(self) -> None:
        """Let the last layer leave out rows, unless that changes the logits."""
        seq = max(min(5, self.max_length()), 1)
        ids = probe_inputs(self, [2 * seq])["input_ids"].view(2, seq).to(self.device)
        positions = torch.arange(1, 2 * seq, 3, device=self.device)
        run = partial(self.logits, positions, input_ids=ids, attention_mask=torch.ones_like(ids))
        try:
            with probing(self.network):
                expected = run()
                linears = skippable(encoder_layers(self)[-1], run, positions, ids.shape)
                for linear in linears:
                    self._scored.attach(linear)
                self.skips_rows = bool(linears)
                bound = torch.finfo(expected.dtype).eps ** 0.5 * _largest(expected)
                self._scored.fill = math.nan  # in case something after the layer mixes positions
                if not _close(run(), expected, bound):
                    self.compute_all_rows()
                self._scored.fill = 0.0
        except PROBE_ERRORS as error:
            self.compute_all_rows()
            log.debug("the last layer computes every row: %s", error)

    def _decoder_input(self, decoder: nn.Linear, positions: Tensor, **inputs: Any) -> Tensor:
        """Return the states `[masked, width]` that are multiplied by the vocabulary matrix."""
        decoder.forward = lambda input: input
        try:
            return self.logits(positions, **inputs)
        finally:
            del decoder.forward

    def forward(self, input_ids: Tensor, attention_mask: Tensor, positions: Tensor, targets: Tensor) -> Scores:
        """Score the targets: this is the scoring graph of `docs/architecture.md`.

        `input_ids` and `attention_mask` are `[batch, seq]`, `positions` (flat) and `targets` `[masked]`, all int64.
        The log-softmax is float32 whatever the model's dtype.
        """
        logits = self.logits(positions, input_ids=input_ids, attention_mask=attention_mask)
        return score_logits(logits.float(), targets, self.top_k)

    def loss_sum(self, positions: Tensor, targets: Tensor, **inputs: Any) -> Tensor:
        """Sum the cross-entropy (nats) over `targets` `[masked]`. Divide it by the global count, not the batch's.

        The positions must be distinct: the last layer's gradients would count one twice that comes twice.
        The sum is float32, or float64 for a model in float64. Memory does not grow with targets x vocabulary, except
        in the few architectures whose head does more than a matrix product.
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
        """Return how many tokens a row can hold, special tokens included, by position table and tokenizer."""
        config = self.network.config.get_text_config()
        table = getattr(config, "max_position_embeddings", None)
        if not table and hasattr(config, "auto_map"):
            table = getattr(config, "max_length", None)  # NeoBERT's; elsewhere a setting of text generation
        limit = (table or 1 << 30) - self.position_offset
        return min(limit, tokenizer_limit or limit)


def score_logits(logits: Tensor, targets: Tensor, top_k: int) -> Scores:
    """Score `targets` `[masked]` by float32 `logits` `[masked, vocabulary]`, and find the `top_k` best ids.

    `rank` counts the other ids whose logit is at least the target's, so ties count against the model.
    """
    # Not logsumexp: ONNX Runtime's is slower, three times less exact, and fails if no position is masked.
    log_probs = torch.log_softmax(logits, dim=-1)
    target = targets.unsqueeze(-1)
    # A matrix product, exact up to 2**24 ids: ONNX Runtime's ReduceSum takes five times as long, and its shape is
    # wrong if no position is masked.
    at_least = (logits >= logits.gather(-1, target)).float() @ torch.ones(logits.shape[-1], 1, device=logits.device)
    rank = at_least.squeeze(-1).long() - 1
    top_id = torch.topk(logits, top_k, dim=-1).indices
    return Scores(log_probs.gather(-1, target).squeeze(-1), rank, log_probs.gather(-1, top_id), top_id)


# ---------------------------------------------------------------- layers and probes


def encoder_layers(model: MaskedLM) -> list[nn.Module]:
    """The repeated layers of the encoder: the members of the outermost module lists, whatever the architecture."""

    def stacks(module: nn.Module) -> list[nn.ModuleList]:
        if isinstance(module, nn.ModuleList):
            return [module]
        return [stack for child in module.children() for stack in stacks(child)]

    return [layer for stack in stacks(model.network.base_model) for layer in stack]


@contextmanager
def probing(network: PreTrainedModel) -> Iterator[None]:
    """Run the block without dropout and gradients, then restore the network's mode."""
    training = network.training
    try:
        with torch.no_grad():
            network.eval()
            yield
    finally:
        network.train(training)


def sees_context(model: MaskedLM) -> bool:
    """Probe whether a model on the CPU predicts a token from the other tokens.

    It does not if transformers skips the attention: MRA's gives zeros without its CUDA kernel.
    """
    inputs = probe_inputs(model, [5])
    others = inputs | {"input_ids": inputs["input_ids"].flip(1)}
    middle = torch.tensor([2])
    with probing(model.network):
        before, after = (model.logits(**(each | {"positions": middle})) for each in (inputs, others))
    return not torch.equal(before, after)


def sees_padding(model: MaskedLM, pad_id: int) -> bool:
    """Probe whether the logits of a model on the CPU change with the padding after a row.

    They do if an architecture mixes positions without the attention mask: FNet's Fourier transform, ConvBERT's
    convolutions, Nystromformer's landmarks, MobileBERT's embeddings of three neighbours.
    """
    inputs = probe_inputs(model, [5])
    padded = {
        name: F.pad(inputs[name], (0, 4), value=fill) for name, fill in (("input_ids", pad_id), ("attention_mask", 0))
    }
    with probing(model.network):
        alone, with_padding = model.logits(**inputs), model.logits(inputs["positions"], **padded)
    return not torch.allclose(alone, with_padding, atol=2e-5, rtol=1e-5)


def probe_inputs(model: MaskedLM, lengths: Sequence[int]) -> dict[str, Any]:
    """Return the inputs of `MaskedLM.logits` for documents of arbitrary ids, end to end in one row `[1, total]`.

    The ids come from the upper half of the vocabulary, where few are special. All positions are asked for.
    """
    last = model.vocabulary_size - 1
    ids = torch.cat([last - torch.arange(length) % (last // 2) for length in lengths]).unsqueeze(0)
    return {"positions": torch.arange(ids.shape[1]), "input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _largest(logits: Tensor) -> float:
    """Return the largest finite value: some models give special tokens minus infinity."""
    return float(logits.abs().nan_to_num(posinf=0).max())


def _close(logits: Tensor, expected: Tensor, bound: float) -> bool:
    is_same_shape = logits.shape == expected.shape
    return is_same_shape and torch.allclose(logits, expected, atol=bound, rtol=0, equal_nan=True)
