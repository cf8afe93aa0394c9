"""Reading compiled code: PTX, SASS and AMD's assembly."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from longact_kernels.compiled.targets import Gpu


class Costs(NamedTuple):
    """What stands in a kernel's compiled code; see :class:`longact_kernels.compiled.budgets.Budget`."""

    registers: int
    spills: int
    shared: int
    load_bits: int
    store_bits: int
    tensor_core: str


def read_cuda(compiled: Any) -> Costs:
    """Of NVIDIA GPUs."""
    usage = _cuobjdump(compiled, "-res-usage")
    registers, stack, local = (int(re.search(rf"{key}:(\d+)", usage).group(1)) for key in ("REG", "STACK", "LOCAL"))  # type: ignore[union-attr]
    ptx = compiled.asm["ptx"]
    tensor_core = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    return Costs(
        registers,
        stack + local,
        compiled.metadata.shared,
        _widest(r"ld\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)|cp\.async[\w.]*\.global [^,]*, [^,]*, 0x(\w+)", ptx),
        _widest(r"st\.global[\w.:]*?(?:\.v(\d))?\.[bsuf](\d+)", ptx),
        tensor_core.group(0) if tensor_core else "",
    )


def _widest(pattern: str, ptx: str) -> int:
    widths = [0]
    for vector, bits, *hex_bytes in re.findall(pattern, ptx):
        widths.append(int(vector or 1) * int(bits) if bits else 8 * int(hex_bytes[0], 16))
    return max(widths)


def _cuobjdump(compiled: Any, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), option, file.name], capture_output=True, text=True, check=True).stdout


def read_hip(compiled: Any) -> Costs:
    """Of AMD GPUs."""
    code = compiled.asm["amdgcn"]
    count = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\n", code)}
    tensor_core = re.search(r"v_(mfma|wmma|smfmac)_\w+", code)
    width = {"dwordx4": 128, "b128": 128, "dwordx3": 96, "b96": 96, "dwordx2": 64, "b64": 64, "dword": 32, "b32": 32}
    load, store = (
        max([width.get(size, 16) for size in re.findall(rf"(?:global|buffer)_{kind}_(?:lds_)?(\w+)", code)], default=0)
        for kind in ("load", "store")
    )
    registers = count["vgpr_count"] + count.get("agpr_count", 0)
    spilled = 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    instruction = tensor_core.group(0) if tensor_core else ""
    return Costs(registers, spilled, compiled.metadata.shared, load, store, instruction)


def main_loop(compiled: Any) -> list[str]:
    """The machine instructions (SASS) of the loop that moves most bytes, or of what lies outside loops if that does."""
    disassembly = _cuobjdump(compiled, "-sass")
    code = [(int(address, 16), text) for address, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", disassembly)]
    whole = dict(code)
    parts, rest = [], dict(code)
    for address, text in code:
        jump = re.search(r"\bBRA\b.*0x([0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) < address:
            loop = [at for at, _ in code if int(jump.group(1), 16) <= at <= address]
            parts.append([whole[at] for at in loop])
            for at in loop:
                rest.pop(at, None)
    return max([*parts, list(rest.values())], key=lambda part: sum(_lane_bytes(part)))


def issue_share(loop: list[str], gpu: Gpu) -> float:
    """Time to issue a loop's instructions over the time that its memory traffic takes, all lanes taken to be active."""
    return (len(loop) / gpu.issue) / (32 * sum(_lane_bytes(loop)) / gpu.bandwidth)


def wide_share(loop: list[str], index: bool = False) -> float:
    """Share of a loop's bytes that 128-bit accesses move; with an int64 `index`, 64-bit accesses are left aside."""
    moved = [width for width in _lane_bytes(loop) if not (index and width == 8)]
    return sum(width for width in moved if width == 16) / sum(moved)


def _lane_bytes(code: list[str]) -> list[int]:
    """Bytes that each access to global memory in SASS moves for one thread."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    accesses = (re.search(r"\b(?:LDG|STG|LDGSTS)\.E([.\w]*)", text) for text in code)
    return [next((widths[m] for m in a.group(1).split(".") if m in widths), 4) for a in accesses if a]
