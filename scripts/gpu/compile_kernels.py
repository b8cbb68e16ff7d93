#!/usr/bin/env python3
"""Compile the Triton kernels of a fused pass for GPUs that need not be there, and list the resources of each.

    python scripts/gpu/compile_kernels.py                    # a table; exit status 1 if a kernel spills registers
    python scripts/gpu/compile_kernels.py --models llamagen-l --targets 90 --rows 2 --json kernels.json
    python scripts/gpu/compile_kernels.py --count            # only the number of kernels of a pass

A pass of the recipe's model at full size runs on the meta device, where tensors have no data, and its launches are
recorded. So what is compiled is what is launched, and the launches can be counted. Registers are of a thread, shared
memory is of a block. `spills` is the number of instructions that move registers to memory and back.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from zipar_train.decoding.cache import head_shape
from zipar_train.decoding.fused_llama import fuse_for_inference
from zipar_train.decoding.kernels.fused_decoder import FusedDecoder
from zipar_train.models.family import build
from zipar_train.plan.table import Plan
from zipar_train.recipe.load import load_recipe
from zipar_train.recipe.schema import SamplingParams

MODELS = ("llamagen-l", "llamagen-xl", "lumina-mgpt-7b-768", "emu3-gen")
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.int64: "i64",
    torch.int32: "i32", torch.int8: "i8", torch.uint8: "u8",
}  # fmt: skip
VIEWS = ("view", "expand", "slice", "select", "transpose", "t.", "alias", "_unsafe_view", "detach", "unsqueeze")


@dataclass
class Launch:
    """A recorded launch of a Triton kernel."""

    kernel: JITFunction
    blocks: int
    arguments: dict[str, Any]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def launches(
    recipe: str, *, rows: int, dtype: torch.dtype = torch.bfloat16, dependent: bool = True, **sampling: Any
) -> tuple[list[Launch], list[str], int]:
    """Record a fused pass of a recipe's model at full size, in the middle of an image.

    Args:
        recipe: The name of a recipe.
        rows: Rows of the matrix products: half as many slots, under guidance.
        dtype: Of the weights.
        dependent: Programmatic dependent launch, as on a GPU of compute capability 9.0 and above.
        sampling: What differs from the recipe's section.

    Returns:
        The launches, the names of PyTorch's operators that start kernels, and the number of layers.
    """
    settings = load_recipe(recipe)
    family = build(settings.model, dtype=dtype, device="meta")
    assert fuse_for_inference(family.model)
    plan = Plan.zipar(family.grid, window=4, prompt=family.prompt_length)
    decoder = FusedDecoder(family, plan)
    decoder.launch["PDL"] = dependent
    config = family.model.config.get_text_config()
    heads, width = head_shape(config)
    how = SamplingParams.model_validate(settings.sampling.model_dump() | sampling)
    copies = 2 if how.guidance != 1 else 1

    def empty(*shape: int, kind: torch.dtype = torch.long) -> Tensor:
        return torch.empty(*shape, dtype=kind, device="meta")

    columns, slots = plan.grid.num_codes + 2, decoder.visible.shape[1]
    kept = SimpleNamespace(
        keys=empty(copies, heads, slots, width, kind=dtype), values=empty(copies, heads, slots, width, kind=dtype)
    )
    state: Any = SimpleNamespace(
        tokens=empty(1, columns), seeds=empty(1, columns), slot=empty(1), passes=empty(1),
        prompt=empty(copies, plan.prompt, config.hidden_size, kind=dtype),
        padding=None if plan.prompt == 1 else empty(copies, plan.prompt, kind=torch.bool),
        cache=SimpleNamespace(slot_layers=[kept] * config.num_hidden_layers),
    )  # fmt: skip
    found: list[Launch] = []

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        blocks = 1
        for size in grid:
            blocks *= size
        named = dict(zip(kernel.arg_names, args, strict=False))
        options = {key: value for key, value in kwargs.items() if key not in kernel.arg_names}
        named |= {key: value for key, value in kwargs.items() if key in kernel.arg_names}
        found.append(Launch(kernel, blocks, named, options))

    with patch.object(JITFunction, "run", record), Operators() as operators, torch.inference_mode():
        decoder.prepare(state, rows // copies)
        operators.names.clear()
        decoder.fused_pass(state, rows // copies, how, keep=False)
    return found, operators.names, config.num_hidden_layers


class Operators(TorchDispatchMode):
    """Names of the operators that start kernels; views do not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        if not name.startswith(VIEWS):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def distinct(found: list[Launch]) -> list[Launch]:
    """Return one launch of each kernel and shape."""
    return list({(each.name, each.arguments.get("D"), each.arguments.get("N")): each for each in found}.values())


def compiled(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile a launch's kernel as the launcher would, and return its resources."""
    signature, constants, attributes = {}, {}, {}
    constexprs = {launch.kernel.arg_names[index] for index in launch.kernel.constexprs}
    for place, (name, value) in enumerate(launch.arguments.items()):
        if name in constexprs or value is None:
            signature[name] = "constexpr"
            constants[name] = value
            continue
        aligned = True
        if isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
        elif isinstance(value, float):
            signature[name], aligned = "fp32", False
        else:
            signature[name], aligned = "i32", value % 16 == 0
            if value == 1:  # the launcher compiles it in
                signature[name] = "constexpr"
                constants[name] = 1
                continue
        if aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(made.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        listed, code = (
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    registers = re.search(r"REG:(\d+)", listed)
    assert registers and "EXIT" in code, listed
    return {
        "kernel": launch.name,
        "blocks": launch.blocks,
        "warps": made.metadata.num_warps,
        "registers": int(registers[1]),
        "shared": made.metadata.shared,
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", code)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS), help=f"recipes, otherwise {', '.join(MODELS)}")
    parser.add_argument("--targets", default="80,90", help="compute capabilities without the point, otherwise 80,90")
    parser.add_argument("--rows", default="2,32", help="rows of a pass, otherwise 2,32")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights, otherwise bfloat16")
    parser.add_argument("--count", action="store_true", help="compile nothing")
    parser.add_argument("--json", type=Path, help="also write the table there")
    asked = parser.parse_args()
    passes: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    print(f"triton {triton.__version__}")
    for model, rows, target in product(
        asked.models.split(","), map(int, asked.rows.split(",")), map(int, asked.targets.split(","))
    ):
        dtype = getattr(torch, asked.dtype)
        found, operators, layers = launches(model, rows=rows, dtype=dtype, dependent=target >= 90)
        names = Counter(launch.name for launch in found)
        inside = {name: count // layers for name, count in names.items() if count >= layers}
        outside = [name for name in names if name not in inside] + operators
        passes.append({"model": model, "rows": rows, "layers": layers, "per_layer": inside, "outside": outside})
        print(
            f"{model}, {rows} rows, sm_{target}: {layers} layers of {sum(inside.values())} kernels, and outside "
            f"of the layers {len(outside)}: {', '.join(outside)}"
        )
        for launch in [] if asked.count else distinct(found):
            row = {"model": model, "rows": rows, "target": target} | compiled(launch, target)
            table.append(row)
            print("  {kernel:12} {blocks:5} blocks of {warps:2} warps, {registers:3} registers, {shared:6} bytes "
                  "shared, {spills} spills".format(**row), flush=True)  # fmt: skip
    if asked.json:
        asked.json.write_text(json.dumps({"triton": triton.__version__, "passes": passes, "kernels": table}, indent=1))
    return int(any(row["spills"] for row in table))


if __name__ == "__main__":
    sys.exit(main())
