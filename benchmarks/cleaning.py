"""Mix 200 MB of real text with duplicates, near-duplicates and junk, and say what recipes/clean_corpus.py kept of it.

    python benchmarks/cleaning.py mix MIX --data $MLMKIT_DATA
    python recipes/clean_corpus.py MIX --output CLEANED --language en --workers 2
    python benchmarks/cleaning.py check MIX CLEANED/texts

The documents are Wikipedia articles and pieces of about 6,000 characters of novels in English and books in Portuguese.
Half of them appear again unchanged, half with 2 % of the words deleted and a header and a footer, half without their
last tenth; and 33 MB are junk: a paragraph repeated, numbers, menus, letters in random order.
"""

import argparse
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

from mlmkit.documents import read_documents
from mlmkit.locations import Source

FILES = 8
JUNK_BYTES = 33 << 20
PIECE = 6000  # characters
KINDS = ("original", "copy", "edited", "cut", "junk")


def articles(data: Path) -> Iterator[list[str]]:
    """The lines of each Wikipedia article: train.articles.tsv has their sizes."""
    sizes = [int(line.split("\t")[2]) for line in (data / "train.articles.tsv").read_text().splitlines()[1:]]
    lines = iter((data / "train.txt").read_text().splitlines())
    for size in sizes:
        article: list[str] = []
        while size > 0 and (line := next(lines, None)) is not None:
            article.append(line)
            size -= len(line.encode()) + 1
        yield article


def pieces(file: Path) -> Iterator[list[str]]:
    piece: list[str] = []
    for line in file.read_text().splitlines():
        piece.append(line)
        if sum(map(len, piece)) >= PIECE:
            yield piece
            piece = []


def junk(paragraphs: list[str], random: random.Random) -> str:
    paragraph = random.choice(paragraphs)
    words = paragraph.split()
    match random.randrange(4):
        case 0:
            return "\n".join([paragraph] * 20)
        case 1:
            return "\n".join(" ".join(str(random.randrange(10**6)) for _ in range(12)) for _ in range(60))
        case 2:
            return "\n".join(f"- {random.choice(words)[:12]} | {random.choice(words)[:12]} ..." for _ in range(80))
        case _:
            return " ".join("".join(random.sample(word, len(word))) for word in words * 3)


def edited(text: str, random: random.Random) -> str:
    kept = " ".join(word for word in text.split(" ") if random.random() > 0.02)
    return f"Home | About | Contact\n{kept}\nCopyright. All rights reserved. Page {random.randrange(10**6)}"


def mix(output: Path, data: Path) -> None:
    chosen = random.Random(0)
    originals = [
        *(("wiki", lines) for lines in articles(data / "wiki_en")),
        *(("novels", lines) for lines in pieces(data / "novels_en" / "train.txt")),
        *(("pt", lines) for lines in pieces(data / "books_pt" / "train.txt")),
    ]
    documents = []
    for number, (kind, lines) in enumerate(originals):
        text = "\n".join(lines)
        variants = {"copy": text, "edited": edited(text, chosen), "cut": text[: len(text) * 9 // 10]}
        texts = {"original": text} | {name: each for name, each in variants.items() if chosen.random() < 0.5}
        documents += [{"text": each, "source": f"{kind}-{number}", "kind": name} for name, each in texts.items()]
    paragraphs = [line for _, lines in originals for line in lines if len(line) > 300]
    size = 0
    while size < JUNK_BYTES:
        text = junk(paragraphs, chosen)
        size += len(text.encode())
        documents.append({"text": text, "source": f"junk-{size}", "kind": "junk"})
    chosen.shuffle(documents)
    output.mkdir(parents=True)
    for number in range(FILES):
        rows = (json.dumps(document, ensure_ascii=False) + "\n" for document in documents[number::FILES])
        (output / f"{number}.jsonl").write_text("".join(rows))


def check(mixed: Path, cleaned: Path) -> dict[str, object]:
    """Count what is kept, per source and kind, and the English originals of which no or several versions are kept."""
    rows = [json.loads(line) for path in sorted(mixed.iterdir()) for line in path.read_text().splitlines()]
    texts = defaultdict(list)
    for row in rows:
        texts[row["text"].strip()].append((row["source"], row["kind"]))
    kept = [texts[text][0] for text in read_documents(Source(str(cleaned)))]
    versions = Counter(source for source, _ in kept)
    english = {row["source"] for row in rows if row["source"].startswith(("wiki", "novels"))}
    sources = lambda pairs: dict(Counter(source.split("-")[0] for source, _ in pairs))  # noqa: E731
    return {
        "in": sources((row["source"], row["kind"]) for row in rows),
        "out": sources(kept),
        "english originals": len(english),
        "with one version kept": sum(versions[source] == 1 for source in english),
        "with several": sum(versions[source] > 1 for source in english),
        "kept by kind": dict(Counter(kind for _, kind in kept)),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["mix", "check"])
    parser.add_argument("mix", type=Path)
    parser.add_argument("cleaned", type=Path, nargs="?")
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "mix":
        mix(arguments.mix, arguments.data)
    else:
        print(json.dumps(check(arguments.mix, arguments.cleaned), indent=2))  # noqa: T201
