"""The side forward: call the model on the probe batch, look at the layers, take points of them, leave no trace.

What a model changes by being called is changed in copies, which are dropped. Nothing is written back into tensors of
the model: buffers are exchanged for copies and the very same tensors are put back, so that not even their version
counters move.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import warnings
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm
from flexnorm.probe.nested import call

Look = Callable[[str, nn.Module, tuple[Any, ...], Any], Any]
Mode = Literal["train", "eval"]
Samples = Literal["position", "image"]

_TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__)


@contextmanager
def hooked(
    modules: Iterable[nn.Module],
    before: Callable[..., Any] | None = None,
    after: Callable[..., Any] | None = None,
    *,
    with_kwargs: bool = False,
) -> Iterator[None]:
    """In the block functions are called with each call of some modules; afterwards the hooks are gone, come what may.

    Args:
        modules: The modules.
        before: ``before(module, inputs)``, or ``None``. What it returns but ``None`` takes the place of the inputs.
        after: ``after(module, inputs, output)``, or ``None``. What it returns but ``None`` takes that of the output.
        with_kwargs: Whether ``before`` also gets the keyword arguments: ``before(module, inputs, keywords)``.
    """
    with ExitStack() as hooks:
        for module in modules:
            if before is not None:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=with_kwargs))
            if after is not None:
                hooks.enter_context(module.register_forward_hook(after))
        yield


@contextmanager
def watched(layers: Mapping[str, nn.Module], look: Look) -> Iterator[None]:
    """In the block every call of some layers is shown, by its name, to a function.

    Args:
        layers: The layers, by name.
        look: Called as ``look(name, module, inputs, output)`` right after the layer; a further call of one layer has
            ``#2``, ``#3``, ... appended to its name. What it returns but ``None`` takes the place of the output.
    """
    calls: Counter[str] = Counter()
    names = {module: name for name, module in layers.items()}

    def seen(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        name = names[module]
        calls[name] += 1
        return look(name if calls[name] == 1 else f"{name}#{calls[name]}", module, inputs, output)

    with hooked(names, after=seen):
        yield


@contextmanager
def isolated(model: nn.Module, seed: int, *, autocast: torch.dtype | None = None) -> Iterator[None]:
    """Within the block the model may be called freely; afterwards it, and every random generator, is as before.

    Covered: buffers and other tensors that modules hold, plain attributes and containers of modules, training flags,
    hooks; the random state of Python, NumPy, and torch on the CPU and on the devices of the model; generators that
    modules hold; grad mode and the autocast cache. Compiled code is bypassed, and normalization layers do not
    synchronize with other processes. Not covered: a forward that writes into parameters, or into objects that are
    neither modules nor containers.

    Args:
        model: The unwrapped model.
        seed: Seed of the random numbers drawn inside, such as dropout masks.
        autocast: Run under autocast to this type; ``None`` for the autocast state of the caller.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        stack.enter_context(private_randomness(devices, seed))
        stack.enter_context(_private_attributes(model, seed))
        for kind in {device.type for device in devices} | {"cpu"}:
            if autocast is not None or torch.is_autocast_enabled(kind):
                # Casts made without gradients must not stay in the cache for the training forward to find.
                dtype = autocast or torch.get_autocast_dtype(kind)
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=False))
        if "torch._dynamo" in sys.modules:
            # Compiled functions and submodules skip hooks; and their guards shall not see this pass.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(warnings.catch_warnings())
        # Re-entrant checkpointing says so when there is no gradient to compute, which is the case here.
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad")
        yield


@contextmanager
def private_randomness(devices: set[torch.device], seed: int) -> Iterator[None]:
    """In the block every generator (CPU and ``devices``) starts from ``seed``; afterwards each goes on as before."""
    with ExitStack() as restore:
        restore.callback(random.setstate, random.getstate())
        random.seed(seed)
        if "numpy" in sys.modules:
            numpy_random = sys.modules["numpy"].random
            restore.callback(numpy_random.set_state, numpy_random.get_state())
            numpy_random.seed(seed % 2**32)
        # Not torch.manual_seed: that would seed, or queue a seed for, devices whose state is not saved here.
        restore.callback(torch.default_generator.set_state, torch.default_generator.get_state())
        torch.default_generator.manual_seed(seed)
        for device in devices:
            if device.type in ("cuda", "xpu"):
                module = torch.get_device_module(device)
                restore.callback(module.set_rng_state, module.get_rng_state(device), device)
                with torch.device(device), module.device(device):
                    module.manual_seed(seed)
        yield


