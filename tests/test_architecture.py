"""The house rules, read from the source: who imports whom, and what must not stand where."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from utils.config import Config

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train", "sample", "edit", "evaluate", "runs", "export")
SIBLINGS = ("datasets", "models", "diffusion", "metrics")
OURS = (*SCRIPTS, *SIBLINGS, "editing", "utils", "benchmarks", "tests")
OPTIONAL = ("swanlab", "tensorboard", "lpips", "torch_fidelity", "mamba_ssm", "causal_conv1d")
OPTIONAL += ("diffusers", "safetensors")
# The one place in diffusion/ where tensors leave the device: images handed to the caller.
MAY_LEAVE_THE_DEVICE = ("diffusion/generation.py",)

FILES = sorted(
    path.relative_to(ROOT)
    for folder in (*SIBLINGS, "editing", "utils")
    for path in (ROOT / folder).rglob("*.py")
) + [Path(f"{name}.py") for name in SCRIPTS if (ROOT / f"{name}.py").exists()]
IDS = [path.as_posix() for path in FILES]


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports name the package in full"
            yield node.module or "", node.lineno


def outside_functions(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements run at import."""
    todo: list[ast.AST] = [tree]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.stmt):
                yield node
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                todo.append(node)


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_imports_point_one_way(path):
    package = path.parts[0].removesuffix(".py")
    if package == "utils":
        allowed = {"utils"}
    elif package in SIBLINGS:
        allowed = {package, "utils"}
    else:  # previews and evaluation use the one sampling path, that of sample.py
        allowed = {*SIBLINGS, "utils", "sample"}
        if package in ("edit", "editing"):
            allowed.add("editing")
    for module, line in imported(tree_of(path)):
        top = module.partition(".")[0]
        assert top not in OURS or top in allowed, f"{path}:{line} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_optional_packages_are_imported_where_they_are_used(path):
    for statement in outside_functions(tree_of(path)):
        if isinstance(statement, ast.Import | ast.ImportFrom):
            for module, line in imported(statement):
                assert module.partition(".")[0] not in OPTIONAL, f"{path}:{line}: {module}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_underhand_python(path):
    """No `sys.path`, no `sys.modules`, no shell, no `eval`; `exec` for the user's config alone."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name not in ("sys.path", "sys.modules", "os.system"), f"{path}:{node.lineno}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name != "eval", f"{path}:{node.lineno}"
            assert name != "exec" or path.as_posix() == "utils/config_files.py", (
                f"{path}:{node.lineno}"
            )
            assert all(k.arg != "shell" for k in node.keywords), f"{path}:{node.lineno}"


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.parts[0] in ("diffusion", "models")], ids=lambda p: p.as_posix()
)
def test_mathematics_stays_on_the_device_and_silent(path):
    leaving = {"item", "cpu"}
    for node in ast.walk(tree_of(path)):
        if not isinstance(node, ast.Call):
            continue
        where = f"{path}:{node.lineno}: {ast.unparse(node)}"
        if isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "tqdm"), where
        if isinstance(node.func, ast.Attribute) and path.as_posix() not in MAY_LEAVE_THE_DEVICE:
            assert node.func.attr not in leaving, where


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_no_device_by_default(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef):
            defaults = [*node.args.defaults, *node.args.kw_defaults]
            found = [d.value for d in defaults if isinstance(d, ast.Constant)]
            assert "cuda" not in found, f"{path}:{node.lineno}"


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_sources_are_ascii_and_documented(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    assert text.isascii()
    assert ast.get_docstring(ast.parse(text))


def test_trainer_stays_small():
    tree = tree_of(Path("utils/trainer.py"))
    (trainer,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Trainer")
    methods = {n.name: n.end_lineno - n.lineno for n in trainer.body if hasattr(n, "name")}
    assert max(methods.values()) <= 55, methods


def test_every_config_key_is_documented():
    page = ROOT / "docs" / "configs.md"
    if not page.exists():
        pytest.skip("docs/configs.md is not written yet")
    text = page.read_text(encoding="utf-8")
    assert [key for key in Config.model_fields if f"`{key}`" not in text] == []


def test_start_up_is_lean_and_other_packages_work_beside_our_datasets_folder():
    """From the root, `import datasets` is ours. Others that know a package of that name still work,
    and none of the optional ones is loaded by the scripts themselves."""
    code = f"""
import sys
import train, sample
loaded = {OPTIONAL!r}
print([name for name in loaded if name in sys.modules])
import datasets
print(datasets.__file__)
import torchvision, torch_fidelity, lpips, swanlab
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
print("imported", datasets is sys.modules["datasets"])
"""
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "[]",
        str(ROOT / "datasets" / "__init__.py"),
        "imported True",
    ], done.stderr
