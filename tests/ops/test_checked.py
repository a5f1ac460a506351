"""Operators called as ``torch.ops.d2net`` with arbitrary arguments: an error or a defined result, never a crash."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from d2net import ops
from d2net.errors import InputError
from d2net.ops import _library, _native

# Not importable by name under --import-mode=importlib.
_spec = importlib.util.spec_from_file_location("every", Path(__file__).parents[1] / "test_every_operator.py")
every = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(every)

Arguments = list[Any]
ERRORS = (InputError, RuntimeError, TypeError)  # from d2net; from torch's dispatcher or allocator; from its schemas
WAIT = ("nms_1d", "batched_nms_1d", "soft_nms_1d", "extract_proposals")  # the size of their results depends on values


class Recorder(TorchDispatchMode):
    """Records the arguments of the first call of each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, Arguments] = {}
        self.packed = False  # calls then get a name of their own

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "d2net":
            name = function._schema.name.removeprefix("d2net::") + " packed" * self.packed
            self.calls.setdefault(name, [x.detach().clone() if isinstance(x, Tensor) else x for x in args])
        return function(*args, **(kwargs or {}))


def recorded() -> dict[str, Arguments]:
    """The arguments of a valid call of every registered operator, backwards included."""
    with Recorder() as recorder:
        # In reverse, as the backward of "attention_pool by mean", which comes first then, has more tensors.
        for name, case in sorted(every.CASES.items(), reverse=True):
            recorder.packed = name.endswith(" packed")
            every.results(case, torch.device("cpu"))
            assert name.split()[0] + " packed" * recorder.packed in recorder.calls
    return recorder.calls


CALLS = recorded()


@pytest.fixture(params=["cpu", "simt"])
def kernels(request) -> str:
    """The CPU kernels, or the CUDA kernels run on CPU tensors."""
    if request.param == "simt":
        request.getfixturevalue("simt_kernels")
    return request.param


def test_every_registered_operator_is_called():
    assert {name.split()[0] for name in CALLS} == set(_library._DEVICES)
    packed = {name.split()[0] for name in CALLS if name.endswith(" packed")}
    assert packed >= {name for name in _library._DEVICES if "offsets" in argument_names(name)}


def operator(name: str) -> Callable[..., Any]:
    return getattr(torch.ops.d2net, name.split()[0])


def copied(arguments: Arguments) -> Arguments:
    return [x.clone() if isinstance(x, Tensor) else x for x in arguments]


def call(name: str, arguments: Arguments) -> list[Tensor]:
    """The results; of an operator that returns nothing, the argument that it changes in place."""
    arguments = copied(arguments)
    out = operator(name)(*arguments)
    return arguments[:1] if out is None else [out] if isinstance(out, Tensor) else list(out)


def wrong_tensors(x: Tensor, alone: bool) -> Iterator[Any]:
    """Wrong values for a tensor argument ``x``; ``alone``: it is the only tensor argument."""
    yield from ([[0.5]], 0.5, "x", x[None], x.cfloat())
    if not alone:
        yield x.to("meta")
    if x.ndim:
        yield from (x[0], x.to_sparse())
    if x.is_floating_point():
        yield from (x.long(), x > 0.5, x.to(torch.float8_e4m3fn))
        yield torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8)
    else:
        yield x.double()


def unequal_sizes(x: Tensor) -> Iterator[Tensor]:
    """Tensors like ``x`` with one size changed: wrong, unless the operator allows any size there."""
    for dim in range(x.ndim):
        yield torch.cat((x, x), dim)
        for size in {0, 1, max(x.shape[dim] - 1, 0)} - {x.shape[dim]}:
            yield x.narrow(dim, 0, size)


def other_types(x: Tensor) -> Iterator[Tensor]:
    types = (torch.float64, torch.float32, torch.float16, torch.int32) if x.is_floating_point() else (torch.int32,)
    yield from (x.to(dtype) for dtype in types if dtype != x.dtype)


