"""What transformers, of whatever version, makes of a folder. Run as a script, it prints that of several as JSON."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
TEXTS = (
    "A Águia voa alto no céu azul.",
    "O rato roeu a roupa do rei de Roma; don't we've I'm he's n't . !",
    "  a\tb  cafe\u0301 İstanbul 中文 👍🏽 \u00a0 1,000 \n\n x",
    "a [MASK] <mask> </s> <s> [SEP][CLS] [PAD] <pad> [X] <ent> b",
)


def describe(folder: Path) -> dict[str, Any]:
    """What its tokenizer makes of the texts and, if there are weights, the logits at their tokens, flat."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    values = {
        "ids": ids,
        "words": [tokenizer(text).word_ids() for text in TEXTS],
        "batch": {name: tensor.tolist() for name, tensor in batch.items()},
        "pair": dict(tokenizer(TEXTS[0], TEXTS[1])),
        "decoded": [tokenizer.decode(each, skip_special_tokens=skip) for each in ids for skip in (False, True)],
        "named": {name: getattr(tokenizer, name) for name in NAMED},
        "special": sorted(set(tokenizer.all_special_tokens)),
        "size": len(tokenizer),
        "limit": tokenizer.model_max_length,
    }
    if (folder / "model.safetensors").exists():
        network = AutoModelForMaskedLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            values["logits"] = network(**batch).logits[batch["attention_mask"].bool()].flatten().tolist()
    return values


if __name__ == "__main__":
    sys.stdout.write(json.dumps([describe(Path(folder)) for folder in sys.argv[1:]]))
