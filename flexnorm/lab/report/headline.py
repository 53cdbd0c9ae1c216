"""What came out, in sentences that are computed: who won, by how much, and whether the seeds can tell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flexnorm.lab.charts.numbers import decimals_for, duration, fixed, listing, percent, plural, signed, significant
from flexnorm.lab.records import DIVERGED, REFUSED, Cell, Study
from flexnorm.lab.replicates import Replicates, paired_difference


class Headline(NamedTuple):
    """The head of the page: a short sentence, what backs it, and key figures."""

    claim: str
    details: tuple[str, ...]
    tiles: tuple[tuple[str, str, str], ...]  # value, what it is, more about it


def headline(study: Study, rows: Sequence[Cell]) -> Headline:
    """Return the head of the page for a study and its cells."""
    ranked = sorted((c for c in rows if math.isfinite(c.test_accuracy.mean)), key=lambda c: -c.test_accuracy.mean)
    if not ranked:
        return Headline(_nothing(study), tuple(filter(None, [_ended(study)])), _tiles(study, rows, None))
    best = ranked[0]
    rival, difference = _rival(study, best, ranked)
    details = [
        _accuracy(best, alone=len(ranked) == 1),
        _versus(rival, difference),
        _overlap(best, ranked),
        _shift(study, rows),
        _ended(study),
    ]
    return Headline(_claim(study, best, rival, difference), tuple(filter(None, details)), _tiles(study, rows, best))


def _name(cell: Cell) -> str:
    return f"{cell.norm} with {cell.optim}"


def _rival(study: Study, best: Cell, ranked: Sequence[Cell]) -> tuple[Cell | None, Replicates]:
    """Return what the best is compared with, and the difference paired by seed.

    That is the baseline under the same optimizer; for the baseline itself, or without one, the best of the other
    normalizers, or the best other row.
    """
    others = [c for c in ranked if c is not best]
    base = [c for c in others if c.norm == study.baseline and c.optim == best.optim]
    for candidate in base + [c for c in others if c.norm != best.norm] + others:
        mine, other = ({r.seed: r.test_accuracy for r in c.complete} for c in (best, candidate))
        paired = paired_difference(mine, other)
        if math.isfinite(paired.mean):
            return candidate, paired
    return None, Replicates(())


def _claim(study: Study, best: Cell, rival: Cell | None, difference: Replicates) -> str:
    if rival is None:
        return f"{_name(best)} reached {_percent(best.test_accuracy)} test accuracy"
    ahead = "stays ahead" if best.norm == study.baseline else "comes out ahead"
    who = rival.norm if rival.optim == best.optim else _name(rival)
    if difference.mean <= 0:
        return f"{_name(best)} and {who} are level"
    if difference.n < 2:
        return f"{_name(best)} {ahead} of {who} by {_points(difference)} points, on a single seed"
    if difference.std == 0:
        points = fixed(100 * difference.mean, 2)
        return f"{_name(best)} {ahead} of {who} by {points} points, on each of {difference.n} seeds"
    if not difference.separated:
        return f"{_name(best)} {ahead}, but the seeds do not tell it from {who}"
    return f"{_name(best)} {ahead} of {who} by {_points(difference)} points"


def _accuracy(best: Cell, *, alone: bool) -> str:
    values = best.test_accuracy
    if alone and values.n < 2:
        return "There is one seed, hence no standard deviation, and nothing to compare with."
    if alone:
        seeds = f"over {plural(values.n, 'seed')}"
        return f"Mean ± standard deviation {seeds}, which reach {percent(values.low, 2)} to {percent(values.high, 2)}."
    if values.n < 2:
        found = f"{_name(best)} has the highest test accuracy: {_percent(values)}."
        return f"{found} One seed alone has no standard deviation."
    if values.low == values.high:
        return (
            f"{_name(best)} has the highest mean test accuracy: {percent(values.mean, 2)}, on each of {values.n} seeds."
        )
    return (
        f"{_name(best)} has the highest mean test accuracy: {_percent(values)} "
        f"(mean ± standard deviation over {plural(values.n, 'seed')}; "
        f"{percent(values.low, 2)} to {percent(values.high, 2)})."
    )


def _versus(rival: Cell | None, difference: Replicates) -> str:
    if rival is None:
        return ""
    side = "above" if difference.mean >= 0 else "below"
    text = f"Seed by seed, that is {_points(difference)} points {side} {_name(rival)}"
    if difference.n < 2:
        return f"{text}; with one seed nobody can say whether that would happen again."
    if difference.std == 0 and difference.mean == 0:
        return f"Seed by seed, that is exactly what {_name(rival)} has, too."
    if difference.std == 0:
        return f"{text}, the same on every seed, so that the standard deviation of this difference cannot be told."
    low, high = (100 * (difference.mean + sign * difference.margin) for sign in (-1, 1))
    interval = f"the 95 % interval of the difference runs from {signed(low, 2)} to {signed(high, 2)}"
    if difference.separated:
        return f"{text}; {interval} and leaves zero out."
    return f"{text}; {interval} and contains zero, so these {difference.n} seeds do not tell the two apart."


def _overlap(best: Cell, ranked: Sequence[Cell]) -> str:
    if len(ranked) < 3:
        return ""
    others = [c for c in ranked if c is not best]
    touching = sum(c.test_accuracy.high >= best.test_accuracy.low for c in others)
    if not touching:
        return f"Its range over seeds lies above that of all {len(others)} other rows."
    return (
        f"Its range over seeds overlaps with that of {touching} of the {len(others)} other rows; "
        f"being picked as the best of {len(ranked)} flatters it."
    )


def _shift(study: Study, rows: Sequence[Cell]) -> str:
    measured = [c for c in rows if math.isfinite(c.shift_relative.mean)]
    if len(measured) < 2:
        return ""
    least = min(measured, key=lambda c: c.shift_relative.mean)
    amount = significant(least.shift_relative.mean)
    text = f"The layers shift least under {_name(least)}: by {amount} of their spread per step"
    base = [c for c in measured if c.norm == study.baseline and c.optim == least.optim and c is not least]
    if base and least.shift_relative.mean > 0:
        factor = base[0].shift_relative.mean / least.shift_relative.mean
        if factor < 1.05:
            return f"{text}, hardly less than {study.baseline} with the same optimizer."
        text += f", {significant(factor, 2)} times less than {study.baseline} with the same optimizer"
    return f"{text}."


def _ended(study: Study) -> str:
    parts = []
    for status, verb in ((DIVERGED, "diverged"), (REFUSED, "refused")):
        runs = [r for r in study.runs if r.status == status]
        if runs:
            names = listing(dict.fromkeys(f"{r.norm} with {r.optim}" for r in runs))
            parts.append(f"{plural(len(runs), 'run')} {verb} ({names})")
    open_runs = sum(not r.complete for r in study.runs) - sum(r.status in (DIVERGED, REFUSED) for r in study.runs)
    if open_runs:
        parts.append(f"{plural(open_runs, 'run')} {'is' if open_runs == 1 else 'are'} not finished")
    return f"{'; '.join(parts)}: see “Runs without a result”." if parts else ""


def _nothing(study: Study) -> str:
    if not study.runs:
        return "There is no run yet"
    diverged = sum(r.status == DIVERGED for r in study.runs)
    return f"No run was completed: {diverged} of {len(study.runs)} diverged" if diverged else "No run is complete yet"


def _tiles(study: Study, rows: Sequence[Cell], best: Cell | None) -> tuple[tuple[str, str, str], ...]:
    tiles: list[tuple[str, str, str]] = []
    if best is not None:
        tiles.append((percent(best.test_accuracy.mean, 2), "highest mean accuracy", _name(best)))
    for value, label, pick in _EXTREMES:
        known = [c for c in rows if math.isfinite(pick(c).mean)]
        if known:
            least = min(known, key=lambda c: pick(c).mean)
            tiles.append((value(pick(least).mean), label, _name(least)))
    done = f"{len(study.complete)}\u202f/\u202f{len(study.runs)}"
    time = "" if math.isnan(study.total_seconds) else f"in {duration(study.total_seconds)}"
    tiles.append((done, "runs complete", time or f"{plural(len(rows), 'row')} of the table"))
    return tuple(tiles)


_Pick = Callable[[Cell], Replicates]
_EXTREMES: tuple[tuple[Callable[[float], str], str, _Pick], ...] = (
    (significant, "smallest relative shift", lambda c: c.shift_relative),
    (lambda v: f"{significant(v)}\u202fms", "fastest step", lambda c: Replicates((c.step_ms.median,))),
)


def _percent(values: Replicates) -> str:
    places = decimals_for([100 * values.std], least=1, most=3, default=2)
    std = f" ± {fixed(100 * values.std, places)}" if values.n > 1 else ""
    return f"{fixed(100 * values.mean, places)}{std}\u202f%"


def _points(difference: Replicates) -> str:
    places = decimals_for([100 * difference.std], least=1, most=2, default=2)
    std = f" ± {fixed(100 * difference.std, places)}" if difference.n > 1 else ""
    return f"{fixed(abs(100 * difference.mean), places)}{std}"
