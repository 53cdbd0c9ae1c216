"""The page: one HTML file that needs nothing but itself."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path

from flexnorm._version import __version__
from flexnorm.lab.charts import Chart, Series, hues, legend_sample, style, write_text
from flexnorm.lab.charts.markup import Child, Markup, element, join
from flexnorm.lab.charts.numbers import duration, listing, plural
from flexnorm.lab.records import MISSING_RUN, Cell, Study
from flexnorm.lab.report import figures
from flexnorm.lab.report.glossary import glossary
from flexnorm.lab.report.headline import Headline, headline
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
    rows = study.cells
    head = headline(study, rows)
    css = style(hues(study.norms, study.baseline)) + _asset("style.css")
    script = _asset("page.js")
    # The page may run this script and this style, and load nothing at all.
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(css)}'; script-src '{_digest(script)}'"
    sections = list(_sections(study, rows))
    body = element(
        "body",
        element("a", "Skip to the results", href="#results", class_="skip"),
        element(
            "div",
            _header(study, head, [(key, title) for key, title, _ in sections]),
            element("main", _body(study, sections)),
            _footer(study),
            class_="page",
        ),
        element("script", Markup(script)),
    )
    title = f"{study.subject}: {head.claim}"
    document = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", http_equiv="Content-Security-Policy", content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("meta", name="generator", content=f"flexnorm {__version__}"),
            element("link", rel="icon", href="data:,"),
            element("title", title),
            element("style", Markup(css)),
        ),
        body,
        lang="en",
    )
    return f"<!DOCTYPE html>\n{document}\n"


def _asset(name: str) -> str:
    return resources.files("flexnorm.lab.report").joinpath(name).read_text(encoding="utf-8")


def _digest(content: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}"


def _header(study: Study, head: Headline, contents: Sequence[tuple[str, str]]) -> Markup:
    tiles = [
        element("div", element("dt", what), element("dd", value, class_="value"), element("dd", more, class_="who"))
        for value, what, more in head.tiles
    ]
    links = [element("li", element("a", title, href=f"#{key}")) for key, title in contents]
    size = f"{plural(len(study.norms), 'normalizer')} × {plural(len(study.optims), 'optimizer')}"
    return element(
        "header",
        element("p", element("b", study.subject), f" · {size} · flexnorm {__version__}", class_="eyebrow"),
        element("h1", head.claim),
        element("div", [element("p", sentence) for sentence in head.details], class_="lede"),
        element("dl", tiles, class_="tiles"),
        element("nav", element("ul", links), aria_label="Contents"),
    )


def _body(study: Study, sections: Sequence[tuple[str, str, Child]]) -> Iterator[Markup]:
    yield _legend(study)
    for key, title, content in sections:
        yield element("section", element("h2", title, id=f"{key}-h"), content, id=key, aria_labelledby=f"{key}-h")


def _legend(study: Study) -> Markup:
    norms = [
        element(
            "li",
            element(
                "span", element("i", class_="chip"), element("span", norm), class_=f"key n{i}", data_n=i, title=norm
            ),
        )
        for i, norm in enumerate(study.norms)
    ]
    optims = [
        element("li", element("span", _sample(i), element("span", optim), class_="key"))
        for i, optim in enumerate(study.optims)
    ]
    gap = element("li", class_="gap", aria_hidden="true")
    return element("div", element("ul", norms, gap, optims), class_="legend", role="group", aria_label="Legend")


def _sample(optim: int) -> Markup:
    """Return what an optimizer's lines look like."""
    drawn = legend_sample(Series("", (), (), hue=-1, style=optim))
    space = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": "0 0 34 14"}
    return element("svg", drawn, class_="sample", aria_hidden="true", **space)


