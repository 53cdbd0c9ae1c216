"""Charts: marks lie where the scales say, nothing is drawn that is not finite, and files stand alone."""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from flexnorm.lab.charts import Chart, Series, hues, linear, logarithmic, rows, save, sheet, write_text

ROOT = Path(__file__).resolve().parents[3]


def lines(*series, **words):
    x = linear([v for s in series for v in s.x], tight=True)
    return Chart("A title", x, linear([v for s in series for v in s.y]), series, x_label="epoch", **words)


def test_lines_carry_what_the_pointer_reads():
    chart = lines(Series("a", (1, 2, 3), (0.5, 0.25, 0.125)), Series("b", (1, 3), (0.4, 0.2), hue=1))
    text = chart.svg("key")
    assert 'data-at="epoch 1|epoch 2|epoch 3"' in text
    assert 'data-v="0.500|0.250|0.125"' in text
    assert 'data-v="0.400|–|0.200"' in text
    assert [float(v) for v in re.search('data-x="([^"]*)"', text)[1].split()] == pytest.approx(
        [chart.px(v) for v in (1, 2, 3)], abs=0.01
    )
    assert "data-x" not in chart.svg("key", pointer=False)
    assert chart.description == "Last values: a 0.125; b 0.200."
    assert lines().description == "There is nothing to draw."


def test_what_is_not_finite_is_passed_over():
    track = Series("a", (1.0, 2.0, 3.0), (0.5, math.nan, 0.1), (math.nan, math.nan, 0.05), (0.6, 0.7, math.nan))
    text = lines(track).svg("key")
    assert not re.search('="[^"]*nan', text)
    assert text.count('class="mark"') == 2


def test_markers_are_few_and_a_run_that_ended_early_has_a_cross():
    long = Series("a", range(20), [0.1 * v for v in range(20)])
    assert lines(long).svg("key").count('class="mark"') == 1
    assert 'class="mark"' not in lines(Series("a", (1, 2), (1, 2), kind="curve")).svg("key")
    text = lines(Series("a", (1, 2), (1, 2), ended=True)).svg("key")
    assert (text.count('class="ended"'), text.count('class="mark"')) == (1, 0)


def test_whiskers_stand_upright_and_lie_in_a_chart_of_rows():
    upright = lines(Series("a", (1.0,), (2.0,), (1.5,), (2.5,), kind="points"))
    y = rows([("first", 0), ("second", 1)])
    lying = Chart(
        "t", linear([0, 4]), y, [Series("a", (2.0,), (y.ticks[1].value,), (1.5,), (2.5,), kind="points", hue=1)]
    )
    for chart, same in ((upright, "x"), (lying, "y")):
        whisker = ElementTree.fromstring(chart.svg("key")).find(".//*[@class='whisker']")
        assert whisker.get(f"{same}1") == whisker.get(f"{same}2")
        assert len({whisker.get(f"{v}{i}") for v in "xy" for i in (1, 2)} - {whisker.get(f"{same}1")}) == 2
    assert lying.py(y.ticks[1].value) - lying.py(y.ticks[0].value) == pytest.approx(34.0)
    assert lying.size == (360.0, 8.0 + 2 * 34.0 + 38.0)


def test_notes_do_not_lie_on_each_other():
    series = [Series(f"s{i}", (1.0,), (1.0,), kind="points", tips=("t",), notes=("name",)) for i in range(9)]
    chart = Chart("t", linear([0, 2]), linear([0, 2]), series)
    names = ElementTree.fromstring(chart.svg("key")).findall(".//*[@class='name']")
    assert len({(n.get("x"), n.get("y")) for n in names}) == len(names)
    assert 1 <= len(names) <= 4


def test_ticks_may_be_given_and_zero_has_a_place():
    x = logarithmic([0.0, 0.03, 1.0], at=(0.03, 0.3, 1.0))
    assert [tick.label for tick in x.ticks] == ["0.03", "0.3", "1"]
    frame = Chart("t", x, linear([0, 1]), ()).frame()
    assert 'text-anchor="middle">0</text>' in frame


def test_a_sheet_stands_alone_in_both_styles():
    chart = lines(Series("a < b", (1, 2), (1, 2)), Series("c", (1, 2), (2, 1), kind="curve", hue=-1))
    for plain in (False, True):
        text = sheet([chart] * 5, title="All & more", hues=hues(("batch", "group"), "batch"), columns=2, plain=plain)
        root = ElementTree.fromstring(text)
        words = list(root.itertext())
        assert "All & more" in words
        assert words.count("a < b") == 1  # once, in the legend
        assert len(root.findall(".//*[@class='plot']")) == 5
        assert ("var(" in text) is not plain
        assert ("@media" in text) is not plain
        height = float(root.get("height"))
        lows = [float(re.search(r" ([\d.]+)\)", g.get("transform"))[1]) for g in root if g.get("transform")]
        assert max(lows) + chart.size[1] < height
        assert len(set(lows)) == 3


def test_the_code_of_the_page_about_pictures_runs(tmp_path, monkeypatch):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pictures.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "docs/pictures.md", "exec"), {})
    assert "unitized" in "".join(ElementTree.parse("accuracy.svg").getroot().itertext())


def test_saving(tmp_path):
    path = save(tmp_path / "a.svg", [lines(Series("a", (1, 2), (1, 2)))], title="t")
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(ValueError, match="unknown format of a picture"):
        save(tmp_path / "a.jpg", [], title="t")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_text(tmp_path / "absent" / "x", "")
