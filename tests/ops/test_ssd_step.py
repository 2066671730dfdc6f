"""The one-token step: as many steps as tokens give what the SSD over the sequence gives."""

from __future__ import annotations

import pytest
import torch

from fastmamba.ops import ssd_step
from fastmamba.testing import assert_golden, ssd_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "state", "channels"),
    [(4, 16, 2, 16, False), (3, 24, 1, 40, True), (2, 80, 2, 128, False)],
)
def test_steps_equal_the_recurrence(
    dtype: torch.dtype,
    gate: bool,
    heads: int,
    head_dim: int,
    groups: int,
    state: int,
    channels: bool,
    backend: str,
    device: torch.device,
) -> None:
    case = ssd_case(
        2,
        6,
        heads,
        head_dim,
        groups,
        state,
        dtype=dtype,
        device=device,
        gate=gate,
        per_channel_d=channels,
        initial=True,
    )
    x, dt, A, B, C, D, z, bias, initial = case.arguments()
    states = torch.cat([initial, torch.full_like(initial, torch.nan)], -1)[..., :state]  # a strided view
    address = states.data_ptr()
    steps = [
        ssd_step(
            states,
            x[:, t],
            dt[:, t],
            A,
            B[:, t],
            C[:, t],
            D,
            None if z is None else z[:, t],
            bias,
            dt_softplus=True,
            backend=backend,
        )
        for t in range(6)
    ]
    y_oracle, final_oracle = case.oracle()
    y_plain, final_plain = case.plain()
    assert states.data_ptr() == address and steps[0].dtype == dtype
    assert_golden(torch.stack(steps, 1), y_plain, y_oracle)
    assert_golden(states, final_plain, final_oracle)


def test_dt_is_not_clamped(backend: str, device: torch.device) -> None:
    state = torch.zeros(1, 1, 1, 1, device=device)
    one = torch.ones(1, 1, 1, device=device)
    y = ssd_step(state, one, -one[0], torch.zeros(1, device=device), one, one, backend=backend)
    assert y.item() == -1.0


def test_the_registered_op(backend: str, device: torch.device) -> None:
    case = ssd_case(2, 1, 4, 16, 2, 16, device=device, initial=True)
    x, dt, A, B, C, D, z, bias, state = case.arguments()
    arguments = (state, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, None, bias, True, backend)
    torch.library.opcheck(torch.ops.fastmamba.ssd_step.default, arguments)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"x": torch.zeros(2, 4)}, "x must have shape"),
        ({"x": torch.zeros(0, 4, 16)}, "x must not be empty"),
        ({"state": torch.zeros(2, 4, 16, 15)}, "state must have shape"),
        ({"dt": torch.zeros(2, 5)}, "dt must have shape"),
        ({"B": torch.zeros(2, 3, 8), "C": torch.zeros(2, 3, 8)}, "groups must divide the 4 heads, got 3"),
        ({"C": torch.zeros(2, 2, 8, dtype=torch.bfloat16)}, "C must have dtype torch.float32"),
        ({"D": torch.zeros(3)}, "D must have shape"),
        ({"state": torch.zeros(2, 4, 16, 8, requires_grad=True)}, "must not require gradients"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_named(changes: dict[str, object], named: str) -> None:
    arguments = {
        "state": torch.zeros(2, 4, 16, 8),
        "x": torch.zeros(2, 4, 16),
        "dt": torch.zeros(2, 4),
        "A": torch.zeros(4),
        "B": torch.zeros(2, 2, 8),
        "C": torch.zeros(2, 2, 8),
        **changes,
    }
    with pytest.raises((ValueError, RuntimeError), match=named):
        ssd_step(**arguments)  # type: ignore[arg-type]
