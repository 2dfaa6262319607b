"""Every sentence that the code tells a user's mistake with, read from the source without running it.

A sentence is what an exception is made of that ends as `error: …`, as an HTTP problem, as a line of `farm preflight`
or `farm verify`, or as the reason of a quarantine. What it is told of (a path, a key, a figure) is a hole in it, such
as `{path}`.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOLD = frozenset(
    {
        "UserError",
        "ProblemError",
        "ServiceError",
        "ValueError",
        "NotFoundError",
        "StoreUnreachableError",
        "_ConflictError",
    }
)
"""Exceptions whose text reaches a user, as do those of their subclasses. A ValueError's is what is wrong with a value
and ends in a longer sentence."""
_REASONS = frozenset({"problems", "found", "mistakes"})
"""Lists that `farm verify` and the gate gather reasons in."""
_OTHER = "\0"
"""Among the texts of an expression: one that the source does not say."""
_DEEPEST = 3
"""How many names and calls a text is followed through."""


@dataclass(frozen=True)
class Sentence:
    text: str
    file: str
    line: int


def sentences(root: Path = ROOT) -> list[Sentence]:
    """In the order of files and lines; a text that several places have is there once for each."""
    files = sorted(path for folder in ("e2gan", "farm", "jobs") for path in (root / folder).rglob("*.py"))
    modules = {path.relative_to(root).as_posix(): ast.parse(path.read_text()) for path in files}
    told = _told(modules)
    found = (Sentence(text, file, line) for file in modules for text, line in _Module(file, modules, told).sentences())
    return sorted(set(found), key=lambda sentence: (sentence.file, sentence.line, sentence.text))


def _told(modules: Mapping[str, ast.Module]) -> set[str]:
    """The names of all exceptions that are told."""
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    told, before = set(TOLD), 0
    while len(told) != before:
        before = len(told)
        told |= {node.name for node in classes if told & {_name(base) for base in node.bases}}
    return told


class _Module:
    def __init__(self, file: str, modules: Mapping[str, ast.Module], told: set[str]) -> None:
        self.file, self.modules, self.told = file, modules, told
        self.tree = modules[file]
        self.above = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}

    def sentences(self) -> Iterator[tuple[str, int]]:
        for node in ast.walk(self.tree):
            for value in self._told_by(node):
                texts = self.texts(value)
                if not any(map(_says_something, texts)):  # all holes: what they are filled with is the sentence
                    texts = self.texts(value, expand=True)
                yield from (
                    (" ".join(t.split()), value.lineno) for t in texts if _OTHER not in t and _says_something(t)
                )

    def _told_by(self, node: ast.AST) -> Iterator[ast.expr]:
        match node:
            case ast.Call(func=ast.Name(name), args=args) if name in self.told:
                yield from itertools.islice((a for a in args if not _is_status(a)), 1)
            case ast.Call(func=ast.Name("cls"), args=[text, *_]) if self._in_told_class(node):
                yield text
            case ast.Call(func=ast.Attribute(ast.Call(func=ast.Name("super")), "__init__"), args=args):
                if self._in_told_class(node):
                    yield from (a for a in args if isinstance(a, ast.JoinedStr | ast.Constant))
            case ast.FunctionDef(name="__str__") if self._in_told_class(node):
                yield from (r.value for r in ast.walk(node) if isinstance(r, ast.Return) and r.value)
            case ast.FunctionDef(name="__init__", args=ast.arguments(defaults=defaults)) if self._in_told_class(node):
                yield from (d for d in defaults if isinstance(d, ast.Constant) and isinstance(d.value, str))
            case ast.Call(func=ast.Name("Check"), args=[_, ast.Constant("warning" | "error"), text]):
                yield text
            case ast.Tuple(elts=[ast.Constant("warning" | "error"), text]) if not isinstance(text, ast.Constant):
                yield text
            case ast.Call(func=ast.Name("_problem"), args=[ast.Constant(int()), text]):
                yield text
            case ast.Dict(keys=[ast.Constant(int()), *_], values=values):
                yield from (value for value in values if isinstance(value, ast.JoinedStr))
            case ast.Call(func=ast.Attribute(of, "append"), args=[ast.JoinedStr() as text]) if _name(of) in _REASONS:
                yield text
            case ast.Assign(targets=[of], value=ast.ListComp(elt=ast.JoinedStr() as text)) if _name(of) in _REASONS:
                yield text
            case ast.Return(value=ast.List(elts=[ast.Constant(str()) as text])):  # the only reason there is
                yield text

    def texts(self, value: ast.expr, depth: int = 0, *, expand: bool = False) -> list[str]:
        """The texts an expression can have; `_OTHER` among them where the source does not say.

        expand: a hole is filled with all that the source says it can hold, not only where that is one thing.
        """
        match value:
            case ast.Constant(str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                ways = [self._part(part, depth, expand) for part in parts]
                return ["".join(way) for way in itertools.product(*ways)]
            case ast.IfExp(body=body, orelse=other):
                return [*self.texts(body, depth), *self.texts(other, depth)]
            case ast.BoolOp(values=values):
                return [text for each in values for text in self.texts(each, depth)]
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                sides = [[t for t in self.texts(side, depth) if t != _OTHER] for side in (left, right)]
                if any(sides):
                    ways = [found or [_hole(side)] for found, side in zip(sides, (left, right), strict=True)]
                    return ["".join(way) for way in itertools.product(*ways)]
            case ast.Name(name) if depth < _DEEPEST:
                return self._named(value, name, depth + 1) or [_OTHER]
            case ast.Call(func=ast.Name(name)) if depth < _DEEPEST:
                called = [t for module, function in self._defined(name) for t in module.returned(function, depth + 1)]
                return called or [_OTHER]
        return [_OTHER]

    def returned(self, function: ast.FunctionDef, depth: int) -> list[str]:
        values = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value]
        return [text for value in values for text in self.texts(value, depth)]

    def _part(self, part: ast.expr, depth: int, expand: bool) -> list[str]:
        if not isinstance(part, ast.FormattedValue):
            return self.texts(part)
        known = list(dict.fromkeys(self.texts(part.value, depth)))
        if _OTHER not in known and (len(known) == 1 or expand):
            return known
        hole = _hole(part.value)
        return [f"'{hole}'" if part.conversion in (ord("r"), ord("a")) else hole]

    def _named(self, node: ast.expr, name: str, depth: int) -> list[str]:
        """What a name can stand for: what the function around assigns to it, or a constant."""
        scopes = [above for above in self._around(node) if isinstance(above, ast.FunctionDef | ast.AsyncFunctionDef)]
        inside = [node for scope in scopes for node in ast.walk(scope)]
        values = [n.value for n in inside if isinstance(n, ast.Assign) and name in map(_name, n.targets)]
        values += [n.value for n in inside if isinstance(n, ast.NamedExpr) and n.target.id == name]
        if not values and name.strip("_").isupper():
            values = list(self._constants(name))
        return [text for value in values for text in self.texts(value, depth)]

    def _constants(self, name: str) -> Iterator[ast.expr]:
        for module in self._homes(name):
            for node in module.tree.body:
                if isinstance(node, ast.Assign) and name in map(_name, node.targets):
                    number = isinstance(node.value, ast.Constant) and isinstance(node.value.value, int)
                    yield ast.Constant(ast.unparse(node.value)) if number else node.value

    def _defined(self, name: str) -> Iterator[tuple[_Module, ast.FunctionDef]]:
        for module in self._homes(name):
            for node in module.tree.body:
                if isinstance(node, ast.FunctionDef) and node.name == name:
                    yield module, node

    def _homes(self, name: str) -> Iterator[_Module]:
        """This module, and the one that it has the name from."""
        yield self
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and name in {alias.name for alias in node.names}:
                path = node.module.replace(".", "/")
                for file in (f"{path}.py", f"{path}/__init__.py"):
                    if file in self.modules and file != self.file:
                        yield _Module(file, self.modules, self.told)

    def _around(self, node: ast.AST) -> Iterator[ast.AST]:
        while (node := self.above.get(node, self.tree)) is not self.tree:
            yield node

    def _in_told_class(self, node: ast.AST) -> bool:
        around = next((above for above in self._around(node) if isinstance(above, ast.ClassDef)), None)
        return around is not None and around.name in self.told


def _says_something(text: str) -> bool:
    return any(word.strip(".,:;()").isalpha() for word in literal(text).split())


def _is_status(value: ast.expr) -> bool:
    return isinstance(value, ast.Constant) and not isinstance(value.value, str)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _hole(value: ast.expr) -> str:
    """What stands for a value: the last name that it goes by."""
    match value:
        case ast.Attribute(attr="strerror"):
            return "{reason}"
        case ast.Name(name) | ast.Attribute(attr=name):
            return f"{{{name.strip('_').lower()}}}"
        case ast.Subscript(value=inside):
            return _hole(inside)
        case ast.BinOp(left=inside, op=ast.Div()):
            return _hole(inside)
    return "{…}"


def literal(text: str) -> str:
    """The words of a text, without its holes."""
    outside, depth = [], 0
    for letter in text:
        depth += letter == "{"
        outside.append(letter if depth == 0 else " ")
        depth -= letter == "}"
    return " ".join("".join(outside).split())
