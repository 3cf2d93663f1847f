"""mkdocs hooks: make links work both on GitHub and on the site, and insert the help of the commands and
the template of a training configuration.

Links are written for GitHub, relative to their file. On the site, a link to a file outside `docs/` leads to the page
made from that file, or else to the file on GitHub. A broken link is left unchanged and fails the build.
"""

import os
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from mlmkit.cli import cli

ROOT = Path(__file__).parent
DOCS = ROOT / "docs"
PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md", "recipes.md": "recipes/README.md"}
REPOSITORY = "https://github.com/mlmkit/mlmkit"
HELP, SETTINGS = "<!-- help of every command -->", "<!-- every setting -->"
# Options and small numbers in the text, not in anchors and comments.
HYPHENATED = re.compile(r"(?<![\w!\"#-])(?:--[a-z][\w-]*|\d[\d.]*e-\d+)")
# Code comes first in the pattern, so that anything like a link inside code is skipped.
CODE_OR_LINK = re.compile(r"^(?:```|~~~).*?^(?:```|~~~)|`+[^`]+`+|(?<=\]\()(?P<target>[^()\s]+)(?=\))", re.M | re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages made from files outside `docs/`."""
    for page, source in PAGES.items():
        if (ROOT / source).exists():
            files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite the page's links, and insert the commands' help and the training template at their markers."""
    source = Path(page.file.abs_src_path)
    at = (DOCS / page.file.src_uri).parent

    def rewrite(match: re.Match[str]) -> str:
        link = match["target"]
        return match[0] if link is None else site_link(link, source.parent, at)

    settings = (ROOT / "mlmkit" / "train" / "template.toml").read_text(encoding="utf-8")
    page_text = CODE_OR_LINK.sub(rewrite, markdown).replace(HELP, commands_help())
    return page_text.replace(SETTINGS, f"```toml\n{settings}```")


def on_page_content(html: str, **_: Any) -> str:
    """Keep options such as `--output` and numbers such as 1e-05 on one line: browsers break after each hyphen."""
    return HYPHENATED.sub(r'<span class="unbroken">\g<0></span>', html)


def commands_help() -> str:
    """Return one section per command with its `--help` text, as Markdown."""
    group = click.Context(cli, info_name="mlmkit", **{**cli.context_settings, "terminal_width": 92})
    commands = {name: cli.get_command(group, name) for name in cli.list_commands(group)}
    contexts = [group, *(click.Context(found, group, name) for name, found in commands.items() if found)]
    return "\n".join(f"### {each.command_path}\n\n```text\n{each.get_help()}\n```\n" for each in contexts)


def site_link(link: str, source: Path, at: Path) -> str:
    """Return a link of a file in the folder `source` as a page of the site in the folder `at` needs it."""
    path, mark, anchor = link.partition("#")
    if not path or ":" in path:
        return link
    file = Path(os.path.normpath(source / path))
    pages = {ROOT / target: DOCS / page for page, target in PAGES.items()}
    target = pages.get(file, file)
    if target.is_relative_to(DOCS):
        return os.path.relpath(target, at) + mark + anchor
    if not file.exists() or not file.is_relative_to(ROOT):
        return link
    kind = "tree" if file.is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{file.relative_to(ROOT).as_posix()}{mark}{anchor}"
