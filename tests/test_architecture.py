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
# The rooms, from the ground up. A part imports from its own room and from floors below it.
FLOORS = (
    ("utils",),
    ("models", "datasets", "diffusion"),
    ("training",),
    ("reporting",),
    ("metrics",),
    ("generation",),
    ("editing", "exporting"),
    SCRIPTS,
)
ROOMS = tuple(room for floor in FLOORS[:-1] for room in floor)
OURS = (*SCRIPTS, *ROOMS, "benchmarks", "tests")
OPTIONAL = ("swanlab", "wandb", "tensorboard", "lpips", "torch_fidelity", "mamba_ssm")
OPTIONAL += ("causal_conv1d", "diffusers", "huggingface_hub", "safetensors", "models.triton_scan")
# The one place in diffusion/ where tensors leave the device: images handed to the caller.
MAY_LEAVE_THE_DEVICE = ("generation/sampling.py",)

MAX_SCRIPT_LINES, MAX_FILE_LINES = 200, 350
MAX_FUNCTION_LINES, MAX_PARAMETERS = 60, 10
BACKBONE_FILES = ("models/unet.py", "models/dit.py", "models/jit.py", "models/dim.py")
# What neither knows of diffusion nor of training. What serves one room alone lives in that room.
UTILS = {
    "__init__",
    "config",
    "config_files",
    "config_schema",
    "config_types",
    "cli",
    "errors",
    "rng",
    "files",
}
UTILS |= {"checkpoint", "images", "labels", "captions", "distributed", "precision", "logs"}

FILES = sorted(
    path.relative_to(ROOT) for folder in ROOMS for path in (ROOT / folder).rglob("*.py")
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
    room = path.parts[0].removesuffix(".py")
    (floor,) = (number for number, rooms in enumerate(FLOORS) if room in rooms)
    allowed = {name for rooms in FLOORS[:floor] for name in rooms}
    if room not in SCRIPTS:
        allowed.add(room)
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
    """No `sys.modules`, no shell, no `eval`; `exec` for the user's config alone, and `sys.path` for
    the parts that it names."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            assert name not in ("sys.modules", "os.system"), f"{path}:{node.lineno}"
            assert name != "sys.path" or path.as_posix() == "utils/config.py", (
                f"{path}:{node.lineno}"
            )
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


def constructors_of_backbones(tree: ast.Module) -> set[ast.AST]:
    """`__init__` of every module of a backbone's file: its arguments are config keys."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {n for c in classes for n in c.body if getattr(n, "name", "") == "__init__"}


@pytest.mark.parametrize("path", FILES, ids=IDS)
def test_everything_stays_small(path):
    """Lines of a script, a file, a function; parameters of a function."""
    tree = tree_of(path)
    num_lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert num_lines <= (MAX_SCRIPT_LINES if path.stem in SCRIPTS else MAX_FILE_LINES)
    exempt = constructors_of_backbones(tree) if path.as_posix() in BACKBONE_FILES else set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node not in exempt:
            where = f"{path}:{node.lineno} {node.name}"
            assert node.end_lineno - node.lineno < MAX_FUNCTION_LINES, where
            arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            is_kernel = "triton.jit" in map(ast.unparse, node.decorator_list)  # pointers, sizes
            assert len(named) <= MAX_PARAMETERS or is_kernel, where


def test_utils_is_a_closed_list():
    names = {path.stem for path in FILES if path.parts[0] == "utils"}
    assert names == UTILS


def test_every_config_key_is_documented():
    page = ROOT / "docs" / "configs.md"
    if not page.exists():
        pytest.skip("docs/configs.md is not written yet")
    text = page.read_text(encoding="utf-8")
    assert [key for key in Config.model_fields if f"`{key}`" not in text] == []


def test_start_up_is_lean_and_other_packages_work_beside_our_datasets_folder():
    """From the root, `import datasets` is ours. Others that know a package of that name still work,
    and none of the optional or slow ones is loaded by the scripts themselves."""
    code = f"""
import sys
import train, sample, edit, evaluate, export
loaded = {(*OPTIONAL, "torch.distributed.tensor", "sympy", "jinja2", "imageio", "yaml")!r}
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
