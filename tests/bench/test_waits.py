"""The kernels that time waiting do what they are timed for."""

import pytest
import torch
from interpreter import DEVICE as DEVICE_NAME
from interpreter import only_interpreted
from interpreter.cooperative import cooperative_grid

from benchmarks.gpu import waits

DEVICE = torch.device(DEVICE_NAME)


@only_interpreted
@pytest.mark.parametrize("n_programs", [1, 5])
def test_every_program_passes_every_barrier(n_programs: int) -> None:
    counter = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    for call in (1, 2):  # the counter is never reset
        with cooperative_grid(seed=call):
            passed = waits.pass_barriers(counter, n_programs, 7)
        assert passed.tolist() == [7] * n_programs
        assert counter.item() == 7 * n_programs * call


def test_waits_are_timed() -> None:
    barrier = waits.barrier_seconds(DEVICE, 3, 0.0)
    assert barrier["barriers"] == 3
    assert barrier["programs"] >= 1
    assert waits.node_seconds(DEVICE, False, 3, 0.0)["nodes"] == 3


def test_a_program_that_stays_behind_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    pass_barriers = waits.pass_barriers
    monkeypatch.setattr(waits, "pass_barriers", lambda *call: pass_barriers(*call) - 1)
    with pytest.raises(RuntimeError, match="has not passed all barriers"):
        waits.barrier_seconds(DEVICE, 2, 0.0)
