"""A device that isn't there: tensors which say that they lie on it, whose numbers are in main memory.

What a GPU would refuse is refused here, on a machine without one: operands on two devices, NumPy views of device memory. Importing
this registers the device with torch for the rest of the process (``on_device.py`` is a process of its own for that reason).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from moralguard_kernels import library

NAME = "pretend"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)

_library = torch.library.Library("aten", "IMPL")  # what C++ calls without asking Python: an index given as a list

_MOVES = {"aten::_to_copy", "aten::to", "aten::copy_", "aten::type_as"}
_WAITS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::unique_dim", "aten::_unique2"}
_INDEXES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}

_capturing = False
WAITED: list[str] = []
"""Names of what had to wait for the device so far, as an answer is read in main memory, or copied to or from it."""


class PretendTensor(torch.Tensor):
    """Numbers of a CPU tensor under another device's name."""

    is_cuda = property(lambda self: True)  # so that what asks for a GPU takes its path

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> PretendTensor:
        layout = {"strides": numbers.stride(), "storage_offset": numbers.storage_offset(), "dtype": numbers.dtype}
        with torch.inference_mode(False):  # an inference tensor can't be wrapped again
            return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, **layout, device=DEVICE)

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    def __repr__(self, **_: Any) -> str:
        return f"PretendTensor({self.numbers!r})"

    def tolist(self) -> Any:
        WAITED.append("tolist")
        return self.numbers.tolist()

    def untyped_storage(self) -> Any:
        return self.numbers.untyped_storage()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"a tensor on {DEVICE} has no NumPy view; copy it to the CPU first")

    __array__ = numpy

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Also ops without a tensor on the device: factories."""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(op, args, kwargs or {})


def _run(op: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if op.namespace == "moralguard" and not _capturing:  # as on a device that has no kernels: the reference on its tensors
        before = len(WAITED)
        with _Everywhere():
            found = library._REFERENCES[op._schema.name.partition("::")[2]](*args, **kwargs)
        del WAITED[before:]  # the kernels that stand here on a GPU launch and go on
        return found
    name, leaves = op._schema.name, tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    asked = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
    if name not in _MOVES:
        _check(name, tensors)
    if _capturing and _waits(name, tensors, asked):
        raise RuntimeError(f"{name} waits for the device, which a captured graph can't")
    there = asked.type == NAME if asked is not None else any(isinstance(t, PretendTensor) for t in tensors)
    if _waits(name, tensors, asked):
        WAITED.append(name)
    if name == "aten::_local_scalar_dense":
        there = False
    found = op(*tree_map(_numbers, args), **tree_map(_numbers, kwargs))
    known = {id(t.numbers): t for t in tensors if isinstance(t, PretendTensor)}  # what an op in place gives back

    def placed(value: Any) -> Any:
        if not there or not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value)

    return tree_map(placed, found)


def _waits(name: str, tensors: list[torch.Tensor], asked: torch.device | None) -> bool:
    """Whether CUDA would wait for what runs on the device, or for a copy."""
    places = {isinstance(t, PretendTensor) for t in tensors} | ({asked.type == NAME} if asked is not None and tensors else set())
    return True in places and (name in _WAITS or (name in _MOVES and len(places) > 1))


@contextmanager
def capturing() -> Iterator[None]:
    """Inside, what can't be captured in a CUDA graph is refused: waiting for the device, copies from and to main memory."""
    global _capturing
    _capturing = True
    try:
        yield
    finally:
        _capturing = False


@torch.library.impl(_library, "empty_strided", "PrivateUse1")
def _empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> torch.Tensor:
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype))


@torch.library.impl(_library, "_copy_from", "PrivateUse1")
def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _numbers(target).copy_(_numbers(source))
    return target


def _numbers(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.numbers if isinstance(leaf, PretendTensor) else leaf


def _check(name: str, tensors: list[torch.Tensor]) -> None:
    """Raise where CUDA would: beside device tensors only numbers without dimensions, and indexes, may lie on the CPU."""
    there = [isinstance(t, PretendTensor) for t in tensors]
    if not any(there) or all(there):
        return
    for i, (tensor, here) in enumerate(zip(tensors, there, strict=True)):
        if not here and tensor.ndim and not (name in _INDEXES and i and not tensor.is_floating_point()):
            places = [(tuple(t.shape), NAME if own else "cpu") for t, own in zip(tensors, there, strict=True)]
            raise RuntimeError(f"{name}: operands on two devices: {places}")


def moved(module: torch.nn.Module) -> torch.nn.Module:
    """The module itself, its parameters and buffers on the device."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value.data, PretendTensor):
                part._parameters[name] = torch.nn.Parameter(PretendTensor(value.detach()), requires_grad=value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, PretendTensor):
                part._buffers[name] = PretendTensor(value)
    return module


@contextmanager
def pretended() -> Iterator[None]:
    """Inside, torch takes the device like any other."""
    tensor, to = torch.tensor, torch.nn.Module.to

    def on_it(device: Any) -> bool:
        return device is not None and torch.device(device).type == NAME

    def new(data: Any, *, device: Any = None, **more: Any) -> torch.Tensor:
        if _capturing and on_it(device):
            raise RuntimeError("torch.tensor copies from main memory, which a captured graph can't")
        return PretendTensor(tensor(data, **more)) if on_it(device) else tensor(data, device=device, **more)

    def adopted(data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        if isinstance(data, torch.Tensor):
            return data.to(device=device or data.device, dtype=dtype or data.dtype)
        return new(data, dtype=dtype, device=device)

    def alike(self: torch.Tensor, data: Any, dtype: Any = None, device: Any = None) -> torch.Tensor:
        return new(data, dtype=dtype or self.dtype, device=device or self.device)

    def sent(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        where = args[0] if args else kwargs.get("device")
        return moved(self) if isinstance(where, str | torch.device) and on_it(where) else to(self, *args, **kwargs)

    with (
        mock.patch.object(torch, "tensor", new),
        mock.patch.object(torch, "as_tensor", adopted),
        mock.patch.object(torch.Tensor, "new_tensor", alike),
        mock.patch.object(torch.nn.Module, "to", sent),
        _Everywhere(),
    ):
        yield