def other_numbers(x: object) -> Iterator[Any]:
    """Replacements for a number or a list of numbers, possibly out of range."""
    if isinstance(x, list):
        yield from ([], [*x, *x], x[:1], [None], ["x"], [math.nan] * len(x), [math.inf] * len(x), x * 200)
    elif isinstance(x, (bool, int, float)):
        yield from ("x", None, [], 0, 1, -1, 2**31, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**64)
        yield from (math.nan, math.inf, -math.inf, 0.5, -0.5, 1e308, 1e-320)


def replaced(arguments: Arguments, at: int, x: Any) -> Arguments:
    return [*arguments[:at], x, *arguments[at + 1 :]]


def outcome(name: str, arguments: Arguments) -> list[tuple[torch.Size, torch.dtype]] | None:
    """Shapes and dtypes of the results; None for an error."""
    try:
        return [(x.shape, x.dtype) for x in call(name, arguments)]
    except ERRORS:
        return None


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")  # deprecated, but users may have such tensors
@pytest.mark.parametrize("name", CALLS)
def test_what_is_no_such_tensor_is_refused(name, kernels):
    right = call(name, CALLS[name])
    alone = sum(isinstance(x, Tensor) for x in CALLS[name]) == 1
    for at, x in enumerate(CALLS[name]):
        for wrong in wrong_tensors(x, alone) if isinstance(x, Tensor) else ():
            with pytest.raises(ERRORS) as error:
                call(name, replaced(CALLS[name], at, wrong))
            assert not isinstance(error.value, InputError) or "\n" not in str(error.value)
    for x, y in zip(call(name, CALLS[name]), right, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("name", CALLS)
def test_other_sizes_types_and_numbers_are_refused_or_do_what_the_fake_kernel_says(name, kernels):
    """Real and meta tensors are treated alike: both raise, or both give results of the same shapes and dtypes."""
    right = call(name, CALLS[name])
    refused = 0
    for at, x in enumerate(CALLS[name]):
        others = [*unequal_sizes(x), *other_types(x), None] if isinstance(x, Tensor) else other_numbers(x)
        for other in others:
            arguments = replaced(CALLS[name], at, other)
            found = outcome(name, arguments)
            refused += found is None
            if name not in WAIT:
                fake = [x.to("meta") if isinstance(x, Tensor) else x for x in arguments]
                assert found == outcome(name, fake), (at, other)
    assert refused > 3
    for x, y in zip(call(name, CALLS[name]), right, strict=True):
        assert torch.equal(x, y)


def test_arguments_may_lie_anywhere(kernels):
    """Every tensor argument, also those of backwards, which are always contiguous in a training."""
    for name, arguments in CALLS.items():
        expected = call(name, arguments)
        for place in (every.strided, every.misaligned, negated):
            placed = [placed_by(place, x) for x in arguments]
            out = operator(name)(*placed)
            found = expected if out is None else [out] if isinstance(out, Tensor) else out
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def placed_by(place: Callable[[Tensor], Tensor], x: Any) -> Any:
    if isinstance(x, list):
        return [placed_by(place, y) for y in x]
    return place(x) if isinstance(x, Tensor) else x


def negated(x: Tensor) -> Tensor:
    """The same values as a lazily negated tensor (with the neg bit)."""
    return torch._neg_view(-x) if x.is_floating_point() else x


ODD = (-1, 0, 1, 2, 4, 5, 50, 2**31 - 1, -(2**31), 2**62, -(2**62))

# Values out of range, by the argument that is an index or a length.
MEANING = {
    "lengths": lambda x: x.clamp(0, every.T),
    "offsets": lambda x: x.clamp(0, every.ROWS),
    "counted": lambda x: (x > 0).long(),
    "partner": lambda x: torch.where((x >= 0) & (x < every.B), x, -1),
    "source": lambda x: torch.where((x >= 0) & (x < every.B), x, -1),
    "argmax": lambda x: torch.where((x >= 0) & (x < every.C), x, -1),
    "last": lambda x: x.clamp(-1, every.T - 1),
    "groups": lambda x: x.unique(return_inverse=True)[1],
}


def argument_names(name: str) -> list[str]:
    return [x.name for x in operator(name).default._schema.arguments]


@pytest.mark.parametrize("name", [name for name in CALLS if set(argument_names(name)) & set(MEANING)])
def test_indices_may_be_any_number(name, kernels):
    """Indices and lengths out of range: nothing outside the tensors is read or written."""
    generator = torch.Generator().manual_seed(0)
    for at, what in enumerate(argument_names(name)):
        if what not in MEANING:
            continue
        like = CALLS[name][at]
        if like is None and what == "offsets":
            continue
        shape, dtype = ((every.B,), torch.int64) if like is None or what == "counted" else (like.shape, like.dtype)
        numbers = torch.tensor([x for x in ODD if dtype == torch.int64 or abs(x) <= 2**31 - (x > 0)])
        for _ in range(20):
            odd = numbers[torch.randint(len(numbers), shape, generator=generator)].to(dtype)
            if what == "offsets":  # those that fall only must not crash: recordings share rows then
                call(name, replaced(CALLS[name], at, odd))
                odd = odd.sort().values
            if name == "extract_proposals":  # it raises for a length past the end
                if odd.min() < 0 or odd.max() > every.T:
                    with pytest.raises(InputError, match="lengths must lie in 0 to T"):
                        call(name, replaced(CALLS[name], at, odd))
                continue
            found = call(name, replaced(CALLS[name], at, odd))
            expected = call(name, replaced(CALLS[name], at, MEANING[what](odd).to(dtype)))
            for x, y in zip(found, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_without_memory_nothing_is_read():
    x = torch.ones(2, 8, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="topk_pool_float32 expects contiguous tensors in memory of the CPU"):
        torch.ops.d2net.topk_pool(x, None, 8, None, 0)


@pytest.mark.parametrize(
    ("a", "what"), [(torch.ones(2, 3).T, r"with strides \(1, 3\)"), (torch.ones(3, 2, device="meta"), "on meta")]
)
def test_memory_that_lies_elsewhere_is_not_read(a, what):
    b, out = torch.ones(4, 2), torch.empty(3, 4)
    with pytest.raises(RuntimeError, match=f"iou_1d_float32 expects contiguous .* {what}"):
        _native.cpu("iou_1d", torch.float32, (a, 3, b, 4, out))


@pytest.mark.parametrize("members", [(), (torch.ones(3, 2), 3), (None,) * 6, [None] * 5, None])
def test_a_tuple_that_is_not_the_struct_is_refused(members):
    with pytest.raises(ValueError, match="iou_1d_float32 expects a tuple of 5"):
        _native.cpu("iou_1d", torch.float32, members)


def test_a_number_that_no_member_holds_is_refused():
    with pytest.raises(OverflowError):
        _native.cpu("iou_1d", torch.float32, (None, 2**64, None, 0, None))
    with pytest.raises(TypeError, match="real number"):
        _native.cpu("log_condition_number", torch.float32, (None,) * 11)


@pytest.mark.parametrize("name", CALLS)
def test_calls_without_values_are_checked_too(name):
    """Fake tensors, as torch.compile passes them to the fake kernel."""
    with FakeTensorMode() as mode:
        arguments = [placed_by(mode.from_tensor, x) for x in CALLS[name]]
    at = next(i for i, x in enumerate(arguments) if isinstance(x, Tensor) or isinstance(x, list) and x[-1] is not None)
    first = arguments[at]
    wrong = replaced(arguments, at, first[None] if isinstance(first, Tensor) else [*first[:-1], first[-1][None]])
    with mode, pytest.raises(InputError, match=name.split()[0]):
        operator(name)(*wrong)


def test_memory_that_was_freed_is_not_read():
    x = torch.rand(2, 5, 3)
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        ops.extract_proposals(x, torch.ones(2, 3, dtype=torch.bool), thresholds=[0.5])


def test_a_gradient_that_nobody_wants():
    x, attention, grad = torch.rand(2, 3, 4), torch.rand(2, 3), torch.rand(2, 4)
    wanted = (False, False)
    found = torch.ops.d2net.attention_pool_backward(
        x, attention, None, None, None, grad, grad, 0.5, 0.5, False, *wanted, None, 0
    )
    assert [len(y) for y in found] == [0, 0]