def _sections(study: Study, rows: Sequence[Cell]) -> Iterator[tuple[str, str, Child]]:
    """Yield (id, title, content) of every section that has something to show."""
    if any(c.complete for c in rows):
        yield "overview", "At a glance", _overview(study)
    yield "results", "Results", results_table(study, rows) if rows else element("p", "There is no run to report on.")
    if any(not run.complete for run in study.runs):
        yield "ended", "Runs without a result", _ended(study)
    losses, accuracies = figures.loss_curves(study), figures.accuracy_curves(study)
    if losses or accuracies:
        yield "curves", "Learning curves", _curves(losses, accuracies)
    if any(run.shifts for run in study.complete):
        yield "shift", "Internal covariate shift", _shift(study)
    if (large := figures.scatter(study, width=960, height=500)) is not None:
        small = figures.scatter(study, width=360, height=400)
        caption = _caption(
            "Large marks are means, small ones single seeds, joined by a line. ", figures.correlation_note(study)
        )
        yield "tradeoff", "Accuracy against shift", element("figure", _two("scatter", large, small), caption)
    if (large := figures.steps(study, width=960)) is not None:
        small = figures.steps(study, width=360)
        caption = _caption(
            "The median time of an update, and of that the median over seeds; dots are single seeds. "
            "Times depend on the machine and on what else it was doing."
        )
        yield "speed", "Step time", element("figure", _two("steps", large, small), caption)
    yield "glossary", "What the numbers mean", glossary()
    yield "repeat", "How to repeat this", _repeat(study)


def _ended(study: Study) -> Markup:
    """Return the table of what happened to the runs that are not complete, like ones in one line."""
    alike: dict[tuple[str, str, str, str], list[str]] = {}
    for run in study.runs:
        if not run.complete:
            why = run.reason or ("its folder is not there yet" if run.status == MISSING_RUN else "no reason recorded")
            alike.setdefault((run.norm, run.optim, run.status, why), []).append(str(run.seed))
    head = element("tr", [element("th", name, scope="col") for name in ("Run", "What happened", "Why")])
    rows = [
        element(
            "tr",
            element("th", f"{norm}, {optim}", element("small", f"seed {listing(seeds)}"), scope="row"),
            element("td", element("span", status, class_=f"badge {status}")),
            element("td", why),
        )
        for (norm, optim, status, why), seeds in alike.items()
    ]
    return element(
        "div", element("table", element("thead", head), element("tbody", rows), class_="plain"), class_="scroll"
    )


def _two(key: str, large: Chart, small: Chart | None) -> Markup:
    """Return a figure in two shapes, of which the width of the window shows one."""
    narrow = None if small is None else small.svg(f"{key}-narrow")
    return join([element("div", large.svg(key), class_="wide"), element("div", narrow, class_="narrow")])


def _caption(*content: Child) -> Markup:
    return element("figcaption", *content)


def _panels(key: str, charts: Sequence[Chart]) -> Markup:
    return element("div", [chart.svg(f"{key}-{i}") for i, chart in enumerate(charts)], class_="panels")


def _overview(study: Study) -> Markup:
    caption = _caption(
        "Marks are means over seeds (of times: medians), whiskers one standard deviation, small dots single seeds. "
        "Colour is the normalizer, shape the optimizer, here and in every figure."
    )
    return element("figure", _panels("summary", figures.summary(study)), caption)


def _curves(losses: Sequence[Chart], accuracies: Sequence[Chart]) -> Markup:
    parts: list[Child] = []
    for key, title, charts in (("loss", "Training loss", losses), ("accuracy", "Test accuracy", accuracies)):
        if charts:
            parts += [element("h3", f"{title} per epoch"), element("figure", _panels(f"curve-{key}", charts))]
    note = (
        "Lines are means over the complete runs, bands reach from the lowest to the highest seed. "
        "All panels of a row share their axes."
    )
    return join([*parts, element("p", note, class_="note")])


