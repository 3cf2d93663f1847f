"""Shell completion: what is offered for each kind of value, and what click's scripts for bash and zsh lack.

    TAB → the shell's function → mlmkit, with the words in COMP_WORDS → click finds the option or argument → `offers`

click's scripts add a space after `optim.lr=`, offer no files beside the names of sets, and complete no value in
`--backend=to`, which bash splits at the `=`.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from click.shell_completion import BashComplete, CompletionItem, ZshComplete, add_completion_class, split_arg_string

PACKAGE = Path(__file__).parent.parent
FILES = {"FILE", "CONFIG"}
FOLDERS = {"MODEL", "RUN", "CHECKPOINT", "ARTIFACT", "RESULT", "OUTPUT", "DIR"}


def offers(metavar: str, incomplete: str) -> list[CompletionItem]:
    """What completes a value: the lower-case words of its metavar, names of sets or settings, files or folders."""
    kinds = re.findall(r"[\w.=-]+", re.sub(r"_[A-Z]\b", "", metavar))
    names = [name for kind in kinds for name in (NAMES[kind]() if kind in NAMES else [kind] if kind.islower() else [])]
    found = [CompletionItem(name) for name in names if name.startswith(incomplete) and name != incomplete]
    if not FILES.isdisjoint(kinds):
        return [*found, CompletionItem(incomplete, type="file")]
    return found if FOLDERS.isdisjoint(kinds) else [*found, CompletionItem(incomplete, type="dir")]


def setting_keys() -> list[str]:
    """Every `TABLE.KEY=` of a training configuration, in the order of the template that --print-config prints."""
    table, keys = "", []
    for line in (PACKAGE / "train" / "template.toml").read_text(encoding="utf-8").splitlines():
        if header := re.match(r"(# )?\[+(\w+)", line):
            table = "" if header[1] else header[2]  # --set takes no key of the tables that are commented out
        elif table and (key := re.match(r"(?:# )?(\w+) = ", line)):
            keys.append(f"{table}.{key[1]}=")
    return keys


def _set_names() -> Iterable[str]:
    return sorted(path.stem for path in (PACKAGE / "eval" / "sets").glob("*.toml"))


NAMES: dict[str, Callable[[], Iterable[str]]] = {"SET": _set_names, "TABLE.KEY=VALUE": setting_keys}


@add_completion_class
class _Bash(BashComplete):
    source_template = """\
%(complete_func)s() {
    local IFS=$'\\n' kind value has_files=
    COMPREPLY=()
    while IFS=, read -r kind value; do
        case $kind in
            dir) compopt -o dirnames ;;
            file) compopt -o default; has_files=1 ;;
            plain) COMPREPLY+=("$value") ;;
        esac
    done < <(COMP_WORDS="${COMP_WORDS[*]}" COMP_CWORD=$COMP_CWORD %(complete_var)s=bash_complete "$1")
    if [[ $has_files && ${COMPREPLY[0]-} ]]; then
        compopt -o filenames
        mapfile -t -O ${#COMPREPLY[@]} COMPREPLY < <(compgen -f -- "$2")
    fi
    if [[ ${COMPREPLY[0]-} == *= ]]; then compopt -o nospace; fi
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        words = os.environ["COMP_WORDS"].split("\n")[1 : int(os.environ["COMP_CWORD"]) + 1]
        whole = re.sub(r"\n?(=+)\n?", r"\1", "\n".join(words)).split("\n")  # bash has split `--backend=to` at the `=`
        *arguments, incomplete = (next(iter(split_arg_string(word)), "") for word in whole)
        return arguments, incomplete


@add_completion_class
class _Zsh(ZshComplete):
    source_template = """\
#compdef %(prog_name)s
%(complete_func)s() {
    local -a response values keys described
    local kind value text
    response=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")
    compset -P '*='
    for kind value text in "${(@)response}"; do
        case $kind in
            dir) _path_files -/ ;;
            file) _path_files ;;
            plain)
                if [[ $text != _ ]]; then described+=("$value:$text")
                elif [[ $value == *= ]]; then keys+=("$value")
                else values+=("$value"); fi ;;
        esac
    done
    (( $#described )) && _describe -V unsorted described
    (( $#values )) && compadd -V unsorted -a values
    (( $#keys )) && compadd -V unsorted -S '' -a keys
}
compdef %(complete_func)s %(prog_name)s
"""
