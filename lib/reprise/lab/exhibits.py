"""What notebooks show of the record: the table of papers, and figures of full-scale runs."""

from __future__ import annotations

import json

from IPython.display import Image, Markdown, display

from .checkout import Checkout
from .pages import papers_table
from .report import record


def course() -> Markdown:
    """The papers that are here with links and verdicts, for a notebook beside them."""
    return Markdown(papers_table(Checkout.find(), to_root="../"))


def published(name: str, figure: str, or_quick: bool = False) -> None:
    """Show a figure of a paper's full-scale run, captioned with its data, device and date.

    Args:
        name: the paper's name.
        figure: the figure's name, as the notebook saved it.
        or_quick: where there was no full-scale run yet, show the quick one's figure: for the picture that opens a
            notebook, above the parameters.
    """
    checkout = Checkout.find()
    scales = {"full": "Full scale", "quick": "Quick scale (full scale: not measured yet)"}
    for scale in scales if or_quick else ("full",):
        result = record(checkout, name, scale)
        path = checkout.paper(name) / "figures" / scale / f"{figure}.png"
        if result is not None and path.is_file():
            break
    else:
        display(Markdown("*Full scale: not measured yet.*"))
        return
    facts = result["provenance"]
    data = ", ".join(sorted({key.partition("/")[0] for key in facts["data"]}))
    alt = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["alt"]
    display(Image(path.read_bytes(), format="png", alt=alt))
    display(Markdown(f"*{scales[scale]}: {data}, on one {facts['device']}, {facts['finished'][:10]}.*"))
