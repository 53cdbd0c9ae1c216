"""The page as text: well formed, self-contained, complete, and with the numbers that the files give."""

import csv
import re
import statistics
from collections import Counter
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from flexnorm.lab.charts.markup import VOID
from flexnorm.lab.report import picture, write_report


class Page(HTMLParser):
    """Checks nesting and collects tags, ids, attributes, texts and the cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.attributes, self.tables = [], Counter(), Counter(), [], []
        self.words = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in {tag}: {attrs}"
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids.update(value for name, value in attrs if name == "id")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append(("", dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("script", "style"):
            return
        self.words.append(data)
        if self.tables and ("td" in self.open or "th" in self.open):
            text, attrs = self.tables[-1][-1][-1]
            self.tables[-1][-1][-1] = (text + data, attrs)

    @property
    def text(self):
        return " ".join(self.words)


def report(out):
    path = write_report(out)
    assert path == out / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    check(page, path.read_text(encoding="utf-8"))
    return page


def check(page, text):
    """What holds for every page."""
    assert text.startswith("<!DOCTYPE html>")
    assert {page.tags[tag] for tag in ("html", "head", "body", "main", "h1", "script", "style")} == {1}
    assert all(count == 1 for count in page.ids.values()), page.ids.most_common(3)
    for tag, name, value in page.attributes:
        if name in ("href", "src"):
            assert value.startswith(("#", "data:")), (tag, name, value)
            assert not value.startswith("#") or value[1:] in page.ids
        if name in ("aria-labelledby", "for"):
            assert set(value.split()) <= set(page.ids)
        assert not name.startswith("on")
        assert name not in ("style", "action", "formaction", "srcset", "poster", "data", "background", "xlink:href")
    for value in re.findall(r' (?:d|points|x|y|cx|cy|x1|x2|y1|y2|r|width|height|data-x)="([^"]*)"', text):
        assert not re.search("nan|inf", value), value
    plots = [value for tag, name, value in page.attributes if tag == "svg" and name == "class" and value == "plot"]
    assert page.tags["desc"] == len(plots)
    assert "url(" not in text
    assert "@import" not in text


COLUMNS = (
    *("Normalizer", "Optimizer", "Test accuracy", "Runs", "Difference"),
    *("Training loss", "Shift W₁", "Relative shift", "Step time"),
)


def test_the_table_has_the_numbers_of_the_files(study):
    study.make(seeds=3)
    page = report(study.out)
    head, *rows = page.tables[0]
    names = [name for name in COLUMNS if any(text.startswith(name) for text, _ in head)]
    assert len(names) == len(head) == 9
    assert len(rows) == 6
    accuracies = []
    for row in rows:
        values = {name: attrs.get("data-v") for name, (_, attrs) in zip(names, row, strict=True)}
        texts = {name: text for name, (text, _) in zip(names, row, strict=True)}
        norm, optim = row[0][1]["data-v"], row[1][1]["data-v"]

        def last(norm, optim, seed, column):
            with (study.out / f"runs/{norm}/{optim}/seed{seed}/metrics.csv").open() as stream:
                return float(list(csv.DictReader(stream))[-1][column])

        def shifts(norm, optim, seed, column):
            with (study.out / f"runs/{norm}/{optim}/seed{seed}/shift.csv").open() as stream:
                return statistics.fmean(float(line[column]) for line in csv.DictReader(stream))

        mine = [last(norm, optim, seed, "test_accuracy") for seed in range(3)]
        base = [last("batch", optim, seed, "test_accuracy") for seed in range(3)]
        accuracies.append(statistics.fmean(mine))
        assert float(row[2][1]["data-v"]) == pytest.approx(statistics.fmean(mine))
        mean, std = re.match(r"([\d.]+) ± ([\d.]+)", row[2][0]).groups()
        assert float(mean) == pytest.approx(100 * statistics.fmean(mine), abs=0.051)
        assert float(std) == pytest.approx(100 * statistics.stdev(mine), abs=0.051)
        assert texts["Runs"].startswith("3 of 3")
        apart = statistics.fmean(a - b for a, b in zip(mine, base, strict=True))
        assert float(values["Difference"]) == pytest.approx(apart, abs=1e-12)
        assert ("baseline" in texts["Difference"]) == (norm == "batch")
        loss = statistics.fmean(last(norm, optim, seed, "train_loss") for seed in range(3))
        assert float(values["Training loss"]) == pytest.approx(loss)
        column = "Shift W₁"
        w1 = statistics.fmean(shifts(norm, optim, seed, "w1") for seed in range(3))
        assert float(values[column]) == pytest.approx(w1)
        low, high = map(float, re.search(r"\[([\d.]+), ([\d.]+)\]", texts[column]).groups())
        assert low == pytest.approx(statistics.fmean(shifts(norm, optim, s, "lower") for s in range(3)), rel=0.06)
        assert high == pytest.approx(statistics.fmean(shifts(norm, optim, s, "upper") for s in range(3)), rel=0.06)
        relative = statistics.fmean(shifts(norm, optim, seed, "relative") for seed in range(3))
        assert float(values["Relative shift"]) == pytest.approx(relative)
        assert "×" in texts["Step time"]
        assert "ms" in texts["Step time"]
    assert accuracies == sorted(accuracies, reverse=True)


def test_everything_that_should_be_there_is(study):
    study.make()
    page = report(study.out)
    for title in ("At a glance", "Learning curves", "Internal covariate shift", "Accuracy against shift", "Step time"):
        assert title in page.text
    assert "flexnorm compare --norm none,batch,group" in page.text
    assert "optims:" in page.text  # the configuration
    assert "2.13.0" in page.text  # the environment
    assert "Runs without a result" not in page.text
    panels = [i for i in page.ids if re.fullmatch(r"(curve|shift|depth)-.*-t", i)]
    assert len(panels) == 2 * 2 + 2 * 2 * 3 + 2 * 2


def test_names_are_only_ever_text(study):
    evil = '<script>alert("x")</script>'
    study.make(("batch", evil, "a&b", "it's"), ("sgd", '"><img src=http://x.invalid>'), 2, layers=("<b>", "'&\""))
    page = report(study.out)
    assert page.tags["img"] == 0
    assert page.tags["script"] == 1
    assert evil in page.text
    assert "<b>" in page.text
    root = ElementTree.parse(picture(study.out, study.out / "picture.svg")).getroot()
    assert evil in "".join(root.itertext())


@pytest.mark.parametrize(
    "options",
    [
        {"norms": ("batch",), "optims": ("sgd",), "seeds": 1, "epochs": 1},
        {"norms": ("group", "layer"), "optims": ("sgd",), "seeds": 2},
        {"zero": True},
        {"layers": ()},
        {"layers": ("only",)},
        {"layers": tuple(f"stage{i}.norm" for i in range(30)), "norms": ("batch", "group"), "epochs": 2},
        {"norms": ("batch", "x" * 200, "y" * 3), "optims": ("z" * 100,)},
        {"norms": tuple(f"norm{i}" for i in range(14)), "optims": tuple(f"o{i}" for i in range(8)), "seeds": 1},
        {"test_accuracy": 1.0},
        {"test_accuracy": 0.0},
        {"shift_relative": float("inf"), "shift_w1": float("inf")},
        {"train_loss": 1e300},
        {"test_accuracy": None, "train_loss": None, "shift_w1": None, "shift_relative": None, "shift": {}},
        {"epochs": 40, "seeds": 1, "norms": ("batch", "none")},
        {"results": False},
    ],
    ids=lambda options: ",".join(options),
)
def test_every_shape_of_a_study(study, options):
    study.make(**options)
    page = report(study.out)
    for norm in options.get("norms", ("none", "batch", "group")):
        assert norm in page.text
    ElementTree.parse(picture(study.out, study.out / "picture.svg"))


def test_runs_that_did_not_end_well_are_named_with_their_reason(study):
    study.make(("batch", "none", "group"), ("sgd",), 3, results=False)
    for seed in (0, 1):
        study.run("none", "sgd", seed, status="diverged", reason="the loss was NaN in epoch 2", epochs=2)
    study.run("none", "sgd", 2, status="refused", reason="cannot train on <one> image")
    (study.out / "runs/group/sgd/seed1/summary.json").unlink()
    page = report(study.out)
    ended = page.tables[1]
    assert [tuple(text for text, _ in row) for row in ended[1:]] == [
        ("none, sgdseed 0 and 1", "diverged", "the loss was NaN in epoch 2"),
        ("none, sgdseed 2", "refused", "cannot train on <one> image"),
        ("group, sgdseed 1", "unfinished", "stopped after epoch 4; the same command resumes it"),
    ]
    assert "2 runs diverged (none with sgd); 1 run refused (none with sgd); 1 run is not finished" in page.text
    cells = {row[0][1]["data-v"]: row for row in page.tables[0][1:]}
    assert "0 of 3" in cells["none"][3][0]
    assert "2 diverged" in cells["none"][3][0]
    assert cells["none"][2][1]["data-v"] == ""
    crosses = sum(value == "ended" for _, name, value in page.attributes if name == "class")
    assert crosses == 2 * (2 + 1)  # two diverged and one unfinished, in loss and accuracy


def test_when_all_diverged(study):
    study.make(("batch", "none"), ("sgd",), 2, status="diverged", reason="NaN at once")
    page = report(study.out)
    assert "No run was completed: 4 of 4 diverged" in page.text
    assert "NaN at once" in page.text


def test_curves_of_numbers_that_are_not_finite(study):
    study.make(("batch",), ("sgd",), 1, status="diverged", reason="x")
    path = study.out / "runs/batch/sgd/seed0/metrics.csv"
    path.write_text(path.read_text() + "5,110,nan,inf,nan,0.1,nan,1\n6,132,inf,-inf,0.5,0.1,1,1\n")
    assert "Learning curves" in report(study.out).text


def test_layers_of_different_names_are_matched_by_their_place(study):
    study.make(("batch",), ("sgd",), 1, results=False)
    study.run("normprop", "sgd", 0, layers=("a", "b", "c"))
    page = report(study.out)
    assert "layer 3" in page.text
    assert "a (normprop)" in page.text
    study.run("none", "sgd", 0, layers=("a", "0.1"))
    page = report(study.out)
    assert "layer 3" not in page.text  # unlike in number: by name
    assert "2.1" in page.text


def test_notes_of_runs_and_of_broken_files(study):
    study.make(("batch", "none"), ("sgd",), 2, results=False)
    for seed in (0, 1):
        path = study.out / f"runs/none/sgd/seed{seed}/summary.json"
        path.write_text(path.read_text().replace('"notes": []', '"notes": ["no weight is scale-invariant"]'))
    (study.out / "results.json").write_text("{")
    page = report(study.out)
    assert page.text.count("no weight is scale-invariant") == 1
    assert "none with sgd" in page.text
    assert "results.json could not be read" in page.text


def test_violated_intervals_are_called_so(study):
    study.make(("batch",), ("sgd",), 1)
    path = study.out / "runs/batch/sgd/seed0/shift.csv"
    head, first, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, re.sub(r"^((?:[^,]*,){4})[^,]*", r"\g<1>99", first), *rest]))
    assert "violated" in "".join(text for text, _ in report(study.out).tables[0][1])


def test_the_lag_of_the_shift_is_said(study):
    study.make()
    text = (
        (study.out / "results.json").read_text().replace('"epochs": 4, "seeds"', '"shift_lag": 5, "epochs": 4, "seeds"')
    )
    (study.out / "results.json").write_text(text)
    assert "W₁ over 5 steps ÷ spread" in report(study.out).text


def test_the_report_is_a_function_of_the_files(study):
    study.make()
    first = write_report(study.out).read_bytes()
    assert write_report(str(study.out)).read_bytes() == first
