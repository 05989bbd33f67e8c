"""The model of time on cases that can be worked out by hand, and its page."""

from collections import Counter

import numpy as np
import pytest
from fastgpt_kernels.operations.gelu_mlp.tiles import ProductTile
from paths import ROOT

from benchmarks.report import records

from . import model, predicted, workloads
from .workloads import scaled

SMALL = model.Program(n_warps=4, registers=32, shared_bytes=0)


def test_a_copy_is_limited_by_memory() -> None:
    n = 1 << 26  # float32, 4 of a thread: each warp loads, stores and computes two addresses
    warps = n / 4 / 32
    counts = {
        "programs": warps / 4, "machine instructions": 4 * warps, "ALU machine instructions": 2 * warps,
        "load sectors": n // 8, "store sectors": n // 8,
    }  # fmt: skip
    found = model.limits(counts, SMALL, due_bytes=8 * n, gpu=model.H200)
    assert next(iter(found)) == "memory"
    assert model.seconds(found, model.H200) == pytest.approx(8 * n / (0.9 * 4.8e12) + 3e-6)


def test_units_by_hand() -> None:
    counts = {
        "programs": 264, "machine instructions": 9e6, "FMA machine instructions": 5e6, "barriers": 264 * 10,
        "FMA heavy machine instructions": 3e6, "special machine instructions": 1e6,
        "bf16 FLOPs": 264e6, "shared passes": 5e6, "load sectors": 1000, "store sectors": 0,
    }  # fmt: skip
    found = model.limits(counts, SMALL, due_bytes=0, gpu=model.H100)
    cycle_s = 1 / 1.83e9
    assert found["issue"] == pytest.approx(9e6 / 132 / 4 * cycle_s)
    assert found["FMA"] == pytest.approx(8e6 / 132 / 4 * cycle_s)  # Both kinds share the pipes,
    assert found["FMA heavy"] == pytest.approx(3e6 / 132 / 2 * cycle_s)  # of which one has half.
    assert found["special"] == pytest.approx(1e6 / 132 * 2 * cycle_s)
    assert found["shared memory"] == pytest.approx(5e6 / 132 * cycle_s)
    assert found["tensor cores"] == pytest.approx(2e6 / 4096 * cycle_s)
    # One wave, because 16 programs are resident: a warp's 9e6 / 264 / 4 instructions, ten barriers, two loads.
    assert found["latency"] == pytest.approx((9e6 / 264 / 4 * 2 + 10 * 30 + 2 * 479) * cycle_s)


@pytest.mark.parametrize(
    ("program", "resident"),
    [
        (model.Program(4, 32, 0), 16),  # 64 warps
        (model.Program(1, 32, 0), 32),  # programs
        (model.Program(4, 128, 0), 4),  # 65536 registers
        (model.Program(8, 128, 112 * 1024), 2),
        (model.Program(4, 32, 227 * 1024), 1),  # shared memory
    ],
)
def test_resident_programs(program: model.Program, resident: int) -> None:
    assert program.n_resident == resident


def test_one_program_more_than_multiprocessors_takes_twice_as_long() -> None:
    some, more = ({"programs": n, "machine instructions": 1e6 * n} for n in (132, 133))
    once, twice = (model.limits(counts, SMALL, 0, model.H100)["issue"] for counts in (some, more))
    assert twice == pytest.approx(2 * once)


def test_counts_are_scaled_by_their_terms() -> None:
    def counts(tokens: int) -> Counter:
        return Counter({"a": 3 * tokens + 2 * tokens**2, "b": 7 * tokens})

    found = scaled([counts(256), counts(512)], [(t, t**2) for t in (256, 512)], (1024, 1024**2))
    assert found == pytest.approx(counts(1024))


def test_as_many_cases_are_executed_as_counts_have_terms() -> None:
    for part in workloads.parts():
        terms = np.array([part.terms(**sizes) for sizes in part.tried], float)
        assert np.linalg.matrix_rank(terms) == terms.shape[1]


def test_products_of_the_mlp_are_executed_in_the_tile_of_the_wanted_size() -> None:
    parts = [part for part in workloads.parts() if part.kernels == "fwd|bwd_pre"]
    tiles = []
    for part in parts:
        (wanted,) = _tiles(part.wanted, workloads._MULTIPROCESSORS)
        assert {tile for sizes in part.tried for tile in _tiles(sizes, part.multiprocessors)} == {wanted}
        tiles.append(wanted.block_cols)
    assert tiles == [128, 256]  # a prompt, and a training step


def _tiles(sizes: dict[str, int], n_multiprocessors: int) -> set[ProductTile]:
    return {
        workloads.mlp_tile(kernel, sizes["rows"], sizes[n_cols], n_multiprocessors)
        for kernel, n_cols in (("hidden", "wide"), ("out", "narrow"), ("pre", "wide"))
    }


def test_sums_of_the_mlp_are_joined_once_a_program() -> None:
    """Once a tile before the number of programs was a term of its own."""
    (row,) = (row for row in predicted.newest()["kernels"] if row["kernel"] == "_gelu_mlp_bwd_product_kernel")
    assert row["counts"]["barriers"] % row["counts"]["programs"] == 0


def test_the_page_is_what_the_file_says() -> None:
    text = predicted.PAGE.read_text()
    assert predicted.page(text, predicted.newest()) == text


def test_predictions_are_no_results() -> None:
    content = predicted.newest()
    assert content["predicted"] is True
    assert {row["workload"] for row in content["kernels"]} == {*predicted._ROWS, "decode, batch 1"}
    assert all(result.device != "predicted" for result in records.load(ROOT / "benchmarks/results"))
