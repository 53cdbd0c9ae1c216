"""The pictures of docs/shift.md: the claims from results/claims_*.json, and the tutorial's from its own code.

python -m benchmarks.claims_figures
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "shift"
COLOURS = {"batch": "#1d262f", "unitized": "#1a60ab", "unitized, rms": "#2fa0e0", "population": "#c04a08"}
COLOURS |= {"normprop": "#2c8c57", "none": "#a8305a"}


def claims() -> None:
    """Absolute shift above, relative shift below: against width, against noise, through the layers."""
    width, noise, training = (
        json.loads((ROOT / "results" / f"claims_{name}.json").read_text(encoding="utf-8"))
        for name in ("width", "noise", "training")
    )
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for column, (key, table) in enumerate((("width", width["table"]), ("level", noise["table"]))):
        for norm in dict.fromkeys(row["norm"] for row in table):
            rows = [row for row in table if row["norm"] == norm]
            x = [row[key] for row in rows]
            draw: dict[str, Any] = {"color": COLOURS[norm], "marker": "o", "markersize": 3.5}
            axes[0, column].plot(x, [row["w1"] for row in rows], label=norm, **draw)
            axes[0, column].plot(x, [row["bound"] for row in rows], **(draw | {"ls": "--", "marker": ""}))
            axes[1, column].plot(x, [100 * row["relative"] for row in rows], label=norm, **draw)
    for row in axes[:, :2]:
        row[0].set(xscale="log", xticks=[16, 64, 256, 1024], xticklabels=["16", "64", "256", "1024"])
        row[1].set(xscale="symlog")
        row[1].set_xscale("symlog", linthresh=0.03)
        row[1].set_xticks([0, 0.03, 0.1, 0.3, 1], ["0", "0.03", "0.1", "0.3", "1"])
        for axis in row:
            axis.minorticks_off()
            axis.set_yscale("log")
    for norm in dict.fromkeys(row["norm"] for row in training["rows"]):
        rows = [row for row in training["rows"] if row["norm"] == norm]
        depth = [row["depth"] for row in rows]
        draw = {"color": COLOURS[norm], "marker": "o", "markersize": 3.5, "label": norm}
        axes[0, 2].plot(depth, [row["w1"] for row in rows], **draw)
        axes[1, 2].plot(depth, [100 * row["relative"] for row in rows], **draw)
    for axis in axes[:, 2]:
        axis.set(xticks=[1, 2, 3, 4], yscale="log")
        axis.minorticks_off()
    titles = ("width d of the layer", "noise of the moments (in std)", "layer, CIFAR-10 training")
    for column, title in enumerate(titles):
        axes[1, column].set_xlabel(title)
    axes[0, 0].set_ylabel("W1 of one update")
    axes[1, 0].set_ylabel("W1 in % of the spread")
    axes[0, 0].legend(title="dashed: bound", fontsize=8, frameon=False, loc="upper left")
    axes[0, 0].set_ylim(top=400)
    axes[0, 2].legend(fontsize=8, frameon=False)
    for axis in axes.flat:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    axes[1, 0].set_yticks([4, 5, 6, 7, 8])
    axes[1, 0].minorticks_off()
    axes[1, 2].set_yticks([4, 6, 8, 10, 12])
    axes[1, 2].minorticks_off()
    figure.savefig(FOLDER / "claims.png", dpi=70)
    plt.close(figure)


def tutorial() -> None:
    """Run the first code of docs/shift.md, which saves its picture."""
    text = (ROOT / "docs" / "shift.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(code, "docs/shift.md", "exec"), {})
        picture = Path("shift.png").read_bytes()
    (FOLDER / "tutorial.png").write_bytes(picture)


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
    claims()
    tutorial()
