"""The command line ``reprise``. Exit status: 0 every verdict as on record, 1 one differs, 2 bad use, 3 a notebook
failed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from . import runner, tables
from .checkout import Checkout
from .claims import SCALES
from .collect import collect as collect_runs
from .doctor import examine
from .errors import BadInput
from .live import Live
from .report import claim_objects, minutes, report_text

DIFFERS, BAD_USE, FAILED, INTERRUPTED = 1, 2, 3, 130


class _Group(click.Group):
    """Every error about the input becomes one line and status 2."""

    def invoke(self, context: click.Context):
        try:
            return super().invoke(context)
        except BadInput as error:
            click.echo(f"reprise: {error}", err=True)
            sys.exit(BAD_USE)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="reprise")
def main() -> None:
    """Deep-learning papers, rebuilt and re-measured."""


@main.command("list")
def list_papers() -> None:
    """Papers, scales, minutes, claims."""
    checkout = Checkout.find()
    rows = [("paper", "year", "title", "claims", "quick", "full")]
    for name in checkout.names():
        claims = checkout.claims(name)
        took = [minutes(checkout, name, scale) for scale in SCALES]
        rows.append((name, str(claims.year), claims.title, str(len(claims.claims)), *took))
    click.echo(tables.align(rows))


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME…|all]")
@click.option("--scale", default="quick", metavar="quick|full", help="Bundled data in a minute, or the paper's own.")
@click.option("-p", "options", type=(str, str), multiple=True, metavar="NAME VALUE", help="Set a parameter.")
@click.option("--jobs", default=2, type=click.IntRange(1), show_default=True, help="Notebooks at a time.")
@click.option("--out", default=None, type=click.Path(path_type=Path), help="Folder for runs (default: runs).")
@click.option("--force", is_flag=True, help="Run again what is finished.")
@click.option("--timeout", type=click.IntRange(1), metavar="SECONDS", help="Longest time a single cell may take.")
def run(names, scale, options, jobs, out, force, timeout) -> None:
    """Run papers' notebooks and hold what they measure against the claims."""
    if scale not in SCALES:
        raise BadInput(f"no scale {scale!r}; there are {' and '.join(SCALES)}")
    checkout = Checkout.find()
    todo = runner.plan(checkout, checkout.choose(names), scale, options, out or checkout.root / "runs")
    if not todo:
        raise BadInput("no papers here yet")
    live = Live()
    try:
        runner.run(checkout, todo, jobs, force, timeout, live)
    except KeyboardInterrupt:
        click.echo("interrupted", err=True)
        sys.exit(INTERRUPTED)
    live(todo)
    sys.exit(_close(todo))


def _close(todo: list[runner.Job]) -> int:
    """Print the closing tables; the exit status."""
    done = [job for job in todo if job.result is not None]
    surprises, lacking = [], []
    for job in done:
        outcome = job.outcome()
        if missing := outcome.missing():
            lacking.append(
                f"{job.name}: claims.yaml asks for {', '.join(missing)}, which {job.folder} lacks: use --force"
            )
            continue
        took = tables.seconds(job.result["provenance"]["wall_seconds"])
        click.echo(f"\n{job.claims.title} · {job.scale} · {took}\n\n{tables.outcome_text(outcome)}")
        click.echo(f"\n{job.folder}")
        surprises += [f"{job.name}: {words}" for words in outcome.surprises()]
    for words in surprises:
        click.echo(f"differs from the record: {words}", err=True)
    failed = [job for job in todo if job.failure is not None]
    for job in failed:
        click.echo(f"\n{job.name}: {runner.failure_words(job)}\n{job.failure['source']}", err=True)
        click.echo("\n".join(job.failure["traceback"]), err=True)
        click.echo(f"kept in {job.folder}", err=True)
    for words in lacking:
        click.echo(f"reprise: {words}", err=True)
    return FAILED if failed else BAD_USE if lacking else DIFFERS if surprises else 0


@main.command()
@click.argument("names", nargs=-1, metavar="[NAME…]")
@click.option("--json", "as_json", is_flag=True, help="A list of objects instead of tables.")
def report(names, as_json) -> None:
    """Every claim, with what is on record for it."""
    checkout = Checkout.find()
    objects = [one for name in checkout.choose(names) for one in claim_objects(checkout, name)]
    click.echo(json.dumps(objects, indent=1, ensure_ascii=False) if as_json else report_text(objects))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
def collect(folder) -> None:
    """Bring results, figures and executed notebooks of finished runs into the papers' pages."""
    for line in collect_runs(Checkout.find(), folder):
        click.echo(line)


@main.command()
@click.argument("names", nargs=-1, required=True, metavar="NAME…")
def fetch(names) -> None:
    """Download datasets and networks' weights ahead of time."""
    for name in names:
        runner.require_data((name,))
        click.echo(f"{name}: at hand")


@main.command()
def doctor() -> None:
    """What this machine can run."""
    click.echo(tables.align(examine(Checkout.find())))


if __name__ == "__main__":
    main()
