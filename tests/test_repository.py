"""The house itself: what is tracked, what may import what, and that every way in asks for the same packages."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "lib" / "reprise"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IN_GIT = pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="needs a git checkout")


def git(*arguments: str) -> list[str]:
    told = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return told.stdout.splitlines()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(LIBRARY.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(LIBRARY.rglob("*.py"))}
PAPERS_WING = [name for name in MODULES if not name.startswith("reprise.lab")]


def imports(name: str, everywhere: bool) -> set[str]:
    """The modules that a module imports: at its top, or also inside its functions."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            # `from . import x` means the module x where there is one, else a name in the package.
            names = {f"{base}.{alias.name}" for alias in node.names}
            found |= (names & MODULES.keys()) or {base}
    return found


@IN_GIT
def test_git_does_not_ignore_the_library():
    kept = git("ls-files", "--cached", "--others", "--exclude-standard", "lib")
    files = {path for path in LIBRARY.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {".cu", ".h", ".md"} <= {path.suffix for path in files}, "what is ignored by git is not in the wheel either"
    assert {path.relative_to(ROOT).as_posix() for path in files} <= set(kept)
    assert not any("__pycache__" in path for path in kept)


@IN_GIT
def test_git_ignores_what_runs_leave_behind():
    left = ["runs/quick/x/result.json", "data/mnist/x.gz", ".venv/x", "notebooks/.ipynb_checkpoints/x"]
    assert git("check-ignore", *left) == left
    # With the data's description it is the other way round; git says so by its exit status.
    told = subprocess.run(
        ["git", "check-ignore", "data/datasets.yaml", "data/weights/x"], cwd=ROOT, capture_output=True
    )
    assert told.returncode == 1


@IN_GIT
def test_tracked_texts_name_no_registry_and_no_machine():
    # Where packages come from is the reader's business (torch's public index is offered to him, with its name).
    hosts = r"pypi\.org|pythonhosted\.org|anaconda\.org|npmjs\.|/simple\b|index-url *= "
    forbidden = re.compile(rf"({hosts}|/home/\w|/root/\w|/Users/\w|[A-Z]:\\Users)")
    found = []
    for path in git("ls-files"):
        # These two spell out what they look for, or hide it inside pictures.
        if path.endswith((".png", ".ipynb", ".safetensors")) or path.startswith("tests/test_notebooks"):
            continue
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), 1):
            if match := forbidden.search(line):
                found.append(f"{path}:{number} names {match[0]}")
    own = Path(__file__).relative_to(ROOT).as_posix()
    assert [line for line in found if not line.startswith((own, "tests/checks.py"))] == []


@pytest.mark.parametrize("name", MODULES)
def test_modules_are_short(name):
    assert len(MODULES[name].read_text(encoding="utf-8").splitlines()) <= 300


@pytest.mark.parametrize("name", PAPERS_WING)
def test_the_papers_wing_knows_nothing_of_the_laboratory(name):
    above = {
        found
        for found in imports(name, everywhere=True)
        if re.match(r"(reprise\.lab|papermill|nbclient|click)\b", found)
    }
    assert above == set()


def test_the_papers_wing_is_imported_without_the_laboratory():
    program = f"import sys, {', '.join(PAPERS_WING)}\nprint(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(told.stdout.split())
    assert set(PAPERS_WING) <= loaded
    assert loaded.isdisjoint({"reprise.lab", "papermill", "nbclient", "click"})


def test_the_command_line_starts_without_torch():
    program = "import sys, reprise.lab.cli\nprint(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch" not in told.stdout.split(), "`reprise list` must not take seconds"


def test_imports_make_no_circle():
    graph = {name: imports(name, everywhere=True) & MODULES.keys() - {name} for name in MODULES}
    assert graph["reprise.training"] >= {"reprise.checkpoints", "reprise.invariants", "reprise.progress"}
    # A package and its own modules are one: `reprise.lab` is what its modules import their neighbours through.
    list(TopologicalSorter(graph).static_order())


