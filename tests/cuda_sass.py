"""Compiles the CUDA kernels for GPUs that need not be there, and counts what the machine code holds.

nvcc compiles with the flags of CMakeLists.txt; the disassembler is that of the CUDA toolkit or of Triton's wheel.
test_cuda_compile.py and test_cuda_compile_attention.py hold the budgets. By hand: `python tests/cuda_sass.py 80 90a`
prints one line per kernel.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ("skinny_w4", "skinny_w2", "skinny_w8", "quantize")  # the longest first: two compile side by side
ATTENTION_FILES = ("attention_decode",)
UNPACKING = re.compile(r"0x(c0c0c0c0|f0f0f0f0)\b")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][A-Z0-9_.]*)\s*(.*?)\s*;")


@dataclass(frozen=True)
class Instruction:
    address: int
    guarded: bool
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]


# -------------------------------------------------------------------------------------------- tools and flags


def disassembler() -> Path | None:
    """nvdisasm of the CUDA toolkit, else of Triton's wheel."""
    on_path = shutil.which("nvdisasm")
    if on_path:
        return Path(on_path)
    spec = importlib.util.find_spec("triton")
    found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "nvdisasm" if spec and spec.origin else None
    return found if found and found.is_file() else None


def missing() -> str | None:
    """Why nothing can be counted here, or None."""
    if not shutil.which("nvcc"):
        return "the budgets of the CUDA kernels need nvcc, and there is none on the PATH"
    return None if disassembler() else "the budgets of the CUDA kernels need nvdisasm: neither CUDA nor Triton has it"


def cmake_value(text: str, name: str) -> list[str]:
    """The words of `set(name ...)`, which stands once."""
    found = re.findall(rf'set\({name}\s+"?([^)"]*)"?\)', text)
    assert len(found) == 1, f"CMakeLists.txt sets {name} {len(found)} times"
    return found[0].split()


def flags() -> list[str]:
    """What CMake passes to nvcc for every kernel, read from CMakeLists.txt so that the two cannot drift."""
    text = (ROOT / "CMakeLists.txt").read_text()
    (standard,) = cmake_value(text, "CMAKE_CUDA_STANDARD")
    return [
        f"-std=c++{standard}",
        *cmake_value(text, "CMAKE_CUDA_FLAGS_RELEASE"),
        *cmake_value(text, "DQK_CUDA_FLAGS"),
        f"-I{ROOT / 'csrc'}",
        f"-I{ROOT / 'csrc' / 'include'}",
    ]


# ------------------------------------------------------------------------------------------------- compiling


def kernel_name(mangled: str) -> str:
    """`skinny W2 16B 1 tiles groups` (width, bytes per lane, token tiles), `attention 64 1 tiles keep` (dimensions,
    tiles of slots, form, `words` where 16-byte loads will not do), or the quantizer's own name and type."""
    attention = re.search(r"attention_decode_kernelILi(\d)ELi(\d)ELb([01])ELb([01])E", mangled)
    if attention:
        segments, tiles, vector, keep = attention.groups()
        form = ("keep" if keep == "1" else "redo") + " words" * (vector == "0")
        return f"attention {64 * int(segments)} {tiles} tiles {form}"
    skinny = re.search(r"skinny_kernelILi(\d+)ELi(\d+)ELi(\d+)ELb([01])E", mangled)
    if skinny:
        bits, size, tiles, groups = skinny.groups()
        return f"skinny W{bits} {size}B {tiles} tiles" + " groups" * (groups == "1")
    plain = re.search(r"\d+([a-z_]+_kernel)(?:ILNS_5DTypeE(\d)ELb([01])E)?", mangled)
    assert plain, f"a kernel of another kind: {mangled}"
    kernel, dtype, vector = plain.groups()
    return kernel if dtype is None else f"{kernel} type{dtype} {'vector' if vector == '1' else 'scalar'}"


def usage(log: str) -> dict[str, dict[str, int]]:
    """What `ptxas -v` says of each kernel."""
    found = {}
    for mangled, body in re.findall(r"Compiling entry function '(\w+)'(.*?)(?=Compiling entry|\Z)", log, re.S):
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", body
        ).groups()
        found[mangled] = {
            "registers": int(re.search(r"Used (\d+) registers", body)[1]),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
        }
    return found


