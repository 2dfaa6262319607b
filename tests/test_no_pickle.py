"""Nothing that runs code when it is read: no pickles and their like, read from the sources without running them.

What Ray sends between a farm's own processes is pickled by Ray, as are the handles of stores and plans in it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from test_import_rules import ROOT, sources

MODULES = {"_pickle", "cPickle", "cloudpickle", "dill", "jsonpickle", "joblib", "marshal", "pickle", "shelve"}
RAYS_OWN = {"farm/cluster/inspect.py", "farm/cluster/node.py"}
"""Where what Ray sends is pickled by hand, so that a node without the farm can say so."""
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "BaseLoader", "CBaseLoader"}
UNSAFE_YAML = {
    "full_load", "full_load_all", "unsafe_load", "unsafe_load_all", "Loader", "CLoader", "FullLoader", "CFullLoader",
    "UnsafeLoader", "CUnsafeLoader",
}  # fmt: skip


def refused(file: str, text: str) -> Iterator[str]:
    """What of a source may run code of others', each with its place."""
    for node in ast.walk(ast.parse(text)):
        for problem in _problems(node):
            if not (file in RAYS_OWN and problem == "imports ray.cloudpickle"):
                yield f"{file}:{node.lineno} {problem}"  # type: ignore[attr-defined]


def _problems(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Import(names=names):
            yield from (f"imports {alias.name}" for alias in names if MODULES & set(alias.name.split(".")))
        case ast.ImportFrom(module=module, names=names):
            for full in (f"{module or ''}.{alias.name}" for alias in names):
                if MODULES & set(full.split(".")):
                    yield f"imports {full}"
                elif full.startswith("yaml.") and full.removeprefix("yaml.") in UNSAFE_YAML | {"load", "load_all"}:
                    yield f"imports {full}: use yaml.safe_load"
        case ast.Attribute(value=ast.Name(id="yaml"), attr=name) if name in UNSAFE_YAML:
            yield f"yaml.{name}: use yaml.safe_load"
        case ast.Call(func=called, args=args, keywords=keywords):
            name = ast.unparse(called)
            given = {keyword.arg: keyword.value for keyword in keywords}
            if name in ("eval", "exec", "builtins.eval", "builtins.exec", "__import__"):
                yield f"calls {name}"
            elif name in ("torch.load", "torch.jit.load") and not _is(given.get("weights_only"), True):
                yield f"{name} without weights_only=True"
            elif (
                name in ("np.load", "numpy.load") and "allow_pickle" in given and not _is(given["allow_pickle"], False)
            ):
                yield f"{name} with allow_pickle"
            elif name in ("yaml.load", "yaml.load_all"):
                loader = given.get("Loader") or (args[1] if len(args) > 1 else None)
                if loader is None or ast.unparse(loader).rpartition(".")[2] not in SAFE_LOADERS:
                    yield f"{name} without a safe loader"
            elif name.endswith(".read_pickle"):
                yield f"calls {name}"


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "import os, pickle as p", "from pickle import loads", "import cPickle", "import dill",
        "import shelve", "import marshal", "import joblib", "from sklearn.externals import joblib",
        "def f():\n    from ray import cloudpickle", "import ray.cloudpickle", "import torch\ntorch.load(x)",
        "torch.load(x, weights_only=False)", "torch.load(x, weights_only=safe)", "torch.jit.load(x)",
        "np.load(x, allow_pickle=True)", "numpy.load(x, allow_pickle=a)", "yaml.load(x)", "yaml.load(x, yaml.Loader)",
        "yaml.load(x, Loader=yaml.FullLoader)", "yaml.unsafe_load(x)", "yaml.full_load(x)", "from yaml import load",
        "from yaml import Loader", "eval(x)", "exec('1')", "__import__(x)", "pd.read_pickle(x)",
    ],
)  # fmt: skip
def test_what_runs_code_is_found(text: str) -> None:
    assert len([*refused("farm/x.py", text)]) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "model.eval()", "torch.load(x, weights_only=True)", "np.load(x)", "np.load(x, allow_pickle=False)",
        "yaml.safe_load(x)", "yaml.load(x, Loader=yaml.CSafeLoader)", "yaml.load(x, yaml.SafeLoader)", "json.load(x)",
        "from yaml import safe_load", "'import pickle'", "pickles = 1",
    ],
)  # fmt: skip
def test_what_does_not_is_left_alone(text: str) -> None:
    assert [*refused("farm/x.py", text)] == []


def test_nothing_in_the_sources_runs_code_of_others() -> None:
    files = sources("e2gan", "farm", "jobs")
    assert len(files) > 100
    found = [problem for file in files for problem in refused(file, (ROOT / file).read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("file", sorted(RAYS_OWN))
def test_the_exceptions_are_needed(file: str) -> None:
    assert "from ray import cloudpickle" in (ROOT / file).read_text(), f"{file} no longer needs its place in RAYS_OWN"
