"""Fixtures: tiny random models, and small real text from Python's documentation and two Portuguese sentences."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # as the command line sets it
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["OMP_NUM_THREADS"] = "1"  # for models this small a second thread costs more than it gains
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

from mlmkit.export.proof_text import ProofText
from mlmkit.files import CHECKSUM, sealed
from mlmkit.pydocs import topics
from mlmkit.tokenizer import Tokenizer

PORTUGUESE = ("A Águia voa alto no céu azul.", "O rato roeu a roupa do rei de Roma.")
KINDS = ("bert", "roberta", "modernbert")


def paragraphs() -> list[str]:
    """Real text of all lengths: paragraphs of the language reference, then the Portuguese sentences."""
    parts = [" ".join(part.split()) for topic in topics()[:12] for part in topic.split("\n\n")]
    return [part for part in dict.fromkeys(parts) if part] + list(PORTUGUESE)


PROOF = ProofText("paragraphs", paragraphs())


def edit_record(path: Path, **changes: Any) -> None:
    """Change values in a record, with a valid checksum."""
    values = json.loads(path.read_text())
    values.pop(CHECKSUM, None)
    path.write_text(json.dumps(sealed(values | changes)))


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use a token cache for the tests instead of the user's."""
    os.environ["MLMKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, one document per line."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{line}\n" for line in paragraphs()), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes a trained tokenizer of a kind, `wordpiece` or `bpe`."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        from mlmkit.train.config import TokenizerConfig
        from mlmkit.train.tokenizer import train_tokenizer

        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            config = TokenizerConfig(kind=kind, vocab_size=600)
            train_tokenizer(paragraphs, config, max_length=64).save_pretrained(folders[kind])
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def checkpoint(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Callable[[str], Path]
) -> Callable[[str], Path]:
    """Makes a checkpoint for up to 64 tokens, with random weights large enough for sharp predictions."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        import torch
        from transformers import AutoModelForMaskedLM

        from mlmkit.train.presets import build_config

        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            tokenizer_path = tokenizer_folder("bpe" if kind == "roberta" else "wordpiece")
            architecture = folders[kind] / "architecture.json"
            architecture.write_text(ARCHITECTURES[kind])
            config = build_config(str(architecture), Tokenizer.from_folder(tokenizer_path), 64)
            architecture.unlink()
            torch.manual_seed(0)
            network = AutoModelForMaskedLM.from_config(config)
            with torch.no_grad():
                for parameter in network.parameters():
                    if parameter.ndim > 1:
                        parameter.mul_(6)
            network.save_pretrained(folders[kind])
            for file in tokenizer_path.iterdir():
                (folders[kind] / file.name).write_bytes(file.read_bytes())
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str], Path]:
    """Makes the artifact of a checkpoint in fp32."""
    folders: dict[str, Path] = {}

    def make(kind: str) -> Path:
        from mlmkit.export.export import export

        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp("artifacts") / kind
            export(str(checkpoint(kind)), folders[kind], text=PROOF)
        return folders[kind]

    return make


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory, checkpoint: Callable[[str], Path]) -> Callable[[str, str], Path]:
    """Makes the artifact of a checkpoint in a precision."""
    folders: dict[tuple[str, str], Path] = {}

    def make(kind: str, precision: str) -> Path:
        from mlmkit.export.export import export

        if (kind, precision) not in folders:
            folder = folders[kind, precision] = tmp_path_factory.mktemp("lowered") / f"{kind}-{precision}"
            export(str(checkpoint(kind)), folder, precision=precision, text=PROOF)
        return folders[kind, precision]

    return make


SIZES = '"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48'
ARCHITECTURES = {
    "bert": f'{{"model_type": "bert", {SIZES}}}',
    "convbert": f'{{"model_type": "convbert", {SIZES}, "embedding_size": 32, "head_ratio": 1}}',
    "roberta": f'{{"model_type": "roberta", {SIZES}}}',
    "modernbert": f'{{"model_type": "modernbert", "local_attention": 8, "global_attn_every_n_layers": 2, {SIZES}}}',
}
