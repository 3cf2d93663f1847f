"""Text, jsonl, parquet and hub datasets → documents → token ids → windows, with a token cache on disk.

A document is a text. A token's place is its document (index in corpus order) and its offset there; windows only say
which tokens a model sees together.
"""

import codecs
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from hashlib import blake2b, sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.errors import UserError, require
from mlmkit.files import file_sha256
from mlmkit.masking import document_key
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

HUB = "hub:"
CACHE_FORMAT = 1
DOCUMENTS_PER_BATCH = 1024


# ---------------------------------------------------------------- text → documents


@dataclass(frozen=True)
class Source:
    """Where documents come from.

    `location` is a file (`.jsonl`, `.json` of one object a line, `.parquet`, anything else is text) or
    `hub:NAME[:CONFIG][@SPLIT]` for a dataset of the hub or a local folder that `datasets` can read. `text_field` is
    the column or key that holds the text. `blank_line` makes blocks of lines the documents of a text file.
    """

    location: str
    text_field: str = "text"
    blank_line: bool = False


def read_documents(source: Source) -> Iterator[str]:
    """The documents, in order. A text of white space only is no document.

    Raises `UserError`, naming the file and the line, when something cannot be read as text.
    """
    for text in _read_texts(source):
        if text and not text.isspace():
            yield text


def _read_texts(source: Source) -> Iterator[str]:
    if source.location.startswith(HUB):
        yield from _read_hub(source)
        return
    path = existing_file(source.location)
    match path.suffix:
        case ".jsonl" | ".json" | ".ndjson":
            yield from _read_jsonl(path, source.text_field)
        case ".parquet":
            yield from _read_parquet(path, source.text_field)
        case _ if source.blank_line:
            yield from _blocks(_read_lines(path))
        case _:
            yield from _read_lines(path)


def existing_file(location: str) -> Path:
    """The path, or `UserError` if it is missing, a folder or unreadable."""
    path = Path(location)
    if path.is_dir():
        raise UserError(f"{location} is a folder: name a file in it, or {HUB}{location} to read it with datasets")
    if not path.exists():
        raise UserError(f"{location}: no such file (a dataset of the hub is written {HUB}NAME)")
    if not os.access(path, os.R_OK):
        raise UserError(f"{location}: no permission to read it")
    return path


def _read_lines(path: Path) -> Iterator[str]:
    """Lines of UTF-8, split at LF alone, one CR before it dropped: mask-v1 fixes this, and `str.splitlines` differs."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removesuffix(b"\n").removesuffix(b"\r") if line.endswith(b"\n") else line
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise UserError(f"{path}: this is UTF-16: convert it to UTF-8 (iconv -f UTF-16 -t UTF-8)")
            try:
                yield line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path}: line {number}, byte {error.start + 1} is not UTF-8 (0x{line[error.start]:02x}): "
                    "convert the file to UTF-8 (for example iconv -f LATIN1 -t UTF-8)"
                ) from None


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Blocks of lines between lines of white space, joined by LF."""
    block: list[str] = []
    for line in lines:
        if line and not line.isspace():
            block.append(line)
        elif block:
            yield "\n".join(block)
            block = []
    if block:
        yield "\n".join(block)


def _read_jsonl(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_read_lines(path), start=1):
        if not line or line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: line {number} is not JSON: {error}") from None
        if not isinstance(row, dict) or field not in row:
            known = f" (it has {', '.join(row)})" if isinstance(row, dict) else ""
            raise UserError(f"{path}: line {number} has no field {field!r}{known}: choose one with --text-field")
        yield _checked(row[field], f"{path}: line {number}, field {field!r}")


def _read_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        if field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: no column {field!r} (it has {columns}): choose one with --text-field")
        row = 0
        for batch in file.iter_batches(columns=[field]):
            for value in batch.column(0).to_pylist():
                yield _checked(value, f"{path}: row {row}, column {field!r}")
                row += 1
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _read_hub(source: Source) -> Iterator[str]:
    dataset = _load_hub(source.location)
    if source.text_field not in (dataset.column_names or []):
        columns = ", ".join(dataset.column_names or [])
        raise UserError(f"{source.location}: no column {source.text_field!r} (it has {columns}): use --text-field")
    for row, value in enumerate(dataset[source.text_field]):
        yield _checked(value, f"{source.location}: row {row}")


def _load_hub(location: str) -> Any:
    require("train", "datasets")
    import datasets

    name, _, split = location.removeprefix(HUB).partition("@")
    name, _, config = name.partition(":")
    datasets.disable_progress_bars()
    for library in ("datasets", "huggingface_hub", "fsspec"):
        logging.getLogger(library).setLevel(logging.CRITICAL)  # what goes wrong is said below, in one line
    try:
        return datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # datasets raises many kinds, for many causes: a missing name, split, network
        cause = error.__cause__ or error
        first_line = next(iter(str(cause).splitlines()), "")
        raise UserError(f"{location}: cannot be loaded: {type(cause).__name__}: {first_line}") from None


