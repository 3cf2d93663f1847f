"""Load masked LMs and tokenizers that transformers can read.

Code that comes with them runs, and a pickle is read, only with `trust_remote_code`.
"""

import copy
import json
import logging
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers.models import BPE
from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_files

from mlmkit.artifact import is_artifact, refuse_other_graphs
from mlmkit.bounds import check_folder, check_tokenizer, weight_names
from mlmkit.errors import UserError, as_user_error, first_line, require
from mlmkit.files import locate_model
from mlmkit.model import MaskedLM, sees_context
from mlmkit.slow_tokenizer import WRITTEN_BY
from mlmkit.tokenizer import CLEAN_UP, CLEAN_UP_BPE, NAMED_TOKENS, Tokenizer

log = logging.getLogger(__name__)

CONVERT = "python -c \"import transformers as t; t.AutoModelForMaskedLM.from_pretrained('.').save_pretrained('.')\""
TRUST = "eval, score, fill and export with --trust-remote-code"
HAS_CODE = f"it comes with Python code (auto_map), which mlmkit does not run: only {TRUST} do"
NOT_TENSORS = "its pytorch_model.bin holds objects other than tensors, which mlmkit never loads: ask its author"
# Entries of tokenizer_config.json that transformers 4 cannot read, that tell of the process that wrote them, or that
# name code.
NOT_KEPT = (*WRITTEN_BY, "auto_map", "extra_special_tokens", "model_specific_special_tokens")
FREE_WEIGHTS = 4 << 20  # 16 MiB, too few to refuse


def load_pretrained(
    path: str, *, dtype: torch.dtype = torch.float32, new_head: bool = False, trust_remote_code: bool = False
) -> tuple[MaskedLM, Tokenizer]:
    """Load a checkpoint (a folder or hub name) and its tokenizer, on the CPU, in evaluation mode.

    Reads weights from safetensors only. With `trust_remote_code`, runs the Python code that comes with the model, and
    reads `pytorch_model.bin` (tensors only, no other objects) if there is no safetensors file. Raises `UserError` if it
    is not a complete masked LM with its tokenizer. With `new_head` it must be a complete encoder without a masked-LM
    head, which gets one with random weights from torch's generator; the output embeddings are tied to the input
    embeddings.
    """
    path = locate_model(path)
    if trust_remote_code:
        log.warning("--trust-remote-code: Python code of %s, if it has any, runs with all of your rights", path)
    config = load_config(path, trust_remote_code=trust_remote_code)
    if new_head:
        config.tie_word_embeddings = True
    network, info = from_pretrained(
        AutoModelForMaskedLM,
        path,
        trust_remote_code=trust_remote_code,
        config=config,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # reported below, in one line
    )
    _check_head(path, network, sorted(info["missing_keys"]), new_head)
    if mismatched := sorted(str(key) for key in info["mismatched_keys"]):
        raise UserError(f"{path}: the weights do not have the shapes that config.json asks for: {mismatched[0]}")
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = MaskedLM(network.eval())
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {tokenizer.vocabulary_size - 1} but the model's vocabulary has "
            f"{model.vocabulary_size}: the two do not belong together"
        )
    if not sees_context(model):
        raise UserError(
            f"{path}: this {config.model_type} model's predictions do not depend on the other tokens: its training "
            "has collapsed (use a lower optim.lr), its weights are empty, or transformers lacks a kernel for it here"
        )
    return model, tokenizer


def _check_head(path: str, network: PreTrainedModel, missing: list[str], new_head: bool) -> None:
    """Raise `UserError` unless all weights were found; or with `new_head`, all of the encoder and none of the head."""
    encoder, names = {id(weight) for weight in network.base_model.parameters()}, ", ".join(missing[:3])
    weights = {name: id(weight) for name, weight in network.named_parameters(remove_duplicate=False)}
    if missing and set(weights.values()) - encoder != {weights.get(name) for name in missing}:
        raise UserError(f"{path} is not a masked LM checkpoint: it lacks weights for {names}")
    if missing and not new_head:
        raise UserError(
            f"{path} is an encoder without a masked LM head: it lacks weights for {names}: "
            "mlmkit train with model.new_head = true gives it one"
        )
    if new_head and not missing:
        raise UserError(f"model.new_head has no effect, as {path} has a masked LM head: leave it out")


