"""Compiles every Triton kernel ahead of time, without a GPU, and prints what came out as JSON.

Called as `python compiled.py CAPABILITY`, in a process of its own because TRITON_INTERPRET must not be set when the
kernels are decorated. Triton's wheel brings the assembler and the disassembler.
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
EXACT = triton_launch.EXACT
CASES = {
    "rows": (kernels.quantise_rows_kernel, {**ROWS, "POW2": False}, EXACT),
    "rows, power of two": (kernels.quantise_rows_kernel, {**ROWS, "POW2": True}, EXACT),
    "weight": (kernels.quantise_weight_kernel, {"POW2": False}, {"num_warps": 8, **EXACT}),
    "columns": (kernels.quantise_columns_kernel, {**COLUMNS, "GATHERS": False, "POW2": False}, EXACT),
    "columns, gathered": (kernels.quantise_columns_kernel, {**COLUMNS, "GATHERS": True, "POW2": False}, EXACT),
    "gemm": (kernels.grouped_gemm_kernel, {"GATHERS": False}, None),
    "gemm, gathered": (kernels.grouped_gemm_kernel, {"GATHERS": True}, None),
    "wgrad": (kernels.grouped_wgrad_kernel, {}, None),
}


def compiled(name: str, capability: int) -> triton.compiler.CompiledKernel:
    """Return the kernel as it is specialised for aligned pointers and dimensions that are multiples of 16."""
    kernel, constants, options = CASES[name]
    options = options or (triton_launch.HOPPER if capability >= 90 else triton_launch.ADA)
    signature, aligned = {}, {}
    for position, argument in enumerate(kernel.arg_names):
        signature[argument] = POINTERS.get(argument, "constexpr" if argument in constants else "i32")
        if argument in POINTERS or argument in ("N", "K"):
            aligned[(position,)] = [["tt.divisibility", 16]]
    if name == "wgrad":
        signature["x_ptr"] = "*fp8e4nv"
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
        "ptx": sorted(set(re.findall(r"(?:wgmma\.mma_async|mma\.sync|cvt\.rn\.satfinite)[\w.]+", kernel.asm["ptx"]))),
        "sass": sorted(set(re.findall(r"\b(?:QGMMA|HGMMA|QMMA|HMMA|STL|LDL)\b", sass))),
        "divisions": sorted(set(re.findall(r"div\.[\w.]+f32", kernel.asm["ptx"]))),
        "fused": len(re.findall(r"fma\.rn", kernel.asm["ptx"])),
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared_bytes": kernel.metadata.shared,
    }


if __name__ == "__main__":
    json.dump({name: report(name, int(sys.argv[1])) for name in CASES}, sys.stdout)
