"""Architectures by name, with their published sizes; any other architecture is a `config.json`.

bert-tiny to bert-small: Turc et al. 2019; bert-base, -large: Devlin et al. 2019; roberta-base: Liu et al. 2019;
distilbert: Sanh et al. 2019; modernbert-base, -large: Warner et al. 2024.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMaskedLM, PreTrainedConfig

from mlmkit.bounds import read_config
from mlmkit.errors import UserError, as_user_error
from mlmkit.model import MaskedLM
from mlmkit.pretrained import refuse_other_models
from mlmkit.stored import StoredCorpus
from mlmkit.tokenizer import Tokenizer


def _bert(layers: int, hidden: int) -> dict[str, Any]:
    return {
        "model_type": "bert",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": 4 * hidden,
        # Pretraining sees a text a few times at most. On the demo's corpus (4 epochs) a dropout of 0.1 costs 0.11 nats
        # of held-out loss; Geiping and Goldstein 2022 (section 4.3) find the same.
        "hidden_dropout_prob": 0.0,
    }


def _modernbert(layers: int, hidden: int, intermediate: int) -> dict[str, Any]:
    return {
        "model_type": "modernbert",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": hidden // 64,
        "intermediate_size": intermediate,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "bert-tiny": _bert(2, 128),
    "bert-mini": _bert(4, 256),
    "bert-small": _bert(4, 512),
    "bert-base": _bert(12, 768),
    "bert-large": _bert(24, 1024),
    "roberta-base": _bert(12, 768) | {"model_type": "roberta"},
    "distilbert": {
        "model_type": "distilbert",
        "n_layers": 6,
        "dim": 768,
        "n_heads": 12,
        "hidden_dim": 3072,
        "dropout": 0.0,
    },
    "modernbert-tiny": _modernbert(4, 256, 384),
    "modernbert-base": _modernbert(22, 768, 1152),
    "modernbert-large": _modernbert(28, 1024, 2624),
}

# The CUDA kernel for packed documents has no attention dropout, so training uses none on any device.
ATTENTION_DROPOUT = ("attention_probs_dropout_prob", "attention_dropout")


def build_config(architecture: str, tokenizer: Tokenizer, max_length: int) -> PreTrainedConfig:
    """The Hugging Face configuration of a preset or a `config.json`, with the tokenizer's vocabulary and special ids.

    It takes rows of `max_length` tokens. Raises `UserError` when `architecture` is neither a preset nor a readable
    `config.json` of a masked LM that transformers can build.
    """
    values = read_architecture(architecture)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise UserError(f"{architecture}: transformers knows no model_type {model_type!r}")
    with as_user_error(architecture):
        config = AutoConfig.for_model(model_type, **values)
    refuse_other_models(config, architecture)
    config.vocab_size = tokenizer.vocabulary_size
    set_special_ids(config, tokenizer)
    config.max_position_embeddings = max_length
    for name in ATTENTION_DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    # Position ids of the RoBERTa family begin at padding_idx + 1, so their table needs that many extra rows.
    with as_user_error(architecture):
        config.max_position_embeddings += position_offset(config)
    return config


def set_special_ids(config: PreTrainedConfig, tokenizer: Tokenizer) -> None:
    """Set the ids of the special tokens that the configuration has entries for."""
    for name in ("pad", "bos", "eos", "cls", "sep"):
        if hasattr(config, f"{name}_token_id"):
            token = tokenizer.named.get(f"{name}_token")
            setattr(config, f"{name}_token_id", None if token is None else tokenizer.token_id(token))


def position_offset(config: PreTrainedConfig) -> int:
    """`MaskedLM.position_offset` of a model with this configuration."""
    with torch.device("meta"):
        return MaskedLM(AutoModelForMaskedLM.from_config(config)).position_offset


BLOCKS_COUNTED = 128  # about 131,000 documents: a sample of the text is enough


def fit_output_bias(model: MaskedLM, corpora: Sequence[StoredCorpus], weights: Sequence[float]) -> None:
    """Set the bias of the vocabulary head to the log frequencies of the tokens, with one added to each count.

    Otherwise a run spends about its first hundred steps learning them (docs/decisions.md). Tokens are counted in the
    first documents of each text, times the text's weight. A head without a bias is left alone.
    """
    bias = getattr(model.network.get_output_embeddings(), "bias", None)
    if not isinstance(bias, torch.Tensor) or bias.shape != (model.vocabulary_size,):
        return
    counts = np.ones(model.vocabulary_size)
    for corpus, weight in zip(corpora, weights, strict=True):
        for block in islice(corpus.blocks(), BLOCKS_COUNTED):
            counts += weight * np.bincount(block.ids, minlength=len(counts))
    with torch.no_grad():
        bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))


def read_architecture(architecture: str) -> dict[str, Any]:
    """The values of a preset or of a `config.json`. Raises `UserError` if it is neither."""
    return dict(PRESETS.get(architecture) or _read_config(architecture))


def _read_config(path: str) -> dict[str, Any]:
    try:
        values = read_config(Path(path))
    except OSError:
        guess = get_close_matches(path, PRESETS, n=1)
        hint = f": did you mean {guess[0]}?" if guess else ""
        raise UserError(
            f"model.architecture: {path!r} is neither a preset ({', '.join(PRESETS)}) nor a config.json{hint}"
        ) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a Hugging Face config.json: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a Hugging Face config.json: not a JSON object")
    return values