def requirements(lines: list[str]) -> dict[str, Requirement]:
    found = [Requirement(line) for line in lines]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(len(one.specifier) == 1 and next(iter(one.specifier)).operator == "==" for one in found)
    assert len({canonicalize_name(one.name) for one in found}) == len(found), "a package is pinned twice"
    return {canonicalize_name(one.name): next(iter(one.specifier)).version for one in found}


@pytest.mark.parametrize("group", ["dependencies", "dev"])
def test_every_direct_dependency_is_pinned_within_its_bounds(group):
    direct = PROJECT["dependencies"] if group == "dependencies" else PROJECT["optional-dependencies"][group]
    pinned = pins()
    for name, requirement in requirements(direct).items():
        assert requirement.specifier, f"{name} has no lower bound"
        assert name in pinned
        assert requirement.specifier.contains(pinned[name]), f"{requirement}, but {pinned[name]} is pinned"


def test_every_import_of_the_library_is_a_dependency():
    """Directly, or always required by one that is (pillow by matplotlib, IPython by ipykernel)."""
    distributions = {"sklearn": "scikit-learn", "skimage": "scikit-image", "yaml": "pyyaml", "PIL": "pillow"}
    used = {found.partition(".")[0] for name in MODULES for found in imports(name, everywhere=True)}
    # Without CuPy, or without the NVRTC that torch's CUDA builds bring along, the library says what is missing.
    foreign = used - set(sys.stdlib_module_names) - {"reprise", "cupy", "cuda"}
    needed = {canonicalize_name(distributions.get(name, name)) for name in foreign}
    direct = requirements(PROJECT["dependencies"]).keys()
    brought = {line for name in direct for line in metadata.requires(name) or [] if "extra ==" not in line}
    assert needed - direct - requirements(list(brought)).keys() == set()


def test_conda_asks_for_the_same():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    python, pip, from_pip = conda["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    assert from_pip == {"pip": ["--constraint constraints.txt", "--editable .[dev]"]}
    assert conda["name"] == PROJECT["name"]


def test_python_is_asked_for_alike_everywhere():
    least = PROJECT["requires-python"].removeprefix(">=")
    major, minor = least.split(".")
    bootstrap = (ROOT / "bootstrap.py").read_text(encoding="utf-8")
    assert f"sys.version_info < ({major}, {minor})" in bootstrap
    assert f"Python {least} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["ruff"]
    assert ruff["target-version"] == f"py{major}{minor}"


def test_bootstrap_needs_nothing_but_python():
    tree = ast.parse((ROOT / "bootstrap.py").read_text(encoding="utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    used = {
        name
        for node in nodes
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
    }
    assert {name.partition(".")[0] for name in used} <= set(sys.stdlib_module_names)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()
    told = bootstrap(ROOT, "nonsense")
    assert told.stderr == f"bootstrap: choose one of {', '.join(named)}\n"


def bootstrap(folder: Path, *arguments: str, lacking: str = "", **environment: str) -> subprocess.CompletedProcess:
    """Run a copy of bootstrap.py under a Python that lacks a module."""
    program = (
        "import importlib.util, runpy, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {lacking!r} else find(name, *rest)\n"
        f"sys.argv = ['bootstrap.py', *{arguments!r}]\n"
        "runpy.run_path('bootstrap.py', run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("setup", "test")])
def test_a_bad_target_is_one_line(arguments):
    told = bootstrap(ROOT, *arguments)
    assert told.returncode not in (0, None)
    assert told.stderr.startswith("bootstrap: choose one of setup, reproduce, test")
    assert len(told.stderr.splitlines()) == 1
    assert told.stdout == ""


@pytest.mark.parametrize("lacking", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_in_one_line(tmp_path, lacking):
    for name in ("bootstrap.py", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "empty").mkdir()  # a path without uv, which would not need the module
    told = bootstrap(tmp_path, "setup", lacking=lacking, PATH=str(tmp_path / "empty"))
    assert told.returncode != 0
    assert told.stderr.startswith("bootstrap: this Python has no venv: install it")
    assert len(told.stderr.splitlines()) == 1
    assert not (tmp_path / ".venv").exists()
