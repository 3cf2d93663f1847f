"""The documentation: its links lead somewhere, its commands run, the site builds.

A fence of `bash` or `python` has a mark before it, an HTML comment that no reader sees:

    <!-- runnable -->                             it runs here, after those before it on the page, in one shell
    <!-- runnable: steps = 900 → steps = 4 -->    the same with less of it; several are parted by `;`
    <!-- not run: needs a GPU -->                 why it does not
    <!-- run by: tests/test_use.py -->            another test runs it
    <!-- run by: docs/phases.md -->               a translation: the same block of that page runs

Each page runs in a folder of its own, which holds what `material` puts there.
"""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import paragraphs
from interruptions import PROCESSES, command, free_port
from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parent.parent
MARKED = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = [*MARKED, *(ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md"))]
LANGUAGES = ("bash", "python")
PICTURE = "<picture>"  # one for the light and one for the dark page
# Pages with the commands of an English page: that page, and its names for what the translation's user names otherwise.
TRANSLATIONS = {
    "docs/pt/adaptar.md": (
        "docs/adapt.md",
        "adaptar.toml=adapt.toml teste.txt=heldout.txt geral.txt=general.txt dominio=domain geral=general "
        "adaptado=adapted comparacao=sweep acrescentado=added renovado=renewed vocabulario=vocabulary "
        "vocabulario.toml=vocabulary.toml palavras.txt=tokens.txt palavras=words palavra=word novas=chosen "
        "tokenizador=tokenizer quebra=is_split pedacos=pieces antes=before depois=after meio-termo=between "
        "medias=averaged teste=heldout",
    ),
    "docs/pt/fases.md": (
        "docs/phases.md",
        "fases.toml=phases.toml teste.txt=heldout.txt curta=short longa=long queda=decay em-fases=phased rapido=quick "
        "plato.toml=plateau.toml plato=plateau queda.toml=decay.toml ramo-300=branch-300 ramo-500=branch-500 "
        "media=averaged medida-media=averaged-heldout",
    ),
}
MARK = re.compile(r"<!-- (?:(?P<runnable>runnable)(?:: (?P<changes>.+))?|(?:not run|run by): (?P<reason>.+)) -->\s*")
# Not followed by the commit that had it last, as in "(at commit 20ba236)".
REPOSITORY_FILE = re.compile(
    r"(?<![\w/.:-])((?:benchmarks|deploy|examples|recipes|tests)/[\w/-]+\.\w+\b)"
    r"(?!`[\s(]+at\s(?:commit )?[0-9a-f]{7})"
)
SHELL = """
set -eu
fork() { command python -S -c "$CLIENT" "$@"; }
python() { if [ "$1" = -c ]; then fork "$@"; else command python "$@"; fi; }
mlmkit() {
    if [ "${1:-}" != serve ]; then
        fork "$@"
        return
    fi
    command mlmkit "$@" --port "$PORT" & SERVER=$!
    until curl --silent --fail --output /dev/null "http://127.0.0.1:$PORT/ready"; do
        kill -0 "$SERVER"; sleep 0.1
    done
}
end() { trap - EXIT; [ -z "${SERVER:-}" ] || { kill "$SERVER" && wait "$SERVER"; }; }
trap end EXIT
"""
CLIENT = """
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["FORKS"])
    socket.send_fds(server, [json.dumps([os.getcwd(), *sys.argv[1:]]).encode()], [0, 1, 2])
    sys.exit(server.recv(1)[0])
"""


class Block(NamedTuple):
    """A fence: where it stands, its language and text, and its mark, or what is wrong with it."""

    line: int
    language: str
    text: str
    runs: bool
    fault: str


@dataclass(frozen=True)
class Page:
    path: Path
    tokens: list[Token]

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    def blocks(self) -> Iterator[Block]:
        for before, token in zip([None, *self.tokens], self.tokens, strict=False):
            if token.type == "fence" and token.map:
                mark = MARK.fullmatch(before.content) if before and before.type == "html_block" else None
                yield read_block(token.map[0] + 1, token.info.strip(), token.content, mark)

    def links(self) -> Iterator[str]:
        for token in self.tokens:
            if token.content.startswith(PICTURE):
                yield from re.findall(r'src(?:set)?="(.+?)"', token.content)
            for child in token.children or ():
                target = child.attrGet({"link_open": "href", "image": "src"}.get(child.type, ""))
                if isinstance(target, str):
                    yield target

    def anchors(self) -> set[str]:
        """As GitHub makes them of headings; the site's are set to be the same."""
        found: set[str] = set()
        for before, token in zip(self.tokens, self.tokens[1:], strict=False):
            if before.type == "heading_open":
                text = "".join(child.content for child in token.children or ())
                slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
                repeats = sum(other == slug or bool(re.fullmatch(f"{re.escape(slug)}-\\d+", other)) for other in found)
                found.add(f"{slug}-{repeats}" if repeats else slug)
        return found


def read_block(line: int, language: str, text: str, mark: re.Match[str] | None) -> Block:
    if not language:
        return Block(line, language, text, False, "a fence without a language: say bash, python, toml, text, ...")
    if language not in LANGUAGES:
        return Block(line, language, text, False, "a mark on what nobody runs" if mark else "")
    if not mark:
        return Block(line, language, text, False, "neither <!-- runnable --> nor <!-- not run: REASON --> before it")
    for change in filter(None, (mark["changes"] or "").split(";")):
        old, arrow, new = (part.strip() for part in change.partition("→"))
        if not arrow or old not in text:
            return Block(line, language, text, False, f"its mark changes {old!r}, which is not in it")
        text = text.replace(old, new)
    return Block(line, language, text, mark["runnable"] is not None, "")


def read_page(path: Path) -> Page:
    return Page(path, MarkdownIt("commonmark").enable("table").parse(path.read_text(encoding="utf-8")))


PAGES = {path: read_page(path) for path in LINKED if path.exists()}


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_a_heading(page: Page):
    broken = []
    for link in page.links():
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        is_here = target.exists() and target.is_relative_to(ROOT)
        if not is_here or (anchor and anchor not in (PAGES.get(target) or read_page(target)).anchors()):
            broken.append(link)
    assert not broken


@pytest.mark.parametrize(
    "page", [page for page in PAGES.values() if page.name != "CHANGELOG.md"], ids=lambda page: page.name
)
def test_every_script_and_recipe_that_is_named_exists(page: Page):
    """Unless the text says in which commit it was last."""
    named = REPOSITORY_FILE.findall(page.path.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES.values(), ids=lambda page: page.name)
def test_a_tag_in_the_text_is_quoted(page: Page):
    """The sentence token of RoBERTa, bare, strikes out the rest of the page."""
    inline = [child for token in page.tokens for child in token.children or () if child.type == "html_inline"]
    allowed = ("<!--", PICTURE)
    blocks = [token for token in page.tokens if token.type == "html_block" and not token.content.startswith(allowed)]
    assert [token.content for token in (*inline, *blocks)] == []


@pytest.mark.parametrize("path", MARKED, ids=lambda path: PAGES[path].name)
def test_every_block_runs_or_says_why_not(path: Path):
    page = PAGES[path]
    assert [f"{page.name}:{block.line}: {block.fault}" for block in page.blocks() if block.fault] == []


@pytest.mark.parametrize("name", TRANSLATIONS)
def test_a_translation_has_the_commands_of_its_page(name: str):
    """So only one of the two has to run. Comments may differ, and the names of the user's own files and folders."""
    original, pairs = TRANSLATIONS[name]
    names = dict(pair.split("=") for pair in pairs.split())
    translated = [
        re.sub(r"[\w-]+(?:\.(?:toml|txt))?", lambda word: names.get(word[0], word[0]), each) for each in code(name)
    ]
    assert translated == code(original)


def code(name: str) -> list[str]:
    """The commands of a page, block by block, without comments and empty lines."""
    blocks = [token.content for token in PAGES[ROOT / name].tokens if token.info.strip() in LANGUAGES]
    return [re.sub(r"(?m)^\n", "", re.sub(r"(?m) *(?:^| )#.*$", "", block)) for block in blocks]


@pytest.mark.parametrize(
    ("text", "runs", "fault"),
    [
        ("<!-- runnable -->\n```bash\ntrue\n```", True, ""),
        ("<!-- runnable: true → :; x → y -->\n```bash\ntrue; x\n```", True, ""),
        ("<!-- runnable: false → : -->\n```bash\ntrue\n```", False, "changes 'false'"),
        ("<!-- not run: needs a GPU -->\n```bash\ntrue\n```", False, ""),
        ("<!-- run by: tests/test_use.py -->\n```python\ntrue\n```", False, ""),
        ("<!-- not run: -->\n```bash\ntrue\n```", False, "neither"),
        ("Text.\n```bash\ntrue\n```", False, "neither"),
        ("```\ntrue\n```", False, "without a language"),
        ("<!-- runnable -->\n```text\ntrue\n```", False, "nobody runs"),
    ],
)
def test_marks_are_read(tmp_path, text, runs, fault):
    (tmp_path / "page.md").write_text(text, encoding="utf-8")
    (block,) = read_page(tmp_path / "page.md").blocks()
    assert block.runs == runs
    assert fault in block.fault and bool(fault) == bool(block.fault)


@pytest.fixture(scope="module")
def material(tmp_path_factory, checkpoint, artifact) -> Path:
    """What the pages take for granted: a text, a configuration, a checkpoint, an artifact, by the pages' names."""
    folder = tmp_path_factory.mktemp("material")
    texts = [text for text in paragraphs() if len(text) < 400]
    for name, part in (("corpus.txt", texts[:60]), ("heldout.txt", texts[60:66]), ("sentences.txt", texts[66:68])):
        (folder / name).write_text("".join(f"{text}\n" for text in part), encoding="utf-8")
    (folder / "config.toml").write_text(
        '[data]\ntrain = "corpus.txt"\nheld_out = "heldout.txt"\n[tokenizer]\nvocab_size = 400\n'
        '[model]\narchitecture = "bert-tiny"\nmax_length = 64\n'
        "[train]\nsteps = 4\nglobal_batch_tokens = 1024\nmicro_batch_tokens = 512\nsave_every = 2\n",
        encoding="utf-8",
    )
    shutil.copytree(checkpoint("bert"), folder / "checkpoint")
    shutil.copytree(artifact("bert"), folder / "artifact")
    return folder


@pytest.fixture(scope="module")
def shell() -> None:
    if not shutil.which("bash") or not shutil.which("curl"):
        pytest.skip("bash and curl are not both here")


@pytest.mark.parametrize(
    "page", [page for page in PAGES.values() if any(block.runs for block in page.blocks())], ids=lambda page: page.name
)
def test_the_commands_run(page: Page, shell, material, forks, tmp_path):
    """`mlmkit serve` is the installed script; other commands are forks of a process that has imported everything.

    So are blocks of Python, but for clients of the server: the forks are offline.
    """
    done = run_page(page, material, tmp_path, forks)
    assert done.returncode == 0, done.stdout[-3000:]


@pytest.fixture(scope="module")
def forks(tmp_path_factory) -> Iterator[str]:
    """The socket of a server that forks for each command of a page, with everything imported."""
    path = str(tmp_path_factory.mktemp("forks") / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        threading.Thread(target=start_commands, args=(listener,), daemon=True).start()
        yield path
        listener.shutdown(socket.SHUT_RDWR)


def start_commands(listener: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the listener is closed
        while True:
            client, _ = listener.accept()
            with client:
                PROCESSES.Process(target=command, args=(client,)).start()


def run_page(page: Page, material: Path, folder: Path, forks: str) -> subprocess.CompletedProcess[str]:
    """Its runnable blocks, one after another, in a folder with what they take for granted."""
    port = free_port()
    script = [SHELL]
    for block in page.blocks():
        if block.runs:
            text = block.text.replace(":8000", f":{port}")
            script.append(f"echo '--- {page.name}:{block.line}' >&2")
            run = "command python" if f":{port}" in text else "fork"
            script.append(f"{run} - <<'END_OF_BLOCK'\n{text}END_OF_BLOCK" if block.language == "python" else text)
    for source in material.iterdir():
        if not re.search(rf"--output {source.name}\s", "\n".join(script)):  # else the page makes its own
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / source.name)
    return run_bash("\n".join([*script, "end"]), folder, {"PORT": str(port), "FORKS": forks, "CLIENT": CLIENT})


def run_bash(script: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """In a shell whose `python`, `mlmkit` and `torchrun` are those of this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    source = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "PYTHONPATH": source, "HF_HUB_OFFLINE": "0", **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,  # ends what hangs: README's commands took 208 seconds beside another test process
    )


def test_bash_completes(shell, tmp_path):
    (tmp_path / "wikitalk.txt").touch()
    cases = {
        "eval --mask": {"--mask-seed", "--mask-seeds", "--mask-prob"},
        "eval run --backend = t": {"torch", "tensorrt"},  # bash splits words at "="
        "eval run --set wikit": {"wikitext-2", "wikitext-103", "wikitalk.txt"},
        "train --set optim.l": {"optim.lr="},
    }
    script = """
    eval "$(_MLMKIT_COMPLETE=bash_source mlmkit)"
    compopt() { :; }  # bash allows it only while it completes
    complete_words() {
        COMP_WORDS=(mlmkit "$@"); COMP_CWORD=$#; _mlmkit_completion mlmkit "${@: -1}"
        echo "${COMPREPLY[@]}" | tr '\n' ' '; echo
    }
    """ + "".join(f"complete_words {words}\n" for words in cases)
    done = run_bash(script, tmp_path, {})
    assert done.returncode == 0, done.stdout
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(cases.values())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    if not find_spec("mkdocs") or not find_spec("material") or not find_spec("mkdocstrings"):
        pytest.skip("the docs extra is not installed: pip install '.[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path):
    pages = {path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    assert {"index.html", "pt/quickstart.html", "api.html", "changelog.html"} <= set(pages)
    loads = re.compile(r'<(?:script|img|iframe)[^>]* src="?http[^>]*>|<link(?![^>]*canonical)[^>]* href="?http[^>]*>')
    assert {name: found for name, text in pages.items() if (found := loads.findall(text))} == {}


def test_the_site_has_the_links_the_help_and_the_docstrings(site: Path):
    assert 'href="recipes.html"' in (site / "results.html").read_text(encoding="utf-8")
    assert 'href="training.html"' in (site / "index.html").read_text(encoding="utf-8")
    assert "final_mask_prob" in (site / "training.html").read_text(encoding="utf-8")
    assert "Usage: mlmkit serve [OPTIONS] MODEL" in (site / "cli.html").read_text(encoding="utf-8")
    assert 'id="mlmkit.evaluate"' in (site / "api.html").read_text(encoding="utf-8")
