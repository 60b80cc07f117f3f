"""One run of a function on the CPU, kept as its C calls and torch ops, and made again without the Python around them.

As with a CUDA graph everything that the run allocated stays where it is, so that its calls can be repeated as they are.
"""

import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .library import TYPES, again, function, recorded

# What allocates without writing: the calls that write come after.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# What the library has too, with the same bits: between products a call of torch takes longer than what it computes.
OURS = {torch.ops.aten.add.Tensor: "add", torch.ops.aten.relu.default: "relu"}
# What `tolist` and `numpy` call before they read.
READINGS = ("resolve_conj", "resolve_neg")
# The library's functions are the process's: one recording at a time.
_LOCK = threading.Lock()


class Recording:
    """`function(*inputs)` run once, in inference mode; called, it runs again on other inputs of the same shapes.

    A call gives the same `outputs` tensors as the run did, overwritten. What the function reads besides its inputs
    (weights, pools) is read and written where it was. `why_not`: what cannot be repeated, a shape or a branch that
    depends on data; None if everything can. The run itself was right all the same.
    """

    @torch.inference_mode()
    def __init__(self, function: Callable[..., Any], *inputs: Tensor):
        self._inputs = tuple(x.clone() for x in inputs)
        tape = _Tape()
        with _LOCK, recorded(tape.note, tape.kept), tape:
            self.outputs = function(*self._inputs)
        self.why_not, self._kept = tape.why_not, tape.kept
        self._parts = list(_parts(tape.calls)) if tape.why_not is None else []

    @torch.inference_mode()
    def __call__(self, *inputs: Tensor) -> Any:
        """The function's outputs for `inputs`; only where `why_not` is None."""
        for own, x in zip(self._inputs, inputs, strict=True):
            own.copy_(x)
        for _, part in self._parts:
            part()
        return self.outputs

    @torch.inference_mode()
    def seconds_outside(self) -> float:
        """What one more run takes besides the C functions: ops of torch and the calls themselves."""
        inside, begin = 0.0, time.perf_counter()
        for native, part in self._parts:
            start = time.perf_counter()
            part()
            inside += time.perf_counter() - start if native else 0.0
        return time.perf_counter() - begin - inside


Call = tuple[Callable[..., Any], tuple[Any, ...]]


def _parts(calls: list[Call]) -> Iterator[tuple[int, Callable[[], Any]]]:
    """The calls, those of the library that follow one another in one, and how many of the library's each is."""
    for native, group in groupby(calls, key=lambda call: hasattr(call[0], "argtypes")):
        if native:
            ours = list(group)
            yield len(ours), again(ours)
        else:
            yield from ((0, partial(called, *args)) for called, args in group)


class _Tape(TorchDispatchMode):
    """Notes every call that writes to memory."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.kept: list[Tensor] = []
        self.why_not: str | None = None

    def note(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """A call to be made again."""
        self.calls.append((function, args))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not torch.is_inference_mode_enabled():  # a constant that is kept for later calls, as a recording keeps it
            return result
        given, results = _tensors(args), _tensors(result)
        if func._schema.is_mutable:
            self.note(partial(func, **kwargs), args)
        elif _depends_on_data(func, given, results):
            self.why_not = self.why_not or f"{func} depends on data"
        elif func.overloadpacket.__name__ not in ALLOCATIONS and not _views(results, given):
            self.kept += [*given, *results]
            self.note(*_again(func, args, kwargs, results))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _views(results: list[Tensor], given: list[Tensor]) -> bool:
    """Whether nothing was written: `reshape`, `contiguous` and `to` are views or copies, as it happens."""
    memory = [{x.untyped_storage().data_ptr() for x in tensors} for tensors in (results, given)]
    return memory[0] <= memory[1]


def _again(func: Any, args: Any, kwargs: Any, results: list[Tensor]) -> Call:
    """A call that runs an op and leaves what it gives in the tensors that it gave the first time."""
    if func in OURS and not kwargs and _alike([*args, *results]):
        addresses = [x.data_ptr() for x in (*args, *results)]
        return function(OURS[func]), (*addresses[:-1], TYPES[results[0].dtype], results[0].numel(), addresses[-1])
    into = getattr(func.overloadpacket, "out", None)
    if into is not None and _names(into) == [*_names(func), "out"]:
        return partial(into, **kwargs, out=results[0]), args
    return partial(_run_and_copy, partial(func, *args, **kwargs)), (results,)


def _alike(operands: list[Any]) -> bool:
    """Whether all are tensors that the library can read as rows of the same length and type."""
    return all(isinstance(x, Tensor) and x.is_contiguous() and x.device.type == "cpu" for x in operands) and (
        len({(x.shape, x.dtype) for x in operands}) == 1 and operands[0].dtype in (torch.float32, torch.bfloat16)
    )


def _names(overload: Any) -> list[str]:
    return [argument.name for argument in overload._schema.arguments]


def _run_and_copy(run: Callable[[], Any], results: list[Tensor]) -> None:
    for own, new in zip(results, _tensors(run()), strict=True):
        own.copy_(new)


def _depends_on_data(func: Any, given: list[Tensor], results: list[Tensor]) -> bool:
    """Whether a shape, or what Python sees, comes from what is in the tensors."""
    if func.overloadpacket is torch.ops.aten.index:
        return any(x.dtype in (torch.bool, torch.uint8) for x in given[1:])
    read = func.overloadpacket.__name__ in READINGS or (given and not results)
    return bool(read or torch.Tag.dynamic_output_shape in func.tags)
