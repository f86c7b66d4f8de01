"""Tensors whose values are read when an operation needs them: a model larger than memory runs as any other.

A deferred tensor knows shape and dtype, and its cell. It is a torch.Tensor with a `__torch_function__` of
its own (torch's notes, "Extending PyTorch"): transformers' and PEFT's own code runs on it, and what an
operation is given in the end are plain tensors, so that it gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.ground.unread import Applied, Cell, Stream, Unread, replaced

if TYPE_CHECKING:
    from torch import Tensor

_SHAPE = {"shape", "ndim", "size", "dim", "ndimension", "numel", "nelement", "stride", "nbytes", "__len__"}
_FACTS = {  # methods that ask for no values
    *("element_size", "storage_offset", "is_floating_point", "is_complex", "is_contiguous", "is_signed"),
    *(
        "is_inference",
        "is_shared",
        "get_device",
        "requires_grad_",
        "retain_grad",
        "register_hook",
        "__hash__",
    ),
}
_VALUES = {"data", "T", "mT", "H", "mH", "real", "imag"}  # attributes that do
_SAME = {"detach", "detach_", "contiguous", "cpu"}
_MOVES = {"to", "float", "cuda", "type"}
_WRITES = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"}


def tensors(stream: Stream, weights: Mapping[str, Unread]) -> dict[str, Any]:
    """Deferred tensors of these weights: the state dict of a model that is to be loaded."""
    import torch

    cpu = torch.device("cpu")
    cells = {n: Cell(stream, w, w.shape, getattr(torch, w.dtype), cpu) for n, w in weights.items()}
    return {name: _deferred(cell) for name, cell in cells.items()}


def cell_of(tensor: Any) -> Cell | None:
    """The cell of a deferred tensor; None for any other."""
    cell = getattr(tensor, "cell", None)
    return cell if isinstance(cell, Cell) else None


def _deferred(cell: Cell) -> Any:
    return _class()(cell)


@cache
def _class() -> Any:
    import torch

    class Deferred(torch.Tensor):  # type: ignore[misc]
        """A tensor that is read when it is used."""

        cell: Cell

        @staticmethod
        def __new__(cls: Any, cell: Cell) -> Any:
            made = torch.Tensor._make_wrapper_subclass(cls, cell.shape, dtype=cell.dtype)
            made.cell = cell
            return made

        def __repr__(self, **_: Any) -> str:
            return f"Deferred({list(self.cell.shape)}, {self.cell.dtype})"

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return _call(func, args, kwargs or {})

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return _on_values(func, args, kwargs or {})  # what reached torch on another way

    return Deferred


def _with_cells(value: Any) -> Any:
    """The same nest with cells for its deferred tensors."""
    if cell := cell_of(value):
        return cell
    if isinstance(value, list | tuple):
        return type(value)([_with_cells(v) for v in value])
    if isinstance(value, dict):
        return {k: _with_cells(v) for k, v in value.items()}
    return value


def _on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    args, kwargs = replaced(_with_cells((args, kwargs)), lambda cell: cell.stream.values(cell))
    return func(*args, **kwargs)


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """What a function of torch gives where deferred tensors are among its arguments."""
    import torch

    if func.__name__ == "_has_compatible_shallow_copy_type":  # asked by Module.to, which then sets `.data`
        return True
    if (cell := cell_of(args[0]) if args else None) is not None:
        done, result = _of_itself(cell, func, args, kwargs)
        if done:
            return result
    if func is torch.nn.functional.embedding and (found := _looked_up(args, kwargs)) is not None:
        return found
    if (found := _later(func, args, kwargs)) is not None:
        return found
    return _on_values(func, args, kwargs)


def _of_itself(cell: Cell, func: Any, args: Any, kwargs: Any) -> tuple[bool, Any]:
    """(True, result) of what is asked of a tensor alone, or done to it, and needs no values."""
    import torch

    name, attribute = func.__name__, ""
    if name in ("__get__", "__set__"):
        attribute = func.__self__.__name__
    if attribute == "device" and name == "__get__":
        return True, cell.device
    if (attribute or name) in _SHAPE and cell.resident is not None:
        return True, func(cell.resident, *args[1:], **kwargs)
    if (attribute or name) in _FACTS | _SHAPE or (attribute and attribute not in _VALUES):
        with torch._C.DisableTorchFunctionSubclass():
            return True, func(*args, **kwargs)
    if name == "__set__" or name in ("copy_", "set_"):
        return True, _overwritten(cell, args[0], args[1], keeps_shape=name == "copy_")
    same = name in _SAME or attribute == "data" or (name == "__getitem__" and args[1] is Ellipsis)
    if same or (name in _MOVES and _is_moved(cell, func, args, kwargs)):
        return True, _deferred(cell)
    if name == "__deepcopy__":
        twin = Cell(cell.stream, cell.made, cell.shape, cell.dtype, cell.device, cell.resident)
        if isinstance(args[0], torch.nn.Parameter):
            return True, torch.nn.Parameter(_deferred(twin), args[0].requires_grad)
        return True, _deferred(twin)
    if name in _WRITES or (name.endswith("_") and not name.endswith("__")):
        cell.resident = cell.stream.values(cell).clone()
        _on_values(func, args, kwargs)
        return True, args[0]
    return False, None


def _is_moved(cell: Cell, func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this changes at most the device; then the cell's is changed."""
    import torch

    told = func(torch.empty((), dtype=cell.dtype, device=cell.device), *args[1:], **kwargs)
    if not isinstance(told, torch.Tensor) or told.dtype != cell.dtype:
        return False
    cell.device = told.device
    return True


