"""A forward pass that leaves no trace: what a model changes by being called is changed in copies, which are dropped.

Nothing is written back into tensors of the model. Buffers are exchanged for copies and the very same tensors are put
back, so that not even their version counters move.
"""

from __future__ import annotations

import copy
import functools
import random
import sys
import warnings
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flexnorm.engine import FlexNorm


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
            stack.enter_context(_uncached_autocast(kind, autocast))
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


_TORCH_ATTRIBUTES = frozenset(nn.Module().__dict__)


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


@contextmanager
def _uncached_autocast(kind: str, dtype: torch.dtype | None) -> Iterator[None]:
    enabled = torch.is_autocast_enabled(kind) if dtype is None else True
    # Casts made without gradients must not stay in the cache for the training forward to find.
    dtype = dtype or torch.get_autocast_dtype(kind)
    with torch.autocast(kind, dtype=dtype, cache_enabled=False) if enabled else nullcontext():
        yield
