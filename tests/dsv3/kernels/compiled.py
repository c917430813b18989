"""Compiles every Triton kernel ahead of time, without a GPU, and prints what came out as JSON.

Called as `python compiled.py CAPABILITY`, in a process of its own because TRITON_INTERPRET must not be set when the
kernels are decorated. Triton's wheel brings the assembler and the disassembler. Every combination that training
launches is compiled: both kinds of scales, rows in fp32 and bf16, with and without gathering.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dsv3.kernels import triton_fp8 as kernels
from dsv3.kernels import triton_launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {
    "x_ptr": "*bf16", "w_ptr": "*fp32", "q_ptr": "*fp8e4nv", "qt_ptr": "*fp8e4nv", "s_ptr": "*fp32", "st_ptr": "*fp32",
    "a_ptr": "*fp8e4nv", "a_scale_ptr": "*fp32", "b_ptr": "*fp8e4nv", "b_scale_ptr": "*fp32", "y_ptr": "*bf16",
    "g_ptr": "*fp8e4nv", "g_scale_ptr": "*fp32", "x_scale_ptr": "*fp32", "index_ptr": "*i64", "expert_ptr": "*i32",
    "row_ptr": "*i32", "end_ptr": "*i32", "tile_end_ptr": "*i32",
}  # fmt: skip
ROWS = {"ROWS": triton_launch.ROWS_PER_PROGRAM}
COLUMNS = {"COLUMNS": triton_launch.COLUMNS_PER_PROGRAM}
NO_FP_FUSION = triton_launch.NO_FP_FUSION
FP32_ROWS, FP32_RESULT = {"x_ptr": "*fp32"}, {"y_ptr": "*fp32"}
QUANTIZERS = {
    "rows": (kernels.quantize_rows_kernel, ROWS, NO_FP_FUSION, {}),
    "weight": (
        kernels.quantize_weight_kernel,
        {},
        {"num_warps": triton_launch.WARPS_PER_WEIGHT_BLOCK, **NO_FP_FUSION},
        {},
    ),
    "columns": (kernels.quantize_columns_kernel, {**COLUMNS, "GATHERS": False}, NO_FP_FUSION, {}),
    "columns, gathered": (kernels.quantize_columns_kernel, {**COLUMNS, "GATHERS": True}, NO_FP_FUSION, {}),
    "rows of fp32": (kernels.quantize_rows_kernel, ROWS, NO_FP_FUSION, FP32_ROWS),
    "columns of fp32, gathered": (
        kernels.quantize_columns_kernel,
        {**COLUMNS, "GATHERS": True},
        NO_FP_FUSION,
        FP32_ROWS,
    ),
}
GEMMS = {
    "gemm": (kernels.grouped_gemm_kernel, {"GATHERS": False}, None, {}),
    "gemm, gathered": (kernels.grouped_gemm_kernel, {"GATHERS": True}, None, {}),
    "gemm to fp32": (kernels.grouped_gemm_kernel, {"GATHERS": False}, None, FP32_RESULT),
    "gemm to fp32, gathered": (kernels.grouped_gemm_kernel, {"GATHERS": True}, None, FP32_RESULT),
    "wgrad": (kernels.grouped_wgrad_kernel, {}, None, {"x_ptr": "*fp8e4nv"}),
}
SCALES = {"fp32 scales": False, "power-of-two scales": True}
CASES = GEMMS | {
    f"{name}; {scales}": (kernel, {**constants, "POWER_OF_TWO_SCALES": power_of_two_scales}, options, pointers)
    for name, (kernel, constants, options, pointers) in QUANTIZERS.items()
    for scales, power_of_two_scales in SCALES.items()
}
"""Name -> kernel, constants, options (None: those of a GEMM on the device), types that differ from `POINTERS`."""


def compiled(name: str, capability: int) -> triton.compiler.CompiledKernel:
    """Return the kernel as it is specialised for aligned pointers and dimensions that are multiples of 16."""
    kernel, constants, options, pointers = CASES[name]
    options = options or (triton_launch.HOPPER if capability >= 90 else triton_launch.ADA)
    signature, aligned, types = {}, {}, POINTERS | pointers
    for position, argument in enumerate(kernel.arg_names):
        signature[argument] = types.get(argument, "constexpr" if argument in constants else "i32")
        if argument in POINTERS or argument in ("num_outputs", "num_inputs"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def disassembled(tool: str, cubin: bytes, *options: str) -> str:
    """Return what a tool of Triton's wheel says about a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([TOOLS / tool, *options, file], capture_output=True, text=True, check=True).stdout


def report(name: str, capability: int) -> dict:
    """Return the tensor-core instructions and the resources of one kernel."""
    kernel = compiled(name, capability)
    usage = disassembled("cuobjdump", kernel.asm["cubin"], "-res-usage")
    sass = disassembled("nvdisasm", kernel.asm["cubin"])
    return {
        "kernel": CASES[name][0].__name__,
        "ptx": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|cvt\.rn\.satfinite)[\w.]+", kernel.asm["ptx"]))),
        "tensor_cores": sorted(set(re.findall(r"\b(?:QGMMA|HGMMA|IGMMA|QMMA|HMMA|IMMA)\b", sass))),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),  # stores to and loads from local memory
        "divisions": sorted(set(re.findall(r"div\.[\w.]+f32", kernel.asm["ptx"]))),
        "fused": len(re.findall(r"fma\.rn", kernel.asm["ptx"])),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    json.dump({name: report(name, int(sys.argv[1])) for name in CASES}, sys.stdout)
