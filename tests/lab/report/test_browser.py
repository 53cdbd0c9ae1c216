"""The page in a real browser: no console message, no request, no overflow, and the script does what it says."""

import struct
import zlib
from xml.etree import ElementTree

import pytest

from flexnorm.lab.report import picture, write_report

pytestmark = pytest.mark.browser

DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture
def browser(chromium, tmp_path):
    start, program = chromium
    running = start(program, tmp_path / "profile")
    yield running
    running.close()


def colours(path):
    """How many different colours a screenshot has (8-bit RGB or RGBA, as Chromium writes them)."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height, depth, kind = struct.unpack(">IIBB", data[16:26])
    assert depth == 8
    size = {2: 3, 6: 4}[kind]
    at, packed = 8, b""
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        if data[at + 4 : at + 8] == b"IDAT":
            packed += data[at + 8 : at + 8 + length]
        at += 12 + length
    raw = zlib.decompress(packed)
    rows = {raw[i : i + 1 + width * size] for i in range(0, len(raw), 1 + width * size)}
    return width, height, len(rows)


def quiet(tab, address):
    seen = tab.loaded()
    assert seen.errors == []
    assert seen.requests == [address]


def test_the_page_in_a_browser(browser, study, tmp_path):
    study.make(("batch", "<script>alert(1)</script>", "a-name-" * 12), ("sgd", "sgdg"), 2, results=False)
    study.run("batch", "sgdg", 1, status="diverged", reason="a reason-without-any-place-to-break" * 9)
    address = write_report(study.out).resolve().as_uri()
    for (width, height), dark in ((DESKTOP, False), (PHONE, True)):
        tab = browser.open(address, width=width, height=height, dark=dark)
        quiet(tab, address)
        assert tab.run("document.documentElement.scrollWidth") <= width
        assert tab.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(20, 23, 27)" if dark else "rgb(253, 253, 251)"
        )
        shot = tab.screenshot(tmp_path / f"{width}.png", full=False)
        assert colours(shot)[:2] == (width, height)
        assert colours(shot)[2] > 100
        hidden = (
            "[...document.querySelectorAll('.wide, .narrow')].filter(e => e.offsetHeight === 0).map(e => e.className)"
        )
        assert set(tab.run(hidden)) == ({"narrow"} if width > 1000 else {"wide"})
        tab.close()


def test_what_the_script_does(browser, study):
    study.make()
    address = write_report(study.out).resolve().as_uri()
    tab = browser.open(address)
    column = "[...document.querySelector('table.results').tBodies[0].rows].map(r => parseFloat(r.cells[4].dataset.v))"
    losses = "[...document.querySelector('table.results').tBodies[0].rows].map(r => parseFloat(r.cells[5].dataset.v))"
    assert len(tab.run(column)) == 6
    for order in (True, False):
        tab.run("document.querySelectorAll('table.results th button')[5].click()")
        assert tab.run(losses) == sorted(tab.run(losses), reverse=order)
    assert tab.run("document.querySelector('table.results th[aria-sort]').textContent").startswith("Training loss")

    marks = "[...document.querySelectorAll('svg [data-n=\"1\"]')]"
    shown = f"{marks}.filter(e => getComputedStyle(e).display !== 'none').length"
    before = tab.run(shown)
    assert before > 4
    tab.run("document.querySelectorAll('button.key')[1].click()")
    assert tab.run("document.querySelectorAll('button.key')[1].getAttribute('aria-pressed')") == "false"
    assert tab.run(shown) == 0
    tab.run("document.querySelectorAll('button.key')[1].click()")
    assert tab.run(shown) == before

    tab.run("document.querySelector('#curves').scrollIntoView({behavior: 'instant'})")
    plot = "document.getElementById('curve-loss-0-t').ownerSVGElement.getBoundingClientRect()"
    tab.call(
        "Input.dispatchMouseEvent",
        type="mouseMoved",
        x=tab.run(f"{plot}.x + {plot}.width / 2"),
        y=tab.run(f"{plot}.y + {plot}.height / 2"),
    )
    assert tab.run("document.getElementById('tip').hidden") is False
    assert tab.run("document.getElementById('tip').textContent").startswith("epoch ")
    assert tab.run("document.querySelectorAll('#tip div').length") == 3

    view = "['absolute', 'relative'].map(c => getComputedStyle(document.querySelector('div.' + c)).display)"
    assert tab.run(view) == ["none", "block"]
    tab.run("document.getElementById('pick-absolute').click()")
    assert tab.run(view) == ["block", "none"]

    tab.run("document.querySelector('.copy').click()")
    assert tab.run("new Promise(d => setTimeout(() => d(document.querySelector('.copy').textContent), 100))") in (
        "Copied",
        "Selected",
    )
    quiet(tab, address)


def test_the_keys_read_a_chart_and_it_can_be_saved(browser, study):
    study.make()
    address = write_report(study.out).resolve().as_uri()
    tab = browser.open(address)
    chart = "document.getElementById('curve-loss-0-t').ownerSVGElement"

    def press(key):
        tab.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        return tab.run("document.getElementById('tip').hidden || document.querySelector('#tip b').textContent")

    tab.run(f"{chart}.focus()")
    assert [press(key) for key in ("ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowRight", "Home")] == [
        *("epoch 1", "epoch 2", "epoch 1", "epoch 4", "epoch 4", "epoch 1")
    ]
    assert press("Escape") is True
    press("End")
    tab.run(f"{chart}.blur()")
    assert tab.run("document.getElementById('tip').hidden") is True

    tab.run("URL.createObjectURL = (blob) => { window.saved = blob; return '#'; }")
    tab.run(f"{chart}.parentNode.querySelector('.save').click()")
    root = ElementTree.fromstring(tab.run("window.saved.text()"))
    assert "Training loss per epoch with sgd" in "".join(root.itertext())
    assert "--paper" in root[0].text  # its style
    quiet(tab, address)


def test_without_script_and_on_paper(browser, study):
    study.make()
    address = write_report(study.out).resolve().as_uri()
    tab = browser.open(address, script=False)
    tab.call("Emulation.setScriptExecutionDisabled", value=False)
    assert tab.run("document.querySelectorAll('button').length") == 0
    assert tab.run("document.querySelector('table.results').tBodies[0].rows.length") == 6
    tab.call("Emulation.setEmulatedMedia", media="print")
    assert tab.run("getComputedStyle(document.querySelector('div.absolute')).display") == "block"
    quiet(tab, address)


def test_the_picture_in_a_browser(browser, study, tmp_path):
    study.make()
    path = picture(study.out, tmp_path / "picture.svg")
    tab = browser.open(path.as_uri(), dark=True)
    quiet(tab, path.as_uri())
    assert colours(tab.screenshot(tmp_path / "picture.png", full=False))[2] > 50
