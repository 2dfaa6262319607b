"""The import rules of the blueprint, read from the sources without running them."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAVY = {
    "cleanfid", "coremltools", "cv2", "diffusers", "onnxruntime", "peft", "ray", "skimage", "sklearn", "tensorboardX",
    "transformers",
}  # fmt: skip
# Modules with a heavy import at the top: each is itself imported only inside the function that needs it.
LAZY_MODULES = {
    "e2gan/lora_transposed.py": {"peft"},
    "farm/editors/procedural/filters.py": {"cv2"},
}
E2GAN_NEVER = {"boto3", "diffusers", "farm", "fastapi", "jobs", "ray"}
RAY_ONLY_IN = ("farm/cluster/", "farm/stages/pretrain.py", "farm/stages/ranks.py", "farm/serve/", "jobs/")


@dataclass(frozen=True, kw_only=True)
class Import:
    """One imported name. `when`: `import` (with its module), `call` (inside a function) or `types` (never)."""

    file: str
    line: int
    module: str
    when: str

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def sources(*folders: str) -> list[str]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path.relative_to(ROOT).as_posix() for path in files]


def imports_of(file: str, text: str | None = None) -> list[Import]:
    """Every import of a file. `from a import b` counts as `a` and, should that be a module, `a.b`."""
    package = file.split("/")[:-1]

    def modules(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names if is_module(f"{base}.{alias.name}"))

    def walk(node: ast.AST, when: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom):
                for module in modules(child):
                    yield Import(file=file, line=child.lineno, module=module, when=when)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                yield from walk(child, "types" if when == "types" else "call")
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for inner in child.body:
                    yield from walk(ast.Module(body=[inner], type_ignores=[]), "types")
                for inner in child.orelse:
                    yield from walk(ast.Module(body=[inner], type_ignores=[]), when)
            else:
                yield from walk(child, when)

    return list(walk(ast.parse((ROOT / file).read_text() if text is None else text), "import"))


def is_module(name: str) -> bool:
    path = ROOT / name.replace(".", "/")
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module_name(file: str) -> str:
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


EVERYTHING = [found for file in sources("e2gan", "farm", "jobs") for found in imports_of(file)]


def refused(found: list[Import]) -> str:
    return "\n".join(map(str, found))


def test_the_reader_of_imports_itself() -> None:
    text = """
import a.b
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import c
else:
    import d
try:
    import e
except ImportError:
    pass
class K:
    import f
    def m(self):
        from g import h
from . import bank
from ..store import Store
from farm import queue, nothing_of_that_name
"""
    found = [(i.module, i.when) for i in imports_of("farm/serve/web.py", text) if i.module != "typing"]
    assert found == [
        ("a.b", "import"),
        ("c", "types"),
        ("d", "import"),
        ("e", "import"),
        ("f", "import"),
        ("g", "call"),
        ("farm.serve", "import"),
        ("farm.serve.bank", "import"),
        ("farm.store", "import"),
        ("farm", "import"),
        ("farm.queue", "import"),
    ]
    assert len(EVERYTHING) > 200


def test_e2gan_stands_alone() -> None:
    found = [i for i in EVERYTHING if i.file.startswith("e2gan/") and i.package in E2GAN_NEVER]
    assert not found, refused(found)


def test_ray_has_its_places() -> None:
    found = [i for i in EVERYTHING if i.package == "ray" and not i.file.startswith(RAY_ONLY_IN)]
    assert not found, refused(found)


def test_boto3_only_in_the_store_of_s3() -> None:
    s3 = {"boto3", "botocore", "s3transfer"}
    found = [i for i in EVERYTHING if i.package in s3 and i.file not in ("farm/s3.py", "farm/s3_client.py")]
    assert not found, refused(found)


def test_boto3_is_loaded_only_for_a_store_in_s3() -> None:
    s3 = ("farm/s3.py", "farm/s3_client.py")
    found = [i for i in EVERYTHING if i.module in map(module_name, s3) and i.file not in s3 and i.when == "import"]
    assert not found, refused(found)


def test_fastapi_only_in_serving() -> None:
    web = {"fastapi", "starlette", "uvicorn"}
    found = [i for i in EVERYTHING if i.package in web and not i.file.startswith("farm/serve/")]
    assert not found, refused(found)


def test_heavy_imports_are_inside_functions() -> None:
    found = [
        i
        for i in EVERYTHING
        if not i.file.startswith("jobs/")
        and i.when == "import"
        and i.package in HEAVY - LAZY_MODULES.get(i.file, set())
    ]
    assert not found, refused(found)


@pytest.mark.parametrize("file", LAZY_MODULES)
def test_lazy_modules_are_needed_and_lazily_imported(file: str) -> None:
    at_top = {i.package for i in EVERYTHING if i.file == file and i.when == "import"}
    assert LAZY_MODULES[file] <= at_top, f"{file} no longer needs its place in LAZY_MODULES"
    # Modules beside it that are themselves reached lazily may import it at their top.
    allowed = {file, *LAZY_MODULES}
    reached = {module_name(file)}
    while True:
        above = {i.file for i in EVERYTHING if i.module in reached and i.when == "import"} - allowed
        if not above:
            break
        assert all(f.startswith(f"{Path(file).parent}/") and not f.endswith("__init__.py") for f in above), above
        allowed |= above
        reached |= {module_name(f) for f in above}


def test_files_are_named_after_what_they_do() -> None:
    vague = {"utils", "util", "helpers", "helper", "common", "misc"}
    found = [
        f for f in sources("e2gan", "farm", "jobs", "bench", "tests") if vague & set(Path(f).with_suffix("").parts)
    ]
    assert not found


@pytest.mark.parametrize("package", ["e2gan", "farm"])
def test_no_cycles(package: str) -> None:
    """Not even through imports inside functions."""
    graph = {
        module_name(file): {
            i.module
            for i in imports_of(file)
            if i.when != "types" and i.package == package and is_module(i.module) and i.module != package
        }
        - {module_name(file)}
        for file in sources(package)
    }
    # `from farm.editors import onnx` inside farm/editors/__init__.py imports the submodule, not the package again.
    for name, imported in graph.items():
        imported -= {above for above in imported if any(m.startswith(f"{above}.") for m in imported) and above != name}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def loaded_by(*modules: str) -> set[str]:
    """Top-level packages in a fresh interpreter after importing these modules."""
    code = f"import sys, {', '.join(modules)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_reading_a_farms_file_and_the_catalogue_is_light() -> None:
    loaded = loaded_by("farm.config", "farm.catalogue")
    assert not loaded & {*HEAVY, "torch", "torchvision", "boto3", "fastapi", "pandas", "pyarrow", "scipy"}


def test_no_module_pulls_in_a_heavy_package_by_way_of_another() -> None:
    files = [f for f in sources("e2gan", "farm") if not f.endswith(("__main__.py", *LAZY_MODULES))]
    importers = {i.file for i in EVERYTHING if i.when == "import" and i.module in map(module_name, LAZY_MODULES)}
    light = [module_name(f) for f in files if f not in importers]
    assert "e2gan.train" in light
    assert not loaded_by(*light) & HEAVY
