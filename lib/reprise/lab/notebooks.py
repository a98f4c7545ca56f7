"""Reading notebooks: their parameters, a hash of what they compute, and the form in which they are committed."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager

from .errors import BadInput
from .parameters import Parameter, parse_cell


def read(path: Path) -> nbformat.NotebookNode:
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise BadInput(f"{path.name} is not a readable notebook: {str(error).splitlines()[0]}") from None
    return notebook


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]


def parameters(notebook: nbformat.NotebookNode) -> dict[str, Parameter]:
    """The declared parameters. Their defaults are those of the committed notebook where it keeps them, so that
    a reader who edits the cell in Lab is told that the published verdicts do not apply."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise BadInput(f"a notebook needs one cell tagged `parameters`, this one has {len(cells)}")
    declared = parse_cell(cells[0].source)
    if missing := {"scale", "seed", "device"} - declared.keys():
        raise BadInput(f"the parameters cell lacks {', '.join(sorted(missing))}")
    committed = notebook.metadata.get("reprise", {}).get("parameters", {})
    return {
        name: dataclasses.replace(parameter, default=committed.get(name, parameter.default))
        for name, parameter in declared.items()
    }


def edit_hash(notebook: nbformat.NotebookNode) -> str:
    """Changes with every edit of a code cell; kept in the metadata of a committed notebook."""
    return hashlib.sha256(json.dumps([cell.source for cell in code_cells(notebook)]).encode()).hexdigest()


def normalise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An executed notebook as it is committed: outputs kept; times, paths and machine names left out."""
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "reprise": {
                "code_sha256": edit_hash(notebook),
                "parameters": {name: p.default for name, p in parameters(notebook).items()}
                if any("parameters" in cell.metadata.get("tags", []) for cell in notebook.cells)
                else {},
            },
        }
    )
    for cell in notebook.cells:
        tags = cell.metadata.get("tags", [])
        cell.metadata = nbformat.from_dict({"tags": tags} if tags else {})
    notebook.cells = [cell for cell in notebook.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    for count, cell in enumerate(code_cells(notebook), 1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count
    return notebook


def write(notebook: nbformat.NotebookNode, path: Path) -> None:
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def run_hash(notebook: nbformat.NotebookNode, changed: dict[str, object], device: str, library: Path) -> str:
    """What a run computes: the notebook's code, the library modules it imports, both without comments and
    docstrings, the parameters that differ from their defaults, and the device.

    The laboratory is left out: it runs and judges, but computes nothing that is measured.
    """
    return _hash([list(map(_code_only, _sources(notebook))), library_hash(notebook, changed, device, library)])


def library_hash(notebook: nbformat.NotebookNode, changed: dict[str, object], device: str, library: Path) -> str:
    """The same without the notebook's own code: what a checkpoint depends on beside the cells that led to it."""
    modules = _imported({}, _sources(notebook), library)
    code = [_code_only(modules[name]) for name in sorted(modules)]
    return _hash([code, sorted(changed.items()), device])


def _hash(facts: object) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def _sources(notebook: nbformat.NotebookNode) -> list[str]:
    return [TransformerManager().transform_cell(cell.source) for cell in code_cells(notebook)]


def _imported(found: dict[str, str], sources: list[str], library: Path, package: str = "") -> dict[str, str]:
    """Every module of the package in ``library`` that the sources import, directly or not: {dotted name: source}."""
    for source in sources:
        for node in ast.walk(_parse(source)):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                    base = ".".join([*parents, base]).rstrip(".")
                names = [base, *(f"{base}.{alias.name}" for alias in node.names)]
            for name in names:
                _add_module(found, name, library)
    return found


def _add_module(found: dict[str, str], name: str, library: Path) -> None:
    parts = name.split(".")
    if parts[0] != "reprise" or parts[:2] == ["reprise", "lab"] or name in found:
        return
    path = library.joinpath(*parts)
    file, package = (path / "__init__.py", name) if path.is_dir() else (path.with_suffix(".py"), ".".join(parts[:-1]))
    if file.is_file():
        found[name] = file.read_text(encoding="utf-8")
        _imported(found, [found[name]], library, package)


def _parse(source: str) -> ast.Module:
    try:
        return ast.parse(source)
    except SyntaxError:  # the cell will say so when it is run
        return ast.Module([ast.Expr(ast.Constant(source.encode()))], [])


def _code_only(source: str) -> str:
    """Source without comments, docstrings and layout."""
    tree = _parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not (isinstance(line, ast.Expr) and _is_text(line.value))] or [
                ast.Pass()
            ]
    return ast.unparse(tree)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
