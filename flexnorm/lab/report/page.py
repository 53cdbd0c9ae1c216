"""The page: one HTML file that needs nothing but itself. What it says stands in ``page.html``, a Jinja template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from flexnorm._version import __version__
from flexnorm.lab.charts import Series, hues, legend_sample, style, write_text
from flexnorm.lab.charts.markup import Markup, element, escape
from flexnorm.lab.charts.numbers import duration, listing, plural
from flexnorm.lab.records import MISSING_RUN, Study
from flexnorm.lab.report import figures
from flexnorm.lab.report.headline import headline
from flexnorm.lab.report.load import load
from flexnorm.lab.report.table import results_table

SHOWN_LAYERS = 12
"""So many layers are shown at once; of a deeper network evenly spaced ones, the others behind a fold."""


def write_report(out_dir: str | Path) -> Path:
    """Write ``report.html`` into the folder of a comparison, recomputed from the files in that folder.

    It works on a folder at any stage: runs that are missing, unfinished, diverged or unreadable are named in the
    report. The page is one file without links to others and opens offline.

    Args:
        out_dir: The folder that ``flexnorm compare --out`` wrote: ``results.json`` and ``experiment.json`` where they
            exist, and ``runs/NORM/OPTIM/seedK/{summary.json, metrics.csv, shift.csv}``.

    Returns:
        The path of the report.

    Raises:
        FileNotFoundError: If the folder does not exist or holds nothing of a comparison.
        OSError: If the report cannot be written (a full or read-only disk); an older one stays as it was.

    Examples:
        >>> write_report("runs/digits")  # doctest: +SKIP
        PosixPath('runs/digits/report.html')
    """
    return write_text(Path(out_dir) / "report.html", page(load(out_dir)))


def page(study: Study) -> str:
    """Return the whole report on a study as HTML."""
    css, script = style(hues(study.norms, study.baseline)) + _asset("style.css"), _asset("page.js")
    losses, accuracies = figures.loss_curves(study), figures.accuracy_curves(study)
    scatter = [figures.scatter(study, width=width, height=height) for width, height in ((960, 500), (360, 400))]
    steps = [figures.steps(study, width=width) for width in (960, 360)]
    complete = study.complete
    sections = (
        ("overview", "At a glance", complete),
        ("results", "Results", True),
        ("ended", "Runs without a result", len(complete) < len(study.runs)),
        ("curves", "Learning curves", losses or accuracies),
        ("shift", "Internal covariate shift", any(run.shifts for run in complete)),
        ("tradeoff", "Accuracy against shift", scatter[0]),
        ("speed", "Step time", steps[0]),
        ("glossary", "What the numbers mean", True),
        ("repeat", "How to repeat this", True),
    )
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Not only characters with a meaning in HTML are to be replaced, but also those that it forbids.
        finalize=lambda value: Markup("" if value is None else escape(value)),
    )
    content = environment.from_string(_asset("page.html")).render(
        study=study,
        version=__version__,
        head=headline(study, study.cells),
        css=Markup(css),
        script=Markup(script),
        # The page may run this script and this style, and load nothing at all.
        policy=f"default-src 'none'; img-src data:; style-src '{_digest(css)}'; script-src '{_digest(script)}'",
        sections=[(key, title) for key, title, shown in sections if shown],
        summary=figures.summary(study),
        table=results_table(study),
        without_result=_without_result(study),
        learning=(("loss", "Training loss", losses), ("accuracy", "Test accuracy", accuracies)),
        modules=_modules(study),
        views=[_shift_view(study, relative) for relative in (True, False)],
        scatter=scatter,
        correlation=figures.correlation_note(study),
        steps=steps,
        config=_yaml(study.config) if study.config else "",
        facts=_facts(study),
        listing=listing,
        plural=plural,
        sample=_sample,
    )
    return f"{content.strip()}\n"


def _asset(name: str) -> str:
    return resources.files("flexnorm.lab.report").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _sample(optim: int) -> Markup:
    """Return what an optimizer's lines look like."""
    drawn = legend_sample(Series("", (), (), hue=-1, style=optim))
    space = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": "0 0 34 14"}
    return element("svg", drawn, class_="sample", aria_hidden="true", **space)


def _without_result(study: Study) -> list[tuple[str, str, str, str]]:
    """Return what happened to the runs that are not complete, like ones together: who, seeds, status, reason."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for run in study.runs:
        if not run.complete:
            why = run.reason or ("its folder is not there yet" if run.status == MISSING_RUN else "no reason recorded")
            alike.setdefault((f"{run.norm}, {run.optim}", run.status, why), []).append(str(run.seed))
    return [(who, listing(seeds), status, why) for (who, status, why), seeds in alike.items()]


def _modules(study: Study) -> list[tuple[str, str]]:
    """Return which modules a numbered layer stands for, where networks name theirs differently."""
    every = figures.depths(study)
    if all(len(set(depth.names.values())) == 1 for depth in every):
        return []
    listed = []
    for depth in every:
        owners: dict[str, list[str]] = {}
        for norm in study.norms:
            if norm in depth.names:
                owners.setdefault(depth.names[norm], []).append(norm)
        listed.append((depth.label, "; ".join(f"{name} ({listing(norms)})" for name, norms in owners.items())))
    return listed


def _shift_view(study: Study, relative: bool) -> dict[str, Any]:
    """Return the charts of the shift, relative to the spread of the layers or absolute."""
    every, y = figures.depths(study), figures.shift_scale(study, relative)
    kind, count = "relative" if relative else "absolute", min(len(every), SHOWN_LAYERS)
    picks = {round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)}
    parts = [[d for i, d in enumerate(every) if (i in picks) is shown] for shown in (True, False)]
    return {
        "kind": kind,
        "label": "relative to the layer’s spread" if relative else "absolute",
        "depth": figures.shift_over_depth(study, relative, y) if len(parts[0]) > 1 else [],
        "time": [
            (f"shift-{kind}-{i}", optim, *(figures.shift_over_time(study, optim, part, relative, y) for part in parts))
            for i, optim in enumerate(study.optims)
            if any(run.complete and run.shifts for run in study.of(optim=optim))
        ],
    }


def _facts(study: Study) -> list[tuple[str, str]]:
    """Return name and value of what a run depends on besides its configuration."""
    facts = {**({"data": study.data} if study.data else {}), **study.environment}
    if study.total_seconds == study.total_seconds:
        facts["total time"] = duration(study.total_seconds)
    words = {k: ", ".join(f"{n} {w}" for n, w in v.items()) if isinstance(v, Mapping) else v for k, v in facts.items()}
    return [(name, str(value)) for name, value in words.items()]


def _yaml(config: Mapping[str, object]) -> str:
    import yaml

    text = yaml.safe_dump(dict(config), sort_keys=False, default_flow_style=None, allow_unicode=True, width=100)
    return text.rstrip()
