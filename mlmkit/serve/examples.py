"""An example text in the model's own language, for the page and the API's documentation. The model card has it."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlmkit.artifact import CARD
from mlmkit.errors import UserError, as_user_error

log = logging.getLogger(__name__)

CARD_BYTES = 1 << 20  # a larger card is not read: anyone may have written it, as no hash covers it
CHARACTERS = 1000  # a longer text is no example: /info and the API's document repeat it
LANGUAGE = re.compile(r"[a-z]{2,3}(-[a-z\d]+)*", re.ASCII | re.IGNORECASE)


@dataclass(frozen=True)
class Example:
    """A text with a mask, "" if there is none, and the ISO 639 code of its language, "" if that is not known."""

    text: str = ""
    language: str = ""


def read_example(folder: Path, mask_token: str) -> Example:
    """The first `widget` text with this mask token, and the `language`, in the front matter of the README.md.

    Without a card, or with one that cannot be read, the example is empty: a text in another language would mislead.
    """
    path = folder / CARD
    if not path.is_file():
        return Example()
    from huggingface_hub.repocard import metadata_load

    try:
        with as_user_error(path, "no example is shown, because the front matter cannot be read"):
            if path.stat().st_size > CARD_BYTES:
                raise ValueError(f"the file is larger than {CARD_BYTES} bytes")
            front = metadata_load(path) or {}
    except UserError as error:
        log.warning("%s", error)
        return Example()
    texts = [each.get("text") for each in _list(front.get("widget")) if isinstance(each, dict)]
    languages = _list(front.get("language"))
    return Example(
        next((text for text in texts if isinstance(text, str) and mask_token in text and _is_shown(text)), ""),
        languages[0] if len(languages) == 1 and LANGUAGE.fullmatch(str(languages[0])) else "",
    )


def _is_shown(text: str) -> bool:
    """Whether a text is short, and without characters that JSON or a page cannot show, such as half surrogates."""
    return len(text) <= CHARACTERS and " ".join(text.split()).isprintable()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
