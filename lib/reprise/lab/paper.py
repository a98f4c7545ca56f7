"""What a notebook holds: its paper's claims, and what it measured of them."""

from __future__ import annotations

from reprise import run

from . import notebooks, tables
from .checkout import Checkout
from .errors import BadInput
from .results import Outcome, measured, provenance, write_json


class Paper:
    """One paper's claims, held against what this run measures.

    Args:
        name: the paper's name, as its folder in ``papers/``.
        namespace: ``globals()`` of the notebook, whose parameters are checked here.

    Raises:
        BadInput: for an unknown paper, a parameter of the wrong type or a choice that does not exist.
    """

    def __init__(self, name: str, namespace: dict):
        checkout = Checkout.find()
        checkout.choose((name,))
        self.claims = checkout.claims(name)
        declared = notebooks.parameters(notebooks.read(checkout.notebook(name)))
        if lost := [parameter for parameter in declared if parameter not in namespace]:
            raise BadInput(f"parameter {lost[0]} has no value: run the parameters cell first")
        values = {parameter: declared[parameter].check(namespace[parameter]) for parameter in declared}
        self.changed = {
            parameter: value
            for parameter, value in values.items()
            if value != declared[parameter].default and parameter not in ("scale", "seed", "device")
        }
        self._device_name = values["device"]
        self.timings: dict[str, float] = {}
        self.outcome = Outcome(self.claims, values["scale"], {}, {}, judged=not self.changed)

    def record(self, id: str, value, *, per_seed=None, censored: str | None = None, without: str | None = None) -> None:
        """Record what was measured for a claim.

        Args:
            id: the claim's id in claims.yaml.
            value: a number or a truth value.
            per_seed: the values of the single seeds behind it, if there were several.
            censored: ``above`` if the true value is at least ``value`` (the run ended before the event),
                ``below`` if at most.
            without: the id of what was taken away, if this run was to break the claim.

        Raises:
            BadInput: for an id that claims.yaml does not have.
            TypeError: if the value is not a number or truth value.
        """
        if id not in self.claims.claims:
            raise BadInput(f"claims.yaml has no claim {id!r}; it has {', '.join(self.claims.claims)}")
        if without is None:
            self.outcome.measurements[id] = measured(value, per_seed, censored)
            return
        if without not in self.claims.without:
            raise BadInput(f"claims.yaml has no without {without!r}; it has {', '.join(self.claims.without)}")
        if id not in self.claims.without[without].breaks:
            raise BadInput(f"claims.yaml does not say that without {without!r} the claim {id!r} breaks")
        self.outcome.without.setdefault(without, {})[id] = measured(value, per_seed, censored)

    def timing(self, name: str, seconds: float) -> None:
        """Record a duration. Durations are kept apart and never judged."""
        self.timings[name] = float(seconds)

    def results(self) -> None:
        """Show every claim beside what was measured: the table that the notebook is about."""
        from IPython.display import display

        self._require_all()
        text, html = tables.outcome_text(self.outcome), tables.outcome_html(self.outcome)
        content = {"text/plain": text, "text/html": html, "application/vnd.reprise+json": self.outcome.as_json()}
        display(content, raw=True)

    def verdicts(self) -> None:
        """Print the verdict on every claim, without numbers, and hand the measurements to the runner."""
        self._require_all()
        if place := run.folder():
            facts = provenance(str(self.device))
            record = {**self.outcome.as_json(), "timings": self.timings, "provenance": facts}
            write_json(place / "measurements.json", record)
        print(tables.verdicts_text(self.outcome))

    @property
    def device(self):
        """The torch device that the parameter ``device`` names.

        Raises:
            ValueError: if this machine does not have it.
        """
        from reprise.training import pick_device

        return pick_device(self._device_name)

    def _require_all(self) -> None:
        if missing := self.outcome.missing():
            raise BadInput(f"not recorded: {', '.join(missing)}. Run the notebook from the top")