def instructions(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of one kernel in the order of their addresses, and where its labels stand."""
    found, labels, waiting = [], {}, []
    for line in code.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            waiting.append(label[1])
            continue
        match = LINE.match(line)
        if match:
            address = int(match[1], 16)
            labels.update(dict.fromkeys(waiting, address))
            waiting = []
            found.append(Instruction(address, match[2] is not None, match[3], match[4]))
    assert len(found) > 20, "the disassembly was not understood"
    return found, labels


def hot_loop(code: list[Instruction], labels: dict[str, int]) -> list[Instruction]:
    """The innermost loop around every IMMA: from the target of a branch back to that branch. Blocks that ptxas has
    moved out of the way of a loop are not in it; no kernel here has one inside its steps."""
    tensor = [at.address for at in code if at.name == "IMMA"]
    loops = []
    for branch in code:
        target = re.search(r"`\((\.L_x_\d+)\)", branch.operands)
        if branch.name != "BRA" or not target or target[1] not in labels:
            continue
        start = labels[target[1]]
        if tensor and start <= tensor[0] and branch.address >= tensor[-1]:
            loops.append((branch.address - start, start, branch.address))
    if not loops:
        return []
    _, start, end = min(loops)
    return [at for at in code if start <= at.address <= end]


def weight_load(at: Instruction) -> bool:
    """Kept out of L1, which nothing but weights is. (Also .nc, but ptxas calls other loads that on its own.)"""
    return at.name == "LDG" and ".NA" in at.opcode


def shift(at: Instruction) -> bool:
    return at.name in ("SHF", "SHL", "SHR", "USHF") or at.opcode.startswith(("IMAD.SHL", "UIMAD.SHL"))


def counts(code: list[Instruction], labels: dict[str, int]) -> dict:
    """Instructions of the whole kernel by name, of its hot loop likewise, and the order of loads around ACQBULK."""
    names = Counter(at.name for at in code)
    loop = hot_loop(code, labels)
    waits = [i for i, at in enumerate(code) if at.name == "ACQBULK"]
    first = waits[0] if waits else 0
    return {
        "instructions": len(code),
        "all": names,
        "fused": names["FFMA"] + 2 * names["FFMA2"],
        "wide_loads": sum(at.name == "LDG" and at.opcode.endswith("128") for at in code),
        "local": names["LDL"] + names["STL"],
        "weight_loads": Counter(at.opcode for at in code if weight_load(at)),
        "waits": len(waits),
        "releases": [i for i, at in enumerate(code) if at.name == "PREEXIT"],
        "wait": first,
        "weights_before_wait": sum(weight_load(at) for at in code[:first]),
        "bytes_before_wait": sum(at.name == "LDG" and ".U8" in at.opcode for at in code[:first]),
        "loads_before_wait": sum(at.name in ("LDG", "LD", "LDGSTS") for at in code[:first]),
        "loop": Counter(at.name for at in loop),
        "loop_instructions": len(loop),
        "loop_weight_loads": Counter(at.opcode for at in loop if weight_load(at)),
        "loop_masks": sum(at.name == "LOP3" and bool(UNPACKING.search(at.operands)) for at in loop),
        "loop_shifts": sum(shift(at) for at in loop),
    }


def compile_file(name: str, arch: str, folder: Path) -> dict[str, dict]:
    """{kernel: counts} of csrc/cuda/`name`.cu for sm_`arch`."""
    stem = folder / f"{name}.{arch}"
    source = ROOT / "csrc" / "cuda" / f"{name}.cu"
    work = Path(tempfile.mkdtemp(dir=folder))
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", *flags(), "-Xptxas", "-v", "--keep", "--keep-dir", str(work)]
    done = subprocess.run([*command, str(source), "-o", f"{stem}.cubin"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    code = subprocess.run([disassembler(), "-c", f"{stem}.cubin"], capture_output=True, text=True, check=True).stdout
    (ptx,) = work.glob("*.ptx")
    bodies = {
        mangled: Counter(re.findall(r"^\s*(?:@!?%p\d+\s+)?((?:fma|div|sqrt|mul|add)\.[\w.]*f(?:32|64))\b", body, re.M))
        for mangled, body in re.findall(r"\.entry (\w+)\((.*?)^\}", ptx.read_text(), re.S | re.M)
    }
    found = {}
    spent = usage(done.stdout + done.stderr)
    sections = re.split(r"^\s*\.section\s+\.text\.", code, flags=re.M)[1:]
    for section in sections:
        mangled = re.match(r"\w+", section)[0]
        kernel = f"{kernel_name(mangled)} sm_{arch}"
        found[kernel] = {**spent.pop(mangled), "ptx": bodies[mangled], **counts(*instructions(section))}
    assert not spent, f"no code of {list(spent)}"
    return found


def compile_all(archs: list[str], files: Sequence[str] = FILES) -> dict[str, dict]:
    """{kernel: counts} of every file, two compiling at a time."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(compile_file, name, arch, Path(folder)) for name in files for arch in archs]
        return {kernel: found for job in jobs for kernel, found in job.result().items()}


def main() -> None:
    for kernel, found in compile_all(sys.argv[1:], (*FILES, *ATTENTION_FILES)).items():
        print(kernel, {k: dict(v) if isinstance(v, Counter) else v for k, v in found.items()})


if __name__ == "__main__":
    main()