def _overwritten(cell: Cell, tensor: Any, source: Any, keeps_shape: bool) -> Any:
    """copy_, set_ and `.data =`: the values are those given, from now on."""
    if (other := cell_of(source)) is not cell:
        values = other.stream.values(other) if other else source
        values = values.detach().to(dtype=cell.dtype, device=cell.device).clone()
        cell.resident = values.expand(cell.shape) if keeps_shape else values
        cell.shape = tuple(cell.resident.shape)
    return tensor


def _later(func: Any, args: Any, kwargs: Any) -> Any:
    """While a model is loaded, deferred results; None where shapes need values."""
    import torch

    nest = _with_cells((args, kwargs))
    found: list[Cell] = []
    replaced(nest, found.append)
    if not found[0].stream.deferring:
        return None
    try:
        some_args, some_kwargs = replaced(nest, lambda c: torch.empty(c.shape, dtype=c.dtype, device="meta"))
        result = func(*some_args, **some_kwargs)
    except Exception:  # whatever torch raises on its meta device
        return None

    def one(made: Tensor, index: int | None) -> Any:
        applied = Applied(func, nest[0], nest[1], index)
        return _deferred(Cell(found[0].stream, applied, tuple(made.shape), made.dtype, found[0].device))

    if isinstance(result, torch.Tensor):
        return one(result, None)
    if isinstance(result, tuple | list) and result and all(isinstance(r, torch.Tensor) for r in result):
        return type(result)([one(r, n) for n, r in enumerate(result)])
    return None


def _looked_up(args: Any, kwargs: Any) -> Any:
    """Embeddings of tokens from their rows alone; None where the weight is not just a matrix of a file."""
    import torch

    told = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    cell = cell_of(told.get("weight"))
    if cell is None or cell.resident is not None or cell in cell.stream.held or len(cell.shape) != 2:
        return None
    if not isinstance(cell.made, Unread) or told.get("max_norm") or len(args) > 2 or cell_of(told["input"]):
        return None
    tokens, places = told["input"].cpu().unique(return_inverse=True)
    rows = cell.made.rows(tokens.tolist()).to(cell.device)
    return torch.nn.functional.embedding(places.to(cell.device), rows)
