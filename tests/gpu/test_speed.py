"""Floors for the speed of the grouped GEMMs, as shares of a ceiling that the same test measures on the same device.

The ceiling is one large bf16 product of torch. All contestants are timed in turn, with medians over all rounds, so that
clocks and neighbours strike them alike. The floors are half of what a decent kernel reaches, and more than one on the
wrong path does: without the warpgroup instructions, with spilled accumulators or with strided loads a product falls to
a quarter of the ceiling or less. They guard against that, and say nothing of what is possible (benchmarks/fp8.py does).
"""

import pytest
import torch
from torch.nn import functional as F

from benchmarks.timing import medians_s

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]

NUM_EXPERTS, ROWS_PER_EXPERT, NUM_OUTPUTS, NUM_INPUTS = 16, 1024, 4096, 2048
"""A layer of 16 experts with 16384 tokens: 275 GFLOP per product, 0.4 ms at 700 TFLOP/s, far above launch overhead."""
BF16_GROUPED_FLOOR = 0.3
FP8_FLOORS = {"forward": 0.3, "dgrad": 0.3, "wgrad": 0.25}
"""FP8 instructions are twice as fast as bf16's, but the promotion of every 128 products costs ordinary instructions;
wgrad reads scales per row and column besides."""
ROUNDS = 20


def shares_of_the_ceiling(functions, device):
    """Return for each function, all of equal FLOPs, its speed as a share of one bf16 product's of as many FLOPs."""
    num_rows = NUM_EXPERTS * ROWS_PER_EXPERT
    a, b = (torch.randn(size, NUM_INPUTS, device=device).bfloat16() for size in (num_rows, NUM_OUTPUTS))
    medians = medians_s({"ceiling": lambda: a @ b.t(), **functions}, ROUNDS, device)
    return {name: medians["ceiling"] / medians[name] for name in functions}


def ends(device):
    return torch.arange(1, NUM_EXPERTS + 1, device=device, dtype=torch.int32) * ROWS_PER_EXPERT


def test_torchs_grouped_product_in_bf16_takes_its_fast_path(hopper):
    x = torch.randn(NUM_EXPERTS * ROWS_PER_EXPERT, NUM_INPUTS, device=hopper).bfloat16()
    w = (torch.randn(NUM_EXPERTS, NUM_OUTPUTS, NUM_INPUTS, device=hopper) * 0.02).bfloat16()
    offsets = ends(hopper)
    found = shares_of_the_ceiling({"forward": lambda: F.grouped_mm(x, w.transpose(1, 2), offs=offsets)}, hopper)
    assert found["forward"] > BF16_GROUPED_FLOOR, found


def test_the_fp8_grouped_products_reach_their_floors(checks, hopper):
    launch = checks.triton_launch
    num_rows = NUM_EXPERTS * ROWS_PER_EXPERT
    x = torch.randn(num_rows, NUM_INPUTS, device=hopper).bfloat16()
    grad = torch.randn(num_rows, NUM_OUTPUTS, device=hopper).bfloat16()
    weight = launch.quantize_weight(torch.randn(NUM_EXPERTS, NUM_OUTPUTS, NUM_INPUTS, device=hopper) * 0.02, False)
    tiles = launch.schedule(ends(hopper), num_rows)
    rows, grad_rows = launch.quantize_rows(x, False), launch.quantize_rows(grad, False)
    grad_columns, columns = (launch.quantize_columns(side, tiles, None, False) for side in (grad, x))
    products = {
        "forward": lambda: launch.grouped_gemm(rows, None, weight.forward, tiles, num_rows, torch.bfloat16),
        "dgrad": lambda: launch.grouped_gemm(grad_rows, None, weight.transposed, tiles, num_rows, torch.bfloat16),
        "wgrad": lambda: launch.grouped_wgrad(grad_columns, columns, tiles, torch.float32),
    }
    found = shares_of_the_ceiling(products, hopper)
    assert {name for name, floor in FP8_FLOORS.items() if found[name] < floor} == set(), found
