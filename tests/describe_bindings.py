"""Prints, as JSON, what a module of compiled bindings holds: python describe_bindings.py MODULE PATH...

    classes.<name>.bases, .members (of an enum), .methods.<name> = signatures, .properties.<name> = {type, writable}
    functions.<name> = signatures        values.<name> = type

A signature is {parameters: [[name, type, required], ...], returns}. Types are names, "" where the bindings say none.
"""

import importlib
import inspect
import json
import re
import sys
from typing import Any

SIGNATURE = r"^(?:\d+\. )?{name}\((.*)\)(?: -> (.*))?$"


def split_arguments(text: str) -> list[str]:
    """At the commas that are in no brackets."""
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            parts.append(current.strip())
            current = ""
        else:
            current += letter
    return [*parts, current.strip()] if current.strip() else parts


def short(kind: str) -> str:
    """A type's own name; C++ names say nothing here."""
    kind = re.sub(r"\btensorrt(_rtx)?_bindings\.tensorrt(_rtx)?\.", "", kind)
    return "" if "::" in kind else kind.strip()


def parse(text: str, returns: str) -> dict[str, Any]:
    parameters = []
    for argument in split_arguments(text):
        name, _, rest = argument.partition(":")
        kind, default, _ = rest.partition("=")
        parameters.append([name.split("=")[0].split()[-1], short(kind), not (default or "=" in name)])
    return {"parameters": parameters, "returns": short(returns or "")}


def signatures(name: str, item: Any) -> list[dict[str, Any]]:
    """Of a compiled function from the first lines of its documentation, else from the function itself."""
    found = re.findall(SIGNATURE.format(name=re.escape(name)), item.__doc__ or "", re.MULTILINE)
    found = [(arguments, returns) for arguments, returns in found if arguments != "*args, **kwargs"]
    if found:
        return [parse(arguments, returns) for arguments, returns in found]
    try:
        text = str(inspect.signature(item))
    except ValueError:
        return []
    return [parse(text[1 : text.rindex(")")], "")]


def describe_class(item: type) -> dict[str, Any]:
    methods, properties, members = {}, {}, []
    if hasattr(item, "__members__"):  # an enum, of Python's or of pybind11's
        members = list(item.__members__)
    for name in dir(item):
        if name.startswith("_") and name != "__init__":
            continue
        value = inspect.getattr_static(item, name)
        if isinstance(value, property) or inspect.isgetsetdescriptor(value):
            getter = getattr(value, "fget", None)
            kind = re.search(r"-> (.*)", getattr(getter, "__doc__", None) or "")
            writable = getattr(value, "fset", value) is not None
            properties[name] = {"type": short(kind[1]) if kind else "", "writable": writable}
        elif callable(getattr(item, name)) and not isinstance(getattr(item, name), type) and name not in members:
            methods[name] = signatures(name, getattr(item, name))
    bases = [base.__name__ for base in item.__mro__[1:]]
    return {"bases": bases, "members": members, "methods": methods, "properties": properties}


def describe(module: Any) -> dict[str, Any]:
    classes, functions, values = {}, {}, {}
    for name in [*dir(module), "__version__"]:
        if name.startswith("_") and name != "__version__":
            continue
        item = getattr(module, name, None)
        if isinstance(item, type):
            classes[name] = describe_class(item)
            for inner, value in vars(item).items():
                if isinstance(value, type) and not inner.startswith("_"):
                    classes[f"{name}.{inner}"] = describe_class(value)
        elif inspect.ismodule(item):
            continue
        elif callable(item):
            functions[name] = signatures(name, item)
        else:
            values[name] = type(item).__name__
    return {"classes": classes, "functions": functions, "values": values}


if __name__ == "__main__":
    sys.path[:0] = sys.argv[2:]
    json.dump(describe(importlib.import_module(sys.argv[1])), sys.stdout)