def load_config(path: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a masked LM. Raises `UserError` if it is missing or of another kind of model."""
    folder = Path(path)
    if is_artifact(folder):
        raise UserError(f"{path} is an artifact: name the checkpoint it was exported from")
    if folder.is_dir() and not (folder / "config.json").exists():
        raise UserError(f"{path} has no config.json: it is neither a checkpoint nor an artifact")
    refuse_other_graphs(folder)
    has_weights = any(folder.glob("*.safetensors*")) or (trust_remote_code and any(folder.glob("pytorch_model*.bin*")))
    if folder.is_dir() and not has_weights:
        convert = f"to convert a pytorch_model.bin, run there {CONVERT}; {TRUST} read it as it is"
        raise UserError(f"{path} has no model.safetensors: {convert}")
    config = from_pretrained(AutoConfig, path, trust_remote_code=trust_remote_code)
    if not (trust_remote_code and _has_code(config)):
        refuse_other_models(config, path)
    return config


def refuse_other_models(config: PreTrainedConfig, name: str) -> None:
    """Raise `UserError` unless the configuration is of a masked language model of transformers."""
    if type(config) not in AutoModelForMaskedLM._model_mapping:
        raise UserError(f"{name} is a {config.model_type} model, for which transformers has no masked LM")
    if getattr(config, "is_decoder", False):
        raise UserError(f"{name} is a causal model (is_decoder): mlmkit is for masked language models")


def load_tokenizer(path: str, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a checkpoint's tokenizer. Raises `UserError` if there is none that mlmkit can use."""
    path = locate_model(path)
    folder = Path(path)
    if folder.is_dir() and not (folder / "tokenizer.json").exists():
        if any(folder.glob("*.model")):
            require("train", "sentencepiece")  # without it transformers asks for tiktoken
        elif not any(folder.glob("*vocab*")) and not (folder / "tokenizer_config.json").exists():
            raise UserError(f"{path} has no tokenizer.json: save or copy the model's tokenizer there")
    loaded = from_pretrained(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    with as_user_error(path):
        tokenizer = Tokenizer.from_transformers(loaded)
    if not len(tokenizer.masking.ordinary):
        # If the files are missing, transformers makes up a tokenizer that has special tokens only.
        raise UserError(f"{path}: the tokenizer has no ordinary token: is its file tokenizer.json missing?")
    return tokenizer


def require_rust(tokenizer: Any) -> None:
    """Raise `UserError` for a tokenizer that transformers has in Python only."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        name = type(tokenizer).__name__
        raise UserError(f"{name} exists in Python only, so it cannot be exported or trained with: use it on torch")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer of transformers, without code, such that versions 4.57 and 5 read the same from it.

    Raises `OSError` for all errors, also those of the tokenizers library, and `UserError` as `require_rust` does.
    """
    require_rust(tokenizer)
    tokenizer._auto_class = None  # or code that came with it would be copied
    try:
        tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exception
        raise OSError(f"cannot write {folder}: {first_line(error)}") from error
    path = folder / "tokenizer_config.json"
    config = _config_for_both_versions(json.loads(path.read_bytes()), tokenizer)
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _config_for_both_versions(config: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """`tokenizer_config.json` for transformers 4 and 5 alike, with all settings whose defaults differ between them.

    Both take `PreTrainedTokenizerFast` exactly as `tokenizer.json` has it; `BertTokenizer` and the like change what
    they load, each version in its own way, and version 4 lacks some.
    """
    config = {name: value for name, value in config.items() if name not in NOT_KEPT}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = tokenizer.model_input_names
    named = [getattr(tokenizer, name) for name in NAMED_TOKENS]
    if extra := [token for token in tokenizer.all_special_tokens if token not in named]:
        config["additional_special_tokens"] = extra  # version 5 takes this name for its extra_special_tokens
    pre_tokenizer = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in pre_tokenizer:
        config["add_prefix_space"] = pre_tokenizer["add_prefix_space"]
    if isinstance(tokenizer.backend_tokenizer.model, BPE) and not config.get(CLEAN_UP_BPE):
        config[CLEAN_UP] = False  # version 5 ignores it for BPE
    return config


def save_config(config: PreTrainedConfig, folder: Path) -> None:
    """Write `config.json`; for ModernBERT also with the names that transformers 4 knows.

    Version 5 reads `layer_types` and `rope_parameters`, which stay. Version 4 would ignore them and take its defaults.
    """
    config = copy.deepcopy(config)
    if config.model_type == "modernbert":
        layers = range(config.num_hidden_layers)
        full = [kind == "full_attention" for kind in config.layer_types]
        every = next((n for n in range(1, len(layers) + 1) if full == [layer % n == 0 for layer in layers]), 0)
        # Version 4 knows no other distances and no scaled positions. With 0 it fails instead of giving other logits.
        is_scaled = any(each["rope_type"] != "default" for each in config.rope_parameters.values())
        config.global_attn_every_n_layers = 0 if is_scaled else every
        config.global_rope_theta = config.rope_parameters["full_attention"]["rope_theta"]
        config.local_rope_theta = config.rope_parameters["sliding_attention"]["rope_theta"]
    vars(config).pop("auto_map", None)  # names code, which is not copied
    # Not save_pretrained, which refuses NeoBERT's max_length as a setting of text generation.
    config.to_json_file(folder / "config.json")


def from_pretrained(kind: Any, path: str, *, trust_remote_code: bool = False, **options: Any) -> Any:
    """Call `kind.from_pretrained(path)`, after checking the files; code from the folder runs only if it is trusted.

    Raises `UserError` for what cannot be loaded this way.
    """
    with as_user_error(path):
        present = _fetch(path, ("config.json", "tokenizer_config.json", "adapter_config.json"))
        folder = present[0].parent if present else Path(path)
        if not folder.is_dir():
            raise UserError("no such folder, and the Hub has no such model or cannot be reached")
        check_folder(folder)
        if kind is AutoTokenizer:
            for file in _fetch(path, ["tokenizer.json"]):
                check_tokenizer(json.loads(file.read_bytes()))
        files = []
        if kind is AutoModelForMaskedLM:
            files = weight_files(path, trust_remote_code=trust_remote_code)
            _refuse_missing_weights(options["config"], files, trust_remote_code=trust_remote_code)
            options |= {"use_safetensors": not any(file.suffix == ".bin" for file in files), "weights_only": True}
        try:
            if files and trust_remote_code and _has_code(options["config"]):
                return _load_with_code(options["config"], files, options["dtype"])
            return kind.from_pretrained(path, trust_remote_code=trust_remote_code, **options)
        except pickle.UnpicklingError:  # torch's message says how to load them all the same
            raise UserError(NOT_TENSORS) from None
        except ValueError as error:
            raise (UserError(HAS_CODE) if "trust_remote_code" in str(error) else error) from None


def _has_code(config: PreTrainedConfig) -> bool:
    """Whether the masked LM's class comes with the checkpoint."""
    return "AutoModelForMaskedLM" in (getattr(config, "auto_map", None) or {})


def _load_with_code(
    config: PreTrainedConfig, files: Sequence[Path], dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a network whose class comes with it, and say which weights are missing or of another shape.

    Most such code was written for transformers 4. The `from_pretrained` of transformers 5 builds networks without
    memory, so it loses what their `__init__` computes: NeoBERT's rotary table became NaN, and tied weights were no
    longer tied.
    """
    network = AutoModelForMaskedLM.from_config(config, trust_remote_code=True, dtype=dtype)
    found: dict[str, torch.Tensor] = {}
    for file in files:
        is_pickle = file.suffix == ".bin"
        tensors = torch.load(file, map_location="cpu", weights_only=True) if is_pickle else load_file(file)
        if not (isinstance(tensors, dict) and all(isinstance(each, torch.Tensor) for each in tensors.values())):
            raise UserError(NOT_TENSORS)
        found |= tensors
    own = network.state_dict(keep_vars=True)
    shared = {id(own[name]) for name in found.keys() & own.keys()}
    mismatched = [name for name in found.keys() & own.keys() if found[name].shape != own[name].shape]
    if not mismatched:
        network.load_state_dict(found, strict=False)
    parameters = dict(network.named_parameters(remove_duplicate=False))
    missing = [name for name, weight in parameters.items() if id(weight) not in shared]
    if buffers := sorted(own.keys() - found.keys() - parameters.keys()):
        log.warning("these are not in the weights file, so the model's code computes them: %s", ", ".join(buffers))
    return network, {"missing_keys": missing, "mismatched_keys": mismatched}


def weight_files(path: str, *, trust_remote_code: bool = False) -> list[Path]:
    """Return the safetensors files of a checkpoint's weights, downloaded first if it is on the hub.

    With `trust_remote_code`, the files of `pytorch_model.bin` if there is no safetensors file.
    """
    folder = next((file.parent for file in _fetch(path, ["config.json"])), Path(path))
    config = check_folder(folder) if folder.is_dir() else {}
    usual = "model.safetensors"
    is_there = _fetch(path, (usual, f"{usual}.index.json")) or "transformers_weights" in config
    if trust_remote_code and not is_there:
        usual = "pytorch_model.bin"
        _fetch(path, (usual, f"{usual}.index.json"))
    return _fetch(path, weight_names(folder, usual, config))


def _fetch(path: str, names: Sequence[str]) -> list[Path]:
    """Return the paths of those files that the model has, downloaded first if it is on the hub."""
    silent: Any = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    return [Path(file) for name in names for file in cached_files(path, [name], **silent) or ()]


def _refuse_missing_weights(config: PreTrainedConfig, files: Sequence[Path], *, trust_remote_code: bool) -> None:
    """Raise `UserError` if the configuration asks for far more weights, and so memory, than the files hold."""
    held = 0
    for file in files:
        if file.suffix == ".bin":
            held += file.stat().st_size // 2  # two bytes each, at least
            continue
        with safe_open(file, "pt") as tensors:
            held += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    text, most = config.get_text_config(), 2 * held + FREE_WEIGHTS
    # A table of sines is not in the files, and a Python loop fills it.
    asked = max(text.vocab_size, getattr(text, "max_position_embeddings", 0) * getattr(text, "hidden_size", 0) // 2)
    if asked <= most:
        with torch.device("meta"):
            network = AutoModelForMaskedLM.from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
        asked = sum(tensor.numel() for tensor in (*network.parameters(), *network.buffers()))
    if asked > most:
        raise UserError(f"its configuration asks for {asked:,} weights, and its files hold {held:,}")
