"""Checks every use of compiled bindings in a source file against what the bindings hold (describe_bindings.py).

Types are known from annotations, from what a constructor or a method's signature returns, from assignments and loops.
An attribute of a value whose type is not known must be one that Python, numpy or mlmkit itself has: so a call of the
bindings that the inference cannot follow is a failure too, not a hole.
"""

import ast
import ctypes
import hashlib
import logging
import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

PYTHON = (str, bytes, int, float, list, dict, set, tuple, Path, np.ndarray, np.dtype, np, np.ctypeslib, Progress)
PYTHON += (logging.Logger, threading.Condition, OSError, type(ctypes.c_uint8), hashlib.sha256(), re.Pattern, re.Match)
MODULES = {"ast", "ctypes", "hashlib", "json", "logging", "np", "re", "signal", "threading", "weakref"}


@dataclass(frozen=True)
class Type:
    """`kind`: module, class, value (an instance), method, function, list (of `name`), or python (nothing to check)."""

    kind: str
    module: str = ""
    name: str = ""
    member: str = ""


PLAIN = Type("python")


@dataclass
class Checker:
    """`apis`: what each module holds, by the name that the sources import it under."""

    apis: dict[str, dict[str, Any]]
    ordinary: set[str]
    returns: dict[str, Type | None] = field(default_factory=dict)
    fields: dict[str, Type] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    uses: list[ast.Attribute] = field(default_factory=list)
    own_class: str = ""

    # -------------------------------------------------------------- what an expression is

    def annotation(self, node: ast.expr | None) -> Type | None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node = ast.parse(node.value, mode="eval").body
        if isinstance(node, ast.BinOp):
            return self.annotation(node.left) or self.annotation(node.right)
        if isinstance(node, ast.Attribute):
            found = self.infer(node, {})
            if found and found.kind == "class":
                return Type("value", found.module, found.name)
        return None

    def infer(self, node: ast.expr | None, env: dict[str, Type | None]) -> Type | None:
        """The type of an expression, checking all of it."""
        if node is None:
            return None
        if isinstance(node, ast.Name):
            return Type("module", node.id) if node.id in self.apis else env.get(node.id, self.returns.get(node.id))
        if isinstance(node, ast.Attribute):
            return self.attribute(node, env)
        if isinstance(node, ast.Call):
            return self.call(node, env)
        if isinstance(node, ast.Constant | ast.JoinedStr):
            self.children(node, env)
            return PLAIN
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            return self.comprehension(node, env)
        if isinstance(node, ast.Lambda):
            return self.infer(node.body, {**env, **{argument.arg: None for argument in node.args.args}})
        if isinstance(node, ast.NamedExpr) and isinstance(node.target, ast.Name):
            env[node.target.id] = self.infer(node.value, env)
            return env[node.target.id]
        self.children(node, env)
        return None

    def children(self, node: ast.AST, env: dict[str, Type | None]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.infer(child, env)
            elif not isinstance(child, ast.expr_context | ast.operator | ast.cmpop | ast.unaryop | ast.boolop):
                self.children(child, env)

    def attribute(self, node: ast.Attribute, env: dict[str, Type | None]) -> Type | None:
        if isinstance(node.value, ast.Name) and node.value.id == "self" and self.own_class:
            return self.fields.get(f"{self.own_class}.{node.attr}")
        base = self.infer(node.value, env)
        if base is None or base.kind == "list" or base == PLAIN:
            plain = isinstance(node.value, ast.Name) and node.value.id in MODULES
            if node.attr not in self.ordinary and not plain:
                self.problem(node, f".{node.attr} of a value whose type is not known")
            return None
        self.uses.append(node)
        api = self.apis[base.module]
        if base.kind == "module":
            if node.attr in api["classes"]:
                return Type("class", base.module, node.attr)
            if node.attr in api["functions"]:
                return Type("function", base.module, node.attr)
            if node.attr in api["values"]:
                return Type("value", base.module, api["values"][node.attr])
            self.problem(node, f"{base.module}.{node.attr} does not exist")
            return None
        described = api["classes"].get(base.name)
        if base.kind == "class" and f"{base.name}.{node.attr}" in api["classes"]:
            return Type("class", base.module, f"{base.name}.{node.attr}")
        if described is None:
            return None  # an int, a str: not of the bindings
        if node.attr == "__members__" and described["members"]:
            return None
        if node.attr in described["members"]:
            return Type("value", base.module, base.name)
        if node.attr in described["methods"]:
            return Type("method", base.module, base.name, node.attr)
        if node.attr in described["properties"] and base.kind == "value":
            if isinstance(node.ctx, ast.Store) and not described["properties"][node.attr]["writable"]:
                self.problem(node, f"{base.name}.{node.attr} cannot be set")
            return self.value(base.module, described["properties"][node.attr]["type"])
        self.problem(node, f"{base.module}.{base.name} has no {node.attr}")
        return None

    def value(self, module: str, name: str) -> Type | None:
        return Type("value", module, name) if name in self.apis[module]["classes"] else PLAIN if name else None

    def comprehension(self, node: Any, env: dict[str, Type | None]) -> Type | None:
        inner = dict(env)
        for generator in node.generators:
            self.bind(generator.target, self.element(self.infer(generator.iter, inner)), inner)
            for condition in generator.ifs:
                self.infer(condition, inner)
        if isinstance(node, ast.DictComp):
            self.infer(node.key, inner)
            self.infer(node.value, inner)
            return None
        found = self.infer(node.elt, inner)
        return Type("list", found.module, found.name) if found and found.kind == "value" else None

    @staticmethod
    def element(found: Type | None) -> Type | None:
        return Type("value", found.module, found.name) if found and found.kind == "list" else None

    # -------------------------------------------------------------- calls

    def call(self, node: ast.Call, env: dict[str, Type | None]) -> Type | None:
        function = self.infer(node.func, env)
        given = [self.infer(argument, env) for argument in node.args]
        named = {keyword.arg: self.infer(keyword.value, env) for keyword in node.keywords}
        if function is None or function.kind not in ("class", "method", "function"):
            # A function of mlmkit's own is known by what it returns.
            return function if isinstance(node.func, ast.Name) and function and function.kind == "value" else None
        api = self.apis[function.module]
        if function.kind == "function":
            signatures, returns = api["functions"][function.name], None
        elif function.kind == "class":
            signatures = api["classes"][function.name]["methods"].get("__init__", [])
            returns = Type("value", function.module, function.name)
        else:
            signatures, returns = api["classes"][function.name]["methods"][function.member], None
        bound = function.kind == "class" or (function.kind == "method" and function.member != "__init__")
        if not signatures or any(isinstance(argument, ast.Starred) for argument in node.args):
            return returns
        misfits = [self.misfit(signature, given, named, bound, function.module) for signature in signatures]
        if all(misfits):
            self.problem(node, f"{function.name}.{function.member}: {misfits[0]}".replace(".:", ":"))
            return returns
        fitting = signatures[misfits.index("")]
        return returns or self.value(function.module, fitting["returns"])

    def misfit(
        self,
        signature: dict[str, Any],
        given: list[Type | None],
        named: dict[str | None, Type | None],
        bound: bool,
        module: str,
    ) -> str:
        """Why the arguments are not of this signature, or nothing."""
        parameters = signature["parameters"][1 if bound else 0 :]
        if len(given) > len(parameters):
            return f"takes {len(parameters)} arguments, not {len(given)}"
        names = [name for name, _, _ in parameters]
        if unknown := [name for name in named if name not in names[len(given) :]]:
            return f"has no argument {unknown[0]}"
        values = dict(zip(names, given, strict=False)) | named
        if missing := [name for name, _, required in parameters if required and name not in values]:
            return f"lacks the argument {missing[0]}"
        for name, kind, _ in parameters:
            found, classes = values.get(name), self.apis[module]["classes"]
            if found and found.kind == "value" and found.module == module and kind in classes and name != "self":
                described = classes.get(found.name, {"bases": []})
                if kind not in (found.name, *described["bases"]):
                    return f"wants a {kind} as {name}, not a {found.name}"
        return ""

    # -------------------------------------------------------------- statements

    def bind(self, target: ast.expr, found: Type | None, env: dict[str, Type | None]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = found
        elif isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
            if found:
                self.fields[f"{self.own_class}.{target.attr}"] = found
        elif isinstance(target, ast.Tuple | ast.List):
            for item in target.elts:
                self.bind(item, None, env)
        else:
            self.infer(target, env)

    def block(self, statements: Iterable[ast.stmt], env: dict[str, Type | None]) -> None:
        for statement in statements:
            self.statement(statement, env)

    def statement(self, node: ast.stmt, env: dict[str, Type | None]) -> None:
        if isinstance(node, ast.FunctionDef):
            self.function(node, env)
        elif isinstance(node, ast.ClassDef):
            self.klass(node, env)
        elif isinstance(node, ast.Assign):
            self.assign(node.targets, node.value, env)
        elif isinstance(node, ast.AnnAssign):
            found = self.infer(node.value, env)
            self.bind(node.target, self.annotation(node.annotation) or found, env)
        elif isinstance(node, ast.For):
            self.bind(node.target, self.element(self.infer(node.iter, env)), env)
            self.block([*node.body, *node.orelse], env)
        elif isinstance(node, ast.With):
            for item in node.items:
                self.infer(item.context_expr, env)
                if item.optional_vars:
                    self.bind(item.optional_vars, None, env)
            self.block(node.body, env)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.stmt):
                    self.statement(child, env)
                elif isinstance(child, ast.ExceptHandler):
                    self.block(child.body, env)
                elif isinstance(child, ast.expr):
                    self.infer(child, env)

    def assign(self, targets: list[ast.expr], value: ast.expr, env: dict[str, Type | None]) -> None:
        for target in targets:
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                for part, item in zip(target.elts, value.elts, strict=True):
                    self.assign([part], item, env)
            else:
                self.bind(target, self.infer(value, env), env)

    def function(self, node: ast.FunctionDef, env: dict[str, Type | None]) -> None:
        inner = dict(env)
        for argument in [*node.args.args, *node.args.kwonlyargs]:
            inner[argument.arg] = self.annotation(argument.annotation)
        self.annotation(node.returns)
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            self.infer(default, env)
        self.block(node.body, inner)

    def klass(self, node: ast.ClassDef, env: dict[str, Type | None]) -> None:
        self.own_class = node.name
        for base in node.bases:
            found = self.infer(base, env)
            if found and found.kind == "class":
                self.overrides(node, self.apis[found.module]["classes"][found.name], found.name)
        before = len(self.problems), len(self.uses)
        self.block(node.body, env)  # once for the fields alone: one may be used above the method that sets it
        del self.problems[before[0] :], self.uses[before[1] :]
        self.block(node.body, env)
        self.own_class = ""

    def overrides(self, node: ast.ClassDef, base: dict[str, Any], name: str) -> None:
        """A class that TensorRT calls must define all that it calls, with the same parameters."""
        own = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
        for method, signatures in base["methods"].items():
            expected = [[name for name, _, _ in signature["parameters"]] for signature in signatures]
            if method not in own:
                self.problem(node, f"{node.name} does not define {name}.{method}")
            elif method != "__init__" and [argument.arg for argument in own[method].args.args] not in expected:
                self.problem(own[method], f"{node.name}.{method} has other parameters than {name}'s: {expected}")

    def problem(self, node: Any, text: str) -> None:
        self.problems.append(f"line {node.lineno}: {text}")


def check_sources(trees: list[ast.Module], apis: dict[str, dict[str, Any]], own: set[str]) -> Checker:
    """The checker after all of it: `problems`, and `uses` of the bindings. `own`: attributes that mlmkit has."""
    checker = Checker(apis, own.union(("_asdict", "_fields"), *(dir(item) for item in PYTHON)))
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef) and (found := checker.annotation(node.returns)):
                checker.returns[node.name] = found
    checker.problems.clear()
    checker.uses.clear()
    for tree in trees:
        checker.block(tree.body, {})
    return checker


def attributes(files: Iterable[Path]) -> set[str]:
    """Names of fields, methods and functions that these files define, from which a typed attribute is told apart."""
    names = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return names