def _shift(study: Study) -> Markup:
    every = figures.depths(study)
    count = min(len(every), SHOWN_LAYERS)
    picks = {round(i * (len(every) - 1) / max(count - 1, 1)) for i in range(count)}
    chosen, folded = [d for i, d in enumerate(every) if i in picks], [d for i, d in enumerate(every) if i not in picks]
    views = [element("div", _shift_view(study, relative, chosen, folded), class_=kind) for relative, kind in _KINDS]
    choice = element(
        "fieldset",
        element("legend", "Show the shift"),
        [
            [
                element(
                    "input", type="radio", name="shift", id=f"pick-{kind}", class_=f"pick-{kind}", checked=relative
                ),
                element("label", label, for_=f"pick-{kind}"),
            ]
            for (relative, kind), label in zip(_KINDS, ("relative to the layer’s spread", "absolute"), strict=True)
        ],
        class_="switch",
    )
    intro = element(
        "p",
        "How far one update of the weights moves the distribution of a layer’s output on the probe images. Lines are "
        "means over the complete runs; the band is the certified interval, in which the true distance lies.",
    )
    return join([intro, _modules(study, every), element("div", choice, views, class_="views")])


def _modules(study: Study, every: Sequence[figures.Depth]) -> Markup | None:
    """Return which modules a numbered layer stands for, where networks name theirs differently."""
    if all(len(set(depth.names.values())) == 1 for depth in every):
        return None
    listed = []
    for depth in every:
        owners: dict[str, list[str]] = {}
        for norm in study.norms:
            if norm in depth.names:
                owners.setdefault(depth.names[norm], []).append(norm)
        named = "; ".join(f"{name} ({listing(norms)})" for name, norms in owners.items())
        listed.append(element("li", element("b", depth.label), f": {named}"))
    return element("details", element("summary", "Which modules these layers are"), element("ul", listed))


_KINDS = ((True, "relative"), (False, "absolute"))


def _shift_view(
    study: Study, relative: bool, chosen: Sequence[figures.Depth], folded: Sequence[figures.Depth]
) -> Iterator[Markup]:
    y = figures.shift_scale(study, relative)
    kind = "relative" if relative else "absolute"
    if len(chosen) > 1:
        yield element("h3", f"Over the depth of the network: {kind}, mean over training")
        yield element("figure", _panels(f"depth-{kind}", figures.shift_over_depth(study, relative, y)))
    for index, optim in enumerate(study.optims):
        key = f"shift-{kind}-{index}"
        if not any(run.complete and run.shifts for run in study.of(optim=optim)):
            continue
        yield element("h3", f"Layer by layer over training, {optim}: {kind}")
        yield element("figure", _panels(key, figures.shift_over_time(study, optim, chosen, relative, y)))
        if folded:
            more = element("summary", f"The {plural(len(folded), 'other layer')}")
            others = figures.shift_over_time(study, optim, folded, relative, y)
            yield element("details", more, _panels(f"{key}-more", others))


def _repeat(study: Study) -> Iterator[Markup]:
    if study.command:
        yield element("h3", "Command")
        yield element("div", element("pre", study.command, tabindex="0"), class_="code")
    if study.config:
        yield element("h3", "Configuration")
        again, name = element("code", "flexnorm compare --config config.yaml"), element("code", "config.yaml")
        yield element("p", "Saved as ", name, ", it runs again with ", again, ".", class_="note")
        yield element("div", element("pre", _yaml(study.config), tabindex="0"), class_="code")
    facts = {**({"data": study.data} if study.data else {}), **study.environment}
    if study.total_seconds == study.total_seconds:
        facts["total time"] = duration(study.total_seconds)
    if facts:
        yield element("h3", "Environment")
        yield element("dl", [[element("dt", k), element("dd", _plain(v))] for k, v in facts.items()], class_="facts")
    if study.notes:
        yield element("h3", "Files that could not be used")
        yield element("ul", [element("li", note) for note in study.notes])


def _plain(value: object) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)


def _yaml(config: Mapping[str, object]) -> str:
    import yaml

    return yaml.safe_dump(
        dict(config), sort_keys=False, default_flow_style=None, allow_unicode=True, width=100
    ).rstrip()


def _footer(study: Study) -> Markup:
    return element(
        "footer",
        f"Made by flexnorm {__version__} from the files in {study.name}. This file needs no network and contains "
        "everything it shows.",
    )
