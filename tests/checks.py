"""What a committed notebook must be; each check takes one and returns what is wrong with it.

They are tests of ``test_notebooks.py``, which also tests the checks themselves on spoilt copies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from nbformat import NotebookNode

from reprise.lab.notebooks import code_cells, edit_hash

MACHINE_PATH = re.compile(r"(?<![\w.])(/home/|/root/|/tmp/|/Users/|/usr/|[A-Z]:\\)")


def is_checked(cell: NotebookNode) -> bool:
    return "nbval-check-output" in cell.metadata.get("tags", [])


def outputs(notebook: NotebookNode) -> Iterator[tuple[str, NotebookNode]]:
    for cell in code_cells(notebook):
        for output in cell.outputs:
            yield f"cell [{cell.execution_count}]", output


def text_of(cell: NotebookNode) -> str:
    """The output of a cell as nbval compares it, pictures left out."""
    return "".join(output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)


def all_run_in_order(notebook: NotebookNode) -> list[str]:
    counts = [cell.execution_count for cell in code_cells(notebook)]
    return [] if counts and counts == list(range(1, len(counts) + 1)) else [f"execution counts are {counts}"]


def nothing_went_wrong(notebook: NotebookNode) -> list[str]:
    return [
        f"{where} has an output of {output.get('name', output.output_type)}"
        for where, output in outputs(notebook)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def not_edited_since_its_run(notebook: NotebookNode) -> list[str]:
    stored = notebook.metadata.get("reprise", {}).get("code_sha256")
    return [] if stored == edit_hash(notebook) else ["a code cell was edited after the run: make publish"]


def checked_cells_say_something(notebook: NotebookNode, least: int = 3) -> list[str]:
    checked = [cell for cell in code_cells(notebook) if is_checked(cell)]
    silent = [f"checked cell [{cell.execution_count}] has no output" for cell in checked if not text_of(cell).strip()]
    few = [f"{len(checked)} cells are checked, {least} at least should be"] if len(checked) < least else []
    return silent + few


def ends_with_checked_verdicts(notebook: NotebookNode) -> list[str]:
    last = code_cells(notebook)[-1]
    if not last.source.endswith(".verdicts()") or not is_checked(last):
        return ["the last cell is not a checked one that gives the verdicts"]
    return [] if re.match(r"claim +holds when +verdict\n", text_of(last)) else ["the last cell shows no verdicts"]


def records_something(notebook: NotebookNode) -> list[str]:
    return [] if any(".record(" in cell.source for cell in code_cells(notebook)) else ["nothing is recorded"]


def of_bearable_size(notebook: NotebookNode) -> list[str]:
    def kilobytes(content: object) -> float:
        return len(json.dumps(content, ensure_ascii=False).encode()) / 1000

    large = [f"{where} has an output of {kilobytes(o):.0f} kB" for where, o in outputs(notebook) if kilobytes(o) > 200]
    whole = [f"the notebook has {kilobytes(notebook):.0f} kB"] if kilobytes(notebook) > 1500 else []
    return large + whole


def of_bearable_length(notebook: NotebookNode) -> list[str]:
    long = [f"cell [{c.execution_count}] has over 30 lines" for c in code_cells(notebook) if c.source.count("\n") >= 30]
    return long + ([f"{len(notebook.cells)} cells"] if len(notebook.cells) > 60 else [])


def names_no_machine(notebook: NotebookNode) -> list[str]:
    texts = [("a source", cell.source) for cell in notebook.cells]
    for where, output in outputs(notebook):
        data = {kind: data for kind, data in output.get("data", {}).items() if not kind.startswith("image/")}
        texts.append((where, json.dumps([data, output.get("text"), output.get("traceback")], ensure_ascii=False)))
    # JSON doubles the backslash of a Windows path, hence the replacement.
    found = [(where, MACHINE_PATH.search(text.replace("\\\\", "\\"))) for where, text in texts]
    return [f"{where} names {match[0]}" for where, match in found if match]


def pictures_have_a_text(notebook: NotebookNode) -> list[str]:
    return [
        f"{where} has a picture without alt text"
        for where, output in outputs(notebook)
        for kind in output.get("data", {})
        if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt", "").strip()
    ]


EVERYWHERE = [
    all_run_in_order,
    nothing_went_wrong,
    not_edited_since_its_run,
    of_bearable_size,
    of_bearable_length,
    names_no_machine,
    pictures_have_a_text,
]
IN_PAPERS = [checked_cells_say_something, ends_with_checked_verdicts, records_something]
