"""Calls that are noted down and repeated: against a stand-in for Triton's own call, on the CPU."""

from __future__ import annotations

import functools
import gc
import types
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from fastmamba.kernels import _launch, _prepared, _sync  # noqa: E402
from fastmamba.kernels._launch import Launcher  # noqa: E402
from fastmamba.kernels._prepared import prepare  # noqa: E402
from fastmamba.ops._repeats import Repeats  # noqa: E402
from tests.kernels.test_launch import CudaLauncher, FakeKernel, setting  # noqa: E402, F401


@pytest.fixture
def gpu(setting: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:  # noqa: F811
    """CPU tensors that say they are on GPU 0."""
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(
        _prepared, "_empty", lambda *form: torch.empty_strided(form[0], form[1], dtype=form[2]).fill_(7)
    )
    return setting


class Op:
    """y = second(first(a part of x, w)) and an empty tensor; its two launches go nowhere."""

    def __init__(self) -> None:
        self.kernels = FakeKernel(), FakeKernel()
        self.launchers = [Launcher(kernel) for kernel in self.kernels]
        self.calls = 0

    def __call__(self, x: Tensor, w: Tensor | None, extra: Any = None) -> tuple[Tensor, Tensor]:
        self.calls += 1
        _, right = x.split_with_sizes((8, x.shape[1] - 8), 1)
        middle = x.new_empty(right.shape)
        if extra is not None:
            right = extra(right)
        self.launchers[0]((3, 1, 1), (right, w, middle), (x.shape[0], 0.5), (64,), num_warps=2)
        y = x.new_empty(right.shape, dtype=torch.float64)
        self.launchers[1]((5, 2, 1), (middle.view(-1), y), (), (True,))
        return y.view(x.shape[0], -1, 1), x.new_empty(0)

    @property
    def last(self) -> list[tuple[Any, ...]]:
        """Grid and stream, and the arguments, of each kernel's last direct launch."""
        found = [kernel.direct[-1] for kernel in self.kernels]
        return [(*call[:4], *call[9:]) for call in found]


def made(rows: int = 4) -> Tensor:
    return torch.zeros(rows, 24)


def test_a_call_is_repeated_at_other_addresses(gpu: types.SimpleNamespace) -> None:
    op = Op()
    op(made(), made())
    x, w = made(), made()
    (y, nothing), again = prepare(lambda: op(x, w), (x, w))
    assert again is not None and op.calls == 2 and y.shape == (4, 16, 1)
    x, w = made(), made()
    y, nothing = again((x, w))
    assert op.calls == 2 and nothing.numel() == 0
    assert y.shape == (4, 16, 1) and y.dtype == torch.float64 and y.is_contiguous()
    first, second = op.last
    assert first[:4] == (3, 1, 1, "stream 0") and second[:4] == (5, 2, 1, "stream 0")
    assert first[4:6] == (x.data_ptr() + 32, w.data_ptr()) and first[7:] == (4, 0.5, 64)
    assert second[4:] == (first[6], y.data_ptr(), True)


def test_nothing_of_the_noted_call_is_kept(gpu: types.SimpleNamespace) -> None:
    op = Op()
    op(made(), made())
    x, w = made(), made()
    result, again = prepare(functools.partial(op, x, w), (x, w))
    watched = [ref(tensor) for tensor in (x, w, result[0])]
    del x, w, result
    gc.collect()
    assert again is not None and [tensor() for tensor in watched] == [None] * 3


@pytest.mark.parametrize(
    "extra",
    [lambda t: t + 1, lambda t: t.contiguous(), lambda t: t.mul_(2), lambda t: torch.zeros_like(t)],
    ids=["computed", "copied", "changed", "zeros"],
)
def test_work_that_is_no_launch_spoils_it(gpu: types.SimpleNamespace, extra: Any) -> None:
    op = Op()
    op(made(), None, extra)
    x = made()
    assert prepare(lambda: op(x, None, extra), (x, None))[1] is None


def test_a_tensor_given_twice_spoils_it(gpu: types.SimpleNamespace) -> None:
    op = Op()
    op(made(), made())
    x = made()
    assert prepare(lambda: op(x, x), (x, x))[1] is None


def test_a_tensor_from_elsewhere_spoils_it(gpu: types.SimpleNamespace) -> None:
    op, kept = Op(), made()
    op(made(), kept)
    x = made()
    assert prepare(lambda: op(x, kept), (x,))[1] is None


def test_a_kernel_still_to_be_compiled_spoils_it(gpu: types.SimpleNamespace) -> None:
    op, x = Op(), made()
    assert prepare(lambda: op(x, None), (x, None))[1] is None


def test_when_it_takes_the_long_way(gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    op, x = Op(), made()
    op(x, None)
    _, again = prepare(lambda: op(x, None), (x, None))
    assert again is not None
    assert again((torch.zeros(4 * 24 + 1)[1:].view(4, 24), None)) is None  # not where kernels were compiled for
    with monkeypatch.context() as patched:
        patched.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        assert again((x, None)) is None
    assert again((x, None)) is not None


def test_another_device_is_current(gpu: types.SimpleNamespace) -> None:
    op, x = Op(), made()
    op(x, None)
    _, again = prepare(lambda: op(x, None), (x, None))
    assert again is not None
    again._current = lambda: 0 if gpu.entered else 1
    assert again((x, None)) is not None and gpu.entered == [0]


def test_zeros_are_those_of_the_moment(gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    zeros = [made(), made()]
    monkeypatch.setattr(_sync, "_zeros", lambda count, device: zeros[count - 5 + gpu.current_zeros])
    gpu.current_zeros = 0

    def run(x: Tensor) -> Tensor:
        launch((1, 1, 1), (x, _sync.zeros_left_as_found(5, x.device)), (), ())
        return x

    x = made()
    run(x)
    result, again = prepare(lambda: run(x), (x,))
    assert again is not None and result is x
    gpu.current_zeros = 1
    other = made()
    assert again((other,)) is other
    assert kernel.direct[-1][9:] == (other.data_ptr(), zeros[1].data_ptr())


def test_descriptors_are_encoded_at_the_new_address(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    encoded: list[Any] = []

    def encode(descriptor: Any, meta: Any) -> list[Any]:
        encoded.append((descriptor.base.data_ptr(), meta))
        return [f"map {descriptor.base.data_ptr()}", *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(_launch.triton, "__version__", "3.6.0")
    kernel = FakeKernel()
    kernel._run = CudaLauncher(kernel.direct, ["meta 0", "meta 1"])  # type: ignore[method-assign]
    launch = Launcher(kernel, described=True)

    def describe(base: Tensor) -> Any:
        return types.SimpleNamespace(base=base, shape=[4, 8], strides=[24, 1], block_shape=[4, 8], layout="tile")

    def run(x: Tensor) -> Tensor:
        y = x.new_empty(x.shape)
        launch((1, 1, 1), (x, describe(x[:, 8:]), None, describe(y)), (3,), (64,))
        return y

    x = made()
    run(x)
    _, again = prepare(lambda: run(x), (x,))
    assert again is not None
    del encoded[:]
    x = made()
    for _ in range(2):
        y = again((x,))
        assert kernel.direct[-1][13:26] == (
            x.data_ptr(), f"map {x.data_ptr() + 32}", 4, 8, 24, 1, None, f"map {y.data_ptr()}", 4, 8, 24, 1, 3,
        )  # fmt: skip
    assert (x.data_ptr() + 32, "meta 0") in encoded and encoded.count((x.data_ptr() + 32, "meta 0")) == 1


def test_an_op_s_calls(gpu: types.SimpleNamespace) -> None:
    """The first two calls of a form take the long way; then only those that differ in something do."""
    op, repeats = Op(), Repeats()

    def call(x: Tensor, w: Tensor | None, *options: Any) -> Any:
        found = repeats.again((x, w), options)
        return repeats.run((x, w), options, op, x, w) if found is None else found

    weight = torch.nn.Parameter(made())
    with torch.no_grad():
        for calls in (1, 2, 2, 2):
            call(made(), weight, 1.0, None)
            assert op.calls == calls
        weight.data = made()
        call(made(), weight, 1.0, None)
        assert op.calls == 2 and op.last[0][5] == weight.data_ptr()
        changes: list[Any] = [
            (made(), weight, 2.0, None),
            (made(), None, 1.0, None),
            (made(5), weight, 1.0, None),
            (torch.zeros(24, 4).t(), weight, 1.0, None),
            (made().double(), weight, 1.0, None),
            (made(), weight.data, 1.0, None),
            (made(), weight, 1.0, ["no hash"]),
        ]
        for i, change in enumerate(changes):
            call(*change)
            assert op.calls == 3 + i
    call(made(), weight, 1.0, None)
    assert op.calls == 3 + len(changes)  # gradients are needed


def test_what_cannot_be_prepared_is_not_tried_for_ever(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, repeats, tried = Op(), Repeats(), []
    monkeypatch.setattr("fastmamba.ops._repeats._prepare", lambda: lambda run, _: tried.append(0) or (run(), None))
    for _ in range(20):
        assert repeats.again((made(), None), ()) is None
        repeats.run((made(), None), (), op, made(), None)
    assert op.calls == 20 and 1 <= len(tried) <= 5


@pytest.mark.parametrize("guards", [True, False], ids=["guards", "no guards"])
def test_calls_of_many_forms_in_turn(guards: bool, gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are tried one by one, some of one kind, and a tensor that becomes another."""
    if not guards:
        monkeypatch.setattr(torch._C._dynamo, "guards", types.SimpleNamespace())
    op, repeats = Op(), Repeats()

    def call(x: Tensor, w: Tensor | None) -> Any:
        found = repeats.again((x, w), (1.0,))
        return repeats.run((x, w), (1.0,), op, x, w) if found is None else found

    weight = torch.nn.Parameter(made(3))
    with torch.no_grad():
        for turn in range(4):
            for rows in range(1, 8):
                for w in (None, weight):
                    x = made(rows)
                    y, _ = call(x, w)
                    assert y.shape == (rows, 16, 1)
                    if turn > 1:
                        assert op.last[0][4] == x.data_ptr() + 32
            assert op.calls == 14 * min(turn + 1, 2)
        weight.data = made(5)
        call(made(2), weight)
        assert op.calls == 29
        x = made(2)
        x.t_()
        with pytest.raises(RuntimeError):  # of the long way, which cannot split two columns
            call(x, None)
    assert op.calls == 30
    call(made(2), torch.nn.Parameter(made(3)))  # needs gradients
    assert op.calls == 31
    with torch.inference_mode():
        call(made(2), None)
    assert op.calls == 31


def test_a_tensor_given_twice_later(gpu: types.SimpleNamespace) -> None:
    op, repeats, x = Op(), Repeats(), made()
    for _ in range(3):
        w = made()
        if repeats.again((x, w), ()) is None:
            repeats.run((x, w), (), op, x, w)
    for _ in range(2):
        assert repeats.again((x, x), ()) is not None
        assert op.last[0][4:6] == (x.data_ptr() + 32, x.data_ptr())