def _checked(value: object, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place} holds {type(value).__name__}, not text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f"{place} holds half a surrogate pair, which is no Unicode text") from None
    return value


# ---------------------------------------------------------------- documents → token ids, and the cache


@dataclass(frozen=True)
class Corpus:
    """A tokenised corpus. The arrays may be memory maps.

    `ids` and `words` `[tokens]` are flat; document d owns `ids[starts[d] : starts[d + 1]]`. Per document: `keys`
    uint64 and `text_sizes` int64 `[documents, 3]`: white-space words, characters, UTF-8 bytes. `fingerprint`
    identifies the texts and their order, whatever the tokenizer.
    """

    ids: NDArray[np.integer]
    words: NDArray[np.int32]
    starts: NDArray[np.int64]
    keys: NDArray[np.uint64]
    text_sizes: NDArray[np.int64]
    fingerprint: str

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each document, `[documents]`."""
        return np.diff(self.starts)

    def __len__(self) -> int:
        return len(self.keys)


def load_corpus(source: Source, tokenizer: Tokenizer) -> Corpus:
    """The tokenised corpus, from the cache if this text was tokenised so before.

    The cache lies in `$MLMKIT_CACHE` (default `~/.cache/mlmkit`), a folder a corpus, named by a hash of the file's
    bytes, the reading options and the tokenizer; it is written under another name and renamed, so a folder there is
    whole.
    """
    root = Path(os.environ.get("MLMKIT_CACHE") or Path.home() / ".cache" / "mlmkit")
    folder = root / "tokens" / _cache_key(source, tokenizer)
    if not (folder / "meta.json").exists():
        _tokenize_into(folder, read_documents(source), tokenizer, source.location)
    return _open_corpus(folder)


def tokenize(texts: Iterable[str], tokenizer: Tokenizer) -> Corpus:
    """The same in memory, for a few texts; empty ones are documents here, with no tokens."""
    with tempfile.TemporaryDirectory() as folder:
        _tokenize_into(Path(folder) / "corpus", texts, tokenizer, "no texts given")
        mapped = _open_corpus(Path(folder) / "corpus")
        arrays = {name: np.array(getattr(mapped, name)) for name in (*_ARRAYS, "starts")}
        return Corpus(**arrays, fingerprint=mapped.fingerprint)


_ARRAYS = ("ids", "words", "keys", "text_sizes")


def _cache_key(source: Source, tokenizer: Tokenizer) -> str:
    if source.location.startswith(HUB):
        content = _load_hub(source.location)._fingerprint
    else:
        path = existing_file(source.location)
        if not path.is_file():
            raise UserError(f"{source.location} is a pipe, which can be read once only: save its content to a file")
        content = file_sha256(path)
    options = asdict(source) | {"location": Path(source.location).suffix, "content": content}
    identity = json.dumps([CACHE_FORMAT, options, tokenizer.fingerprint], sort_keys=True)
    return sha256(identity.encode()).hexdigest()[:32]


def _tokenize_into(folder: Path, texts: Iterable[str], tokenizer: Tokenizer, location: str) -> None:
    """Tokenise in batches, appending to flat files, so that memory does not grow with the corpus."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building.", dir=folder.parent))
    except OSError as error:
        raise _cache_error(folder, error) from None
    try:
        dtypes = {"ids": _id_dtype(tokenizer), "words": "<i4", "keys": "<u8", "text_sizes": "<i8"}
        files = {name: (building / name).open("wb") for name in _ARRAYS}
        fingerprint, lengths = blake2b(digest_size=16), [np.zeros(1, dtype=np.int64)]
        try:
            for batch in _batched(texts, DOCUMENTS_PER_BATCH):
                tokens = tokenizer.encode(batch)
                keys = np.array([document_key(text) for text in batch], dtype=np.uint64)
                sizes = np.array([[len(text.split()), len(text), len(text.encode())] for text in batch])
                columns = {"ids": tokens.ids, "words": tokens.words, "keys": keys, "text_sizes": sizes}
                try:
                    for name, values in columns.items():
                        files[name].write(values.astype(dtypes[name]).tobytes())
                except OSError as error:
                    raise _cache_error(folder, error) from None
                lengths.append(tokens.lengths)
                fingerprint.update(keys.astype("<u8").tobytes())
        finally:
            for file in files.values():
                file.close()
        starts = np.cumsum(np.concatenate(lengths))
        if len(starts) == 1:
            raise UserError(f"{location}: no documents in it (it is empty, or white space only)")
        np.save(building / "starts.npy", starts)
        meta = {"dtypes": dtypes, "fingerprint": fingerprint.hexdigest()}
        (building / "meta.json").write_text(json.dumps(meta))
        try:
            building.rename(folder)
        except OSError:
            if not (folder / "meta.json").exists():  # else another process was faster with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _cache_error(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write the token cache {folder.parent}: {error.strerror}: point MLMKIT_CACHE elsewhere")


