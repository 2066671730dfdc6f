"""The launcher that remembers compiled kernels: against a stand-in for Triton's own call, and on a GPU."""

from __future__ import annotations

import contextlib
import types
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from fastmamba.kernels import _launch  # noqa: E402
from fastmamba.kernels._launch import Launcher  # noqa: E402


class OnGpu(torch.Tensor):
    """A CPU tensor that says it is on a GPU."""

    index = 0

    def get_device(self) -> int:
        return self.index


class FakeKernel:
    """Records Triton's own calls, and the direct ones to what it compiled."""

    def __init__(self) -> None:
        self.own: list[Any] = []
        self.direct: list[Any] = []

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            self.own.append((grid, args, options))
            name = f"function {len(self.own)}"
            return types.SimpleNamespace(run=self._run, function=name, packed_metadata="metadata")

        return call

    def _run(self, *args: Any) -> None:
        self.direct.append(args)


@pytest.fixture
def setting(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A GPU that is not there: its current device and stream, and its name to Triton."""
    state = types.SimpleNamespace(current=0, backend="cuda", entered=[])

    @contextlib.contextmanager
    def device(index: int) -> Any:
        state.entered.append(index)
        yield

    driver = types.SimpleNamespace(
        get_current_target=lambda: types.SimpleNamespace(backend=state.backend),
        get_current_stream=lambda index: f"stream {index}",
    )
    monkeypatch.setattr(_launch.triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: state.current, raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(_launch, "JITFunction", FakeKernel)
    monkeypatch.setattr(_launch, "on_device", lambda tensor: contextlib.nullcontext())
    return state


def _tensor(dtype: torch.dtype = torch.float32, offset: int = 0) -> torch.Tensor:
    return torch.zeros(64, dtype=dtype)[offset:].as_subclass(OnGpu)


def test_second_call_is_direct(setting: types.SimpleNamespace) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    first, second = _tensor(), _tensor()
    launch((3, 1, 1), (first, None), (7, 0.5), (64, True), num_warps=2)
    assert kernel.own == [((3, 1, 1), (first, None, 7, 0.5, 64, True), {"num_warps": 2})] and not kernel.direct
    launch((5, 2, 1), (second, None), (7, 0.5), (64, True), num_warps=2)
    assert len(kernel.own) == 1
    called = (
        5,
        2,
        1,
        "stream 0",
        "function 1",
        "metadata",
        None,
        None,
        None,
        second.data_ptr(),
        None,
        7,
        0.5,
        64,
        True,
    )
    assert kernel.direct == [called]


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": (_tensor(torch.bfloat16), None)},
        {"tensors": (_tensor(offset=1), None)},  # 4 bytes past a multiple of 16
        {"tensors": (_tensor(), _tensor())},
        {"numbers": (16, 0.5)},
        {"constants": (128, True)},
        {"num_warps": 4},
    ],
    ids=["dtype", "alignment", "none", "number", "constant", "option"],
)
def test_every_specialisation_is_compiled(setting: types.SimpleNamespace, change: dict[str, Any]) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    call: dict[str, Any] = dict(tensors=(_tensor(), None), numbers=(7, 0.5), constants=(64, True), num_warps=2)
    for arguments in (call, call | change, call | change, call):
        launch((1, 1, 1), **arguments)
    assert len(kernel.own) == 2
    assert [args[4] for args in kernel.direct] == ["function 2", "function 1"]


def test_devices(setting: types.SimpleNamespace) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    near, far = _tensor(), _tensor()
    far.index = 1  # type: ignore[misc]
    for tensor in (near, far, far):
        launch((1, 1, 1), (tensor,), (), ())
    assert len(kernel.own) == 2 and setting.entered == [1]
    assert kernel.direct[0][3:5] == ("stream 1", "function 2")


def test_hooks_see_every_launch(setting: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    launch((1, 1, 1), (_tensor(),), (), ())
    with monkeypatch.context() as patched:
        patched.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
        launch((1, 1, 1), (_tensor(),), (), ())
    assert len(kernel.own) == 2 and not kernel.direct
    launch((1, 1, 1), (_tensor(),), (), ())
    assert len(kernel.direct) == 1


def test_other_backends_and_the_cpu_take_triton_s_call(setting: types.SimpleNamespace) -> None:
    kernel = FakeKernel()
    launch = Launcher(kernel)
    for _ in range(2):
        launch((1, 1, 1), (torch.zeros(1),), (), ())
    setting.backend = "hip"
    for _ in range(2):
        launch((1, 1, 1), (_tensor(),), (), ())
    assert len(kernel.own) == 4 and not kernel.direct


def test_memory_is_bounded(setting: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "_MOST", 3)
    kernel = FakeKernel()
    launch = Launcher(kernel)
    for number in range(5):
        launch((1, 1, 1), (_tensor(),), (number,), ())
    assert len(launch._ready or ()) == 2


@triton.jit
def _scale_kernel(x_ptr, y_ptr, n, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(y_ptr + i, (x * factor).to(y_ptr.dtype.element_ty), mask=i < n)


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    launch = Launcher(_scale_kernel)
    for dtype in (torch.float32, torch.bfloat16):
        for size, offset in ((1000, 0), (1000, 0), (1000, 1), (1024, 0), (1, 0), (1024, 0)):
            x = torch.randn(2048, device="cuda", dtype=dtype)[offset : offset + size]
            y = torch.full_like(x, torch.nan)
            launch((triton.cdiv(size, 256), 1, 1), (x, y), (size, 0.5), (256,), num_warps=2)
            torch.testing.assert_close(y, x * 0.5)


@pytest.mark.gpu
def test_in_a_cuda_graph_and_on_another_stream() -> None:
    launch = Launcher(_scale_kernel)
    x, y = torch.randn(512, device="cuda"), torch.zeros(512, device="cuda")

    def run() -> None:
        launch((2, 1, 1), (x, y), (512, 3.0), (256,), num_warps=2)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # on a stream of its own
        run()
    x.normal_()
    graph.replay()
    torch.testing.assert_close(y, x * 3)


class CudaLauncher:
    """Triton 3.6's, as far as a launcher looks at it; `launch` is Triton's wrapper around what knows no descriptors."""

    launch_cooperative_grid, launch_pdl = False, True
    global_scratch_size = profile_scratch_size = 0

    def __init__(self, direct: list[Any], metas: list[Any] | None) -> None:
        def launcher(*args: Any) -> None:
            direct.append(args)

        tensordesc_meta = metas

        def inner(*args: Any) -> None:
            launcher(*args, tensordesc_meta)

        self.launch = inner if metas else direct.append

    def __call__(self, *args: Any) -> None:
        raise AssertionError("the way around it was not taken")


def test_descriptors_are_encoded_once(setting: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same address, shape and strides give the descriptor of the launch before; any other a new one."""
    driver = pytest.importorskip("triton.backends.nvidia.driver")
    encoded: list[Any] = []

    def encode(descriptor: Any, meta: Any) -> list[Any]:
        encoded.append((descriptor, meta))
        return [f"map {len(encoded)}", *descriptor.shape, *descriptor.strides]

    monkeypatch.setattr(driver, "make_tensordesc_arg", encode)
    monkeypatch.setattr(_launch.triton, "__version__", "3.6.0")
    kernel = FakeKernel()
    kernel._run = CudaLauncher(kernel.direct, ["meta 0", "meta 1"])  # type: ignore[method-assign]
    launch = Launcher(kernel, described=True)

    def describe(base: torch.Tensor, rows: int) -> Any:
        return types.SimpleNamespace(base=base, shape=[rows, 8], strides=[8, 1], block_shape=[4, 8], layout="tile")

    x, a, b = _tensor(), _tensor(), _tensor()
    for left, right, rows in ((a, b, 8), (a, b, 8), (a, b, 8), (b, a, 8), (a, b, 4)):
        launch((1, 1, 1), (x, describe(left, rows), None, describe(right, rows)), (3,), (64,))
    assert len(kernel.own) == 1
    assert [args[13:22] for args in kernel.direct] == [
        (x.data_ptr(), f"map {first}", rows, 8, 8, 1, None, f"map {second}", rows)
        for first, second, rows in ((1, 2, 8), (1, 2, 8), (3, 4, 8), (5, 6, 4))
    ]
    assert [meta for _, meta in encoded] == ["meta 0", "meta 1"] * 3
    assert kernel.direct[0][3:14] == (
        "stream 0", "function 1", False, True, None, None, "metadata", None, None, None, x.data_ptr(),
    )  # fmt: skip