@contextmanager
def _private_attributes(model: nn.Module, seed: int) -> Iterator[None]:
    modules = list(model.modules())
    saved = [(module, module.__dict__.copy()) for module in modules]
    copies: dict[int, Any] = {}
    try:
        for module, attributes in saved:
            own = module.__dict__
            buffers = attributes["_buffers"]
            own["_buffers"] = type(buffers)({k: _copied(v, copies, seed) for k, v in buffers.items()})
            own.update({k: _copied(v, copies, seed) for k, v in attributes.items() if k not in _TORCH_ATTRIBUTES})
            if own.get("_compiled_call_impl") is not None:
                own["_compiled_call_impl"] = None
            _stop_synchronizing(module)
        yield
    finally:
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)


def _stop_synchronizing(module: nn.Module) -> None:
    # One process alone may watch its model; waiting for the others would hang.
    if isinstance(module, nn.SyncBatchNorm):
        module.__dict__["forward"] = functools.partial(nn.modules.batchnorm._BatchNorm.forward, module)
    elif isinstance(module, FlexNorm) and module.process_group is not None:
        module.__dict__["process_group"] = None


def _copied(value: Any, copies: dict[int, Any], seed: int) -> Any:
    """A copy for what a forward may write into, shared where the original is shared; anything else as it is."""
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        copies[id(value)] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        copies[id(value)] = torch.Generator(value.device).manual_seed(seed)
    elif type(value) in (list, dict, set, deque, OrderedDict):
        copies[id(value)] = copy.copy(value)
    else:
        return value
    return copies[id(value)]


def side_forward(
    model: nn.Module,
    probe: Any,
    layers: Mapping[str, nn.Module],
    look: Look,
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    mode: Mode = "train",
    seed: int = 0,
    autocast: torch.dtype | None = None,
) -> None:
    """Call the model on the probe without gradient and show every call of the chosen layers to ``look``.

    Args:
        model: The unwrapped model.
        probe: What ``forward`` takes.
        layers: Layers to look at, by name.
        look: As for :func:`watched`.
        forward: How to call the model.
        mode: ``"train"``: as in training; layers that the model keeps in evaluation mode stay there. ``"eval"``: as in
            evaluation.
        seed: Seed of dropout and other noise, the same at each call, so that two calls differ by the model alone.
        autocast: Run under autocast to this type.
    """
    with isolated(model, seed, autocast=autocast), watched(layers, look):
        if mode == "eval":
            model.eval()
        elif not model.training:
            model.train()
        forward(model, probe)


def take_points(
    output: Tensor,
    axis: int,
    samples: Samples,
    *,
    limit: int | None = None,
    layer: str = "",
    seed: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Points of an output, copied: all of them or a fixed random subset.

    Args:
        output: (N, C, *spatial), or with the channels on another axis.
        axis: Axis of the channels.
        samples: ``"position"``: every position of every input is a point in R^C; ``"image"``: every input is one point.
        limit: At most so many points, drawn by a private generator: the same for the same layer, seed and number of
            points, hence before and after a step and in a resumed run. ``None`` for all.
        layer: Name of the layer.
        seed: Seed of the choice.
        mask: What counts, of the shape of ``output`` without the channels: only positions where it is not 0 are points;
            in an image they alone are not set to 0, and one without any is no point. ``None`` for everything.

    Returns:
        (k, d) in float32 or float64, on the device of the output, independent of its memory.
    """
    total = output.shape[0] if samples == "image" else output.numel() // max(output.shape[axis], 1)
    if mask is not None:
        counts = mask.to(output.device) > 0
        present = (counts.flatten(1).any(1) if samples == "image" else counts.flatten()).nonzero().squeeze(1)
        rows = present[chosen_rows(len(present), limit or total, layer, seed).to(output.device)]
        output = output.masked_fill(~counts.unsqueeze(axis), 0) if samples == "image" else output
    else:
        rows = chosen_rows(total, limit or total, layer, seed).to(output.device)
    if samples == "image":
        points = output.reshape(output.shape[0], -1)[rows]
    else:
        moved = output.movedim(axis, -1)
        # Indexing the axes gathers k points; flattening first would copy the whole output.
        points = moved[torch.unravel_index(rows, moved.shape[:-1])]
    return points.detach().to(torch.promote_types(points.dtype, torch.float32))


@functools.lru_cache(maxsize=4096)
def chosen_rows(total: int, limit: int, layer: str, seed: int) -> Tensor:
    """Which of so many points to keep, in ascending order."""
    if total <= limit:
        return torch.arange(total)
    generator = torch.Generator().manual_seed(seed ^ zlib.crc32(layer.encode()))
    return torch.randperm(total, generator=generator)[:limit].sort().values