def _open_corpus(folder: Path) -> Corpus:
    try:
        return _map_corpus(folder)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"the token cache {folder} is damaged: delete that folder and run again") from None


def _map_corpus(folder: Path) -> Corpus:
    meta = json.loads((folder / "meta.json").read_text())
    starts = np.load(folder / "starts.npy", allow_pickle=False)
    documents, tokens = len(starts) - 1, int(starts[-1])
    shapes = {"ids": (tokens,), "words": (tokens,), "keys": (documents,), "text_sizes": (documents, 3)}
    arrays = {}
    for name, shape in shapes.items():
        dtype = np.dtype(meta["dtypes"][name])
        if (folder / name).stat().st_size != int(np.prod(shape)) * dtype.itemsize:
            raise ValueError(f"{name} has another size")
        # an empty file cannot be mapped
        arrays[name] = (
            np.memmap(folder / name, dtype, "r", shape=shape) if tokens else np.fromfile(folder / name, dtype)
        )
    arrays["text_sizes"] = arrays["text_sizes"].reshape(documents, 3)
    return Corpus(**arrays, starts=starts, fingerprint=meta["fingerprint"])


def _id_dtype(tokenizer: Tokenizer) -> str:
    return "<u2" if tokenizer.vocabulary_size <= 1 << 16 else "<u4"


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    iterator = iter(texts)
    while batch := list(islice(iterator, size)):
        yield batch


# ---------------------------------------------------------------- token ids → windows


@dataclass(frozen=True)
class Windows:
    """Spans of documents: window w is tokens `start[w] : start[w] + length[w]` of `document[w]`; each `[windows]`."""

    document: NDArray[np.int64]
    start: NDArray[np.int64]
    length: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.document)


def ranges(begin: NDArray[np.int64], length: NDArray[np.int64]) -> NDArray[np.int64]:
    """`begin[i], begin[i] + 1, ...` for `length[i]` entries, one after the other."""
    return np.arange(int(length.sum())) + np.repeat(begin - (np.cumsum(length) - length), length)


def cut_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Cut each document into the fewest pieces of at most `capacity` tokens, equal to within one: for training.

    A document of no tokens has no window.
    """
    pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), pieces)
    piece = ranges(np.zeros_like(pieces), pieces)
    begin = piece * lengths[document] // pieces[document]
    end = (piece + 1) * lengths[document] // pieces[document]
    return Windows(document, begin, end - begin)


def overlapping_windows(lengths: NDArray[np.int64], capacity: int) -> Windows:
    """Windows for evaluation. A document that fits is one window.

    A longer one gets windows of `capacity` tokens, the fewest whose steps are at most half a window, spread evenly
    from its first token to its last: window k of m starts at `k * (n - capacity) // (m - 1)`.
    """
    excess = np.maximum(lengths - capacity, 0)
    step = max(capacity // 2, 1)
    count = np.where(lengths == 0, 0, 1 + -(-excess // step))
    document = np.repeat(np.arange(len(lengths)), count)
    index = ranges(np.zeros_like(count), count)
    start = index * excess[document] // np.maximum(count[document] - 1, 1)
    return Windows(document, start, np.minimum(lengths[document], capacity))


def nearest_window(windows: Windows, document: NDArray[np.int64], offset: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each token the window that scores it, `[tokens]`: the one whose centre is nearest, the earlier on a tie.

    `document` and `offset` `[tokens]` place the tokens. Each document's windows must be in order, and cover it.
    """
    # Window k of a document serves offsets up to the midpoint between its centre and the next one's. Twice the centre
    # is 2 * start + length - 1, an integer, so the comparison is exact.
    doubled = 2 * windows.start + windows.length - 1
    same_document = windows.document[1:] == windows.document[:-1]
    stride = int(offset.max(initial=0)) + 1
    to_the_end = stride - 1
    last_offset = np.append(np.where(same_document, (doubled[1:] + doubled[:-1]) // 4, to_the_end), to_the_end)
    served_up_to = windows.document * stride + np.minimum(last_offset[: len(windows)], to_the_end)
    return np.searchsorted(served_up_to, document * stride + offset)
