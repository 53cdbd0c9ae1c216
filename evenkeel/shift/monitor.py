"""ShiftMonitor: internal covariate shift of any model, layer by layer, while it trains, and without a trace in it.

Measure: Huang & Yu (CVPR 2020, arXiv 2001.02814), the Wasserstein-1 distance between the distributions of a layer's
output before and after an update. Deviations: both distributions are those of the same probe inputs with the same noise
(otherwise the bias of empirical transport in high dimension hides the shift), and the distance is also given relative
to the spread of the output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from evenkeel._messages import unknown_name
from evenkeel.shift._points import Samples, channel_axis, choose_rows, count_points, first_tensor, take_points
from evenkeel.shift._probe import Mode, call, detached, side_forward
from evenkeel.shift._select import Layers, select_layers, unwrap
from evenkeel.shift.records import ShiftRecord, measure_shift, record_from_dict
from evenkeel.shift.schedules import Schedule, as_schedule
from evenkeel.shift.sinks import Sink, as_sink

Reference = Literal["previous", "initial", "both"]
Points = dict[str, Tensor]

_FORMAT = 1


class ShiftMonitor:
    """Measures how far the output distribution of each layer moves as a model trains.

    Args:
        model: Any module, also compiled or wrapped for distributed training; the module inside is what is called.
        probe: The inputs on which the layers are compared, kept as a copy: a tensor (the only argument of the model), a
            tuple (positional) or a dictionary (keyword arguments), on the device of the model. A training batch held
            out for the purpose does well.
        layers: Which layers: ``"norm"`` for all normalization layers, a name, a glob pattern, ``"re:..."``, or a list
            of names, patterns and modules.
        every: When to measure: a number of steps, a list of steps, or a schedule from :mod:`evenkeel.shift.schedules`.
        lag: Optimizer steps between the two distributions that are compared.
        reference: Compare with ``"previous"`` (``lag`` steps earlier), with ``"initial"`` (the start), or ``"both"``.
        samples: What a point is: ``"position"``, every position of every input a point in R^C; or ``"image"``, every
            input one point in R^(C H W).
        max_samples: At most so many points of each layer, drawn once and for all by a private generator. The exact
            distance costs about n^3: 128 points take about a millisecond, 512 about thirty.
        mode: ``"train"``: layers work as in training (batch statistics, dropout); ``"eval"``: as in evaluation.
        forward: How to call the model on the probe, ``forward(model, probe)``, where the default does not do.
        autocast: Type to run the side forward in under autocast; ``None`` for the state at the call of :meth:`step`.
        channel_dim: Axis of the channels where the default (last for LayerNorm, RMSNorm, Linear, Embedding and
            attention, else 1) is wrong.
        sinks: Where else to put each record as soon as it is made: paths ending in ``.csv`` or ``.jsonl``, sinks from
            :mod:`evenkeel.shift.sinks`, or functions of a record.
        seed: Seed of the choice of points and of the noise in the side forward.

    Attributes:
        records: All measurements so far, a list of :class:`ShiftRecord`; readable at any time.
        steps: Optimizer steps seen so far.
        layers: Names of the layers that are watched.

    Raises:
        ValueError: No layer matches, or an argument is out of range.
        TypeError: An argument is of the wrong kind.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x = torch.randn(16, 4)
        >>> with ShiftMonitor(model, x, every=1) as monitor:
        ...     for _ in range(3):
        ...         model(x).square().mean().backward()
        ...         optimizer.step()
        ...         new = monitor.step()
        >>> [(record.step, record.layer) for record in monitor.records]
        [(1, '1'), (2, '1'), (3, '1')]
        >>> all(record.lower <= record.w1 <= record.upper for record in monitor.records)
        True
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        layers: Layers = "norm",
        *,
        every: int | Schedule | Iterable[int] = 100,
        lag: int = 1,
        reference: Reference = "previous",
        samples: Samples = "position",
        max_samples: int = 128,
        mode: Mode = "train",
        forward: Callable[[nn.Module, Any], Any] = call,
        autocast: torch.dtype | None = None,
        channel_dim: int | None = None,
        sinks: Iterable[Any] = (),
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a module, got {type(model).__name__}")
        for name, number in (("lag", lag), ("max_samples", max_samples)):
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ValueError(f"{name} must be a whole number from 1 on, got {number!r}")
        for name, value, valid in (
            ("reference", reference, get_args(Reference)),
            ("samples", samples, get_args(Samples)),
            ("mode", mode, get_args(Mode)),
        ):
            if value not in valid:
                raise ValueError(unknown_name(name, value, valid))
        self._model = unwrap(model)
        self._layers = select_layers(self._model, layers)
        self._schedule = as_schedule(every)
        self._probe = detached(probe)
        self._forward = forward
        self._lag = lag
        self._reference = reference
        self._samples: Samples = samples
        self._max_samples = max_samples
        self._mode: Mode = mode
        self._autocast = autocast
        self._channel_dim = channel_dim
        self._seed = seed
        self._sinks: list[Sink] = [as_sink(sink) for sink in sinks]
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._pending: list[tuple[int, Points]] = []
        self._initial: tuple[int, Points] | None = None
        self._started = False
        self.steps = 0
        self.records: list[ShiftRecord] = []

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that are watched."""
        return tuple(self._layers)

    def __enter__(self) -> ShiftMonitor:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Take the distributions before the first step, where they are needed. ``with`` calls this."""
        if self._started:
            return
        self._started = True
        due = self._reference != "initial" and self._schedule(self.steps)
        if due or self._reference != "previous":
            points = self.look()
            if due:
                self._pending.append((self.steps, points))
            if self._reference != "previous":
                self._initial = (self.steps, points)

    def step(self) -> list[ShiftRecord]:
        """Tell the monitor that the optimizer has made a step; call it once after each ``optimizer.step()``.

        Returns:
            The records made at this step, one for each layer and reference; most often none.
        """
        if not self._started:
            raise RuntimeError("call start(), or use the monitor in a with statement, before the first optimizer step")
        self.steps += 1
        scheduled = self._schedule(self.steps)
        ready = [(taken, points) for taken, points in self._pending if taken + self._lag <= self.steps]
        against_initial = scheduled and self._initial is not None
        take = scheduled and self._reference != "initial"
        if not (ready or against_initial or take):
            return []
        now = self.look()
        made: list[ShiftRecord] = []
        for taken, points in ready:
            made += self._compare("previous", taken, points, now)
        if against_initial and self._initial is not None:
            made += self._compare("initial", *self._initial, now)
        self._pending = [entry for entry in self._pending if entry[0] + self._lag > self.steps]
        if take:
            self._pending.append((self.steps, now))
        self.records += made
        for sink in self._sinks:
            for record in made:
                sink.write(record)
        return made

    def look(self) -> Points:
        """The points of each layer's output for the probe, (n, d) on the CPU. Changes nothing in the model."""
        points: Points = {}

        def keep(name: str, module: nn.Module, _: tuple[Any, ...], output: Any) -> None:
            tensor = first_tensor(output)
            if tensor is None or tensor.ndim == 0:
                raise ValueError(
                    f"layer {name} ({type(module).__name__}) returns no floating-point tensor with axes to measure"
                )
            tensor = tensor.unsqueeze(-1) if tensor.ndim == 1 else tensor
            axis = channel_axis(module) if self._channel_dim is None else self._channel_dim
            total = count_points(tensor, axis, self._samples)
            if (name, total) not in self._rows:
                self._rows[name, total] = choose_rows(total, self._max_samples, name, self._seed)
            points[name] = take_points(tensor, axis, self._samples, self._rows[name, total])

        side_forward(
            self._model,
            self._probe,
            self._layers,
            keep,
            forward=self._forward,
            mode=self._mode,
            seed=self._seed,
            autocast=self._autocast,
        )
        if not points:
            raise RuntimeError(f"the forward on the probe called none of the layers {', '.join(self._layers)}")
        return {name: value.cpu() for name, value in points.items()}

    def summary(self) -> dict[str, dict[str, float]]:
        """Mean over the measurements so far of every number of the records, by layer."""
        table: dict[str, list[Mapping[str, Any]]] = {}
        for record in self.records:
            table.setdefault(record.layer, []).append(record.asdict())
        skip = {"step", "layer", "reference", "reference_step"}
        return {
            layer: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0] if key not in skip}
            for layer, rows in table.items()
        }

    def close(self) -> None:
        """Close the sinks. The records stay readable."""
        for sink in self._sinks:
            sink.close()

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on exactly: tensors, numbers and strings, nothing else."""
        return {
            "format": _FORMAT,
            "config": self._config(),
            "steps": self.steps,
            "started": self._started,
            "pending": [{"step": step, "points": dict(points)} for step, points in self._pending],
            "initial": None if self._initial is None else {"step": self._initial[0], "points": dict(self._initial[1])},
            "records": [record.asdict() for record in self.records],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`. File sinks drop the rows of steps that will be made again.

        Raises:
            ValueError: The state is of another format, or of a monitor with other arguments.
        """
        if state.get("format") != _FORMAT:
            raise ValueError(
                f"the state of the monitor has format {state.get('format')!r}, this version reads {_FORMAT}"
            )
        mine = self._config()
        differences = [
            f"{key}: {state['config'].get(key)!r} there, {value!r} here"
            for key, value in mine.items()
            if state["config"].get(key) != value
        ]
        if differences:
            raise ValueError(f"the state is of a monitor with other arguments ({'; '.join(differences)})")
        self.steps = int(state["steps"])
        self._started = bool(state["started"])
        self._pending = [
            (int(entry["step"]), {k: v.clone() for k, v in entry["points"].items()}) for entry in state["pending"]
        ]
        initial = state["initial"]
        self._initial = (
            None if initial is None else (int(initial["step"]), {k: v.clone() for k, v in initial["points"].items()})
        )
        self.records = [record_from_dict(values) for values in state["records"]]
        for sink in self._sinks:
            sink.rewind(self.steps)

    def _config(self) -> dict[str, Any]:
        return {
            "layers": list(self._layers),
            "lag": self._lag,
            "reference": self._reference,
            "samples": self._samples,
            "max_samples": self._max_samples,
            "mode": self._mode,
            "seed": self._seed,
        }

    def _compare(self, kind: str, taken: int, before: Points, after: Points) -> list[ShiftRecord]:
        made = []
        for layer, points in after.items():
            if layer in before:
                shift = measure_shift(before[layer], points)
                made.append(
                    ShiftRecord(**vars(shift), step=self.steps, reference_step=taken, reference=kind, layer=layer)
                )
        return made
