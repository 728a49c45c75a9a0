"""Reads what ptxas and cuobjdump say about compiled kernels."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """What one kernel needs on one architecture."""

    registers: int
    shared: int  # bytes a block asks for: static (CUDA) or chosen by the compiler (Triton)
    spill: int  # bytes, stores and loads together
    stack: int  # bytes
    ldg128: int  # instructions, as are all below; 256-bit ones count too
    stg128: int
    local: int
    mma: int  # of tensor cores


def find_cuobjdump(folders=()):
    """The cuobjdump of the first folder that has one, of the PATH, or of the triton package; None without any."""
    for folder in folders:
        if Path(folder, "cuobjdump").exists():
            return Path(folder, "cuobjdump")
    if on_path := shutil.which("cuobjdump"):
        return Path(on_path)
    spec = find_spec("triton")
    packaged = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump" if spec and spec.origin else None
    return packaged if packaged and packaged.exists() else None


def cuobjdump(tool, option, binary):
    # It looks for nvdisasm on the PATH first, where one of another release may be.
    environment = {"PATH": f"{Path(tool).parent}:/usr/bin:/bin"}
    done = subprocess.run(
        [str(tool), option, str(binary)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, f"{tool} {option} {binary} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done.stdout


def ptxas_log(log):
    """(arch, mangled kernel) -> registers, shared, spill and stack of a `ptxas -v` log."""
    found = {}
    for block in re.split(r"Compiling entry function ", log)[1:]:
        name, arch = re.match(r"'([^']+)' for 'sm_(\d+)\w*'", block).groups()
        # Functions that were not inlined follow their kernel.
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", block)
        used = re.search(r"Used (\d+) registers", block)
        assert frames and used, f"ptxas -v: expected registers and spills of {name}, got:\n{block}"
        shared = re.search(r"Used .*?(\d+)(?:\+(\d+))? bytes smem", block)
        found[int(arch), name] = {
            "registers": int(used.group(1)),
            "shared": sum(int(part) for part in shared.groups() if part) if shared else 0,
            "spill": sum(int(stores) + int(loads) for _, stores, loads in frames),
            "stack": sum(int(stack) for stack, _, _ in frames),
        }
    return found


def opcodes(sass):
    """(arch, mangled kernel) -> list of opcodes, from `cuobjdump -sass`."""
    found, arch, current = {}, None, None
    for line in sass.splitlines():
        if target := re.match(r"\s*code for sm_(\d+)", line):
            arch = int(target.group(1))
        elif function := re.match(r"\s*Function : (\S+)", line):
            current = found.setdefault((arch, function.group(1)), [])
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            current.append(instruction.group(1))
    return found


def wide(opcode, kinds):
    """Whether an opcode such as LDG.E.EF.128.CONSTANT is of these kinds and moves at least 16 bytes per thread."""
    kind, *modifiers = opcode.split(".")
    return kind in kinds and bool({"128", "256"} & set(modifiers))


def instruction_counts(codes):
    return {
        "ldg128": sum(wide(code, {"LDG", "LDGSTS"}) for code in codes),  # LDGSTS: cp.async
        "stg128": sum(wide(code, {"STG"}) for code in codes),
        "local": sum(code.split(".")[0] in {"LDL", "STL"} for code in codes),
        # mma.sync, wgmma (sm_90), tcgen05 (sm_100); fp64 ones are not counted.
        "mma": sum(re.match(r"HMMA\b|HGMMA\b|UTC\w*MMA\b", code) is not None for code in codes),
    }


def measure(tool, binary, log):
    """(arch, mangled kernel) -> Resources of a cubin or fatbin and the ptxas log of its compilation."""
    codes = opcodes(cuobjdump(tool, "-sass", binary))
    reported = ptxas_log(log)
    assert codes and codes.keys() == reported.keys(), (
        f"expected ptxas and cuobjdump to name the same kernels, got {sorted(reported)} and {sorted(codes)}"
    )
    assert all(codes.values()), f"cuobjdump shows no instructions of {[key for key in codes if not codes[key]]}"
    return {key: Resources(**reported[key], **instruction_counts(codes[key])) for key in codes}


def demangle(symbol):
    """A C++ symbol as people write it, or the symbol itself if it is no C++ one."""
    demangler = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangler.restype = ctypes.c_void_p
    status = ctypes.c_int()
    text = demangler(symbol.encode(), None, None, ctypes.byref(status))
    if status.value != 0:
        return symbol
    name = ctypes.string_at(text).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(text))
    return name


def kernel_name(symbol):
    """`void transkd::copy<float, 4>(float const*, long)` without result, namespaces and parameters."""
    name, depth, end = demangle(symbol).replace("(anonymous namespace)", "anonymous"), 0, None
    for at, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = at
            break
    head, bracket, template = name[:end].partition("<")
    return head.split()[-1].split("::")[-1] + bracket + template


def same_name(name):
    """A key under which a name as people write it and as the demangler writes it are equal."""
    return re.sub(r"\s", "", name)


def gate(wide, needs, tensor_cores=False):
    """What is wrong with a kernel.

    Args:
        wide: declare.Wide, the wide accesses it must have.
        needs: Its Resources.
        tensor_cores: Whether it must use tensor cores.

    Returns:
        Complaints, empty where every gate holds.
    """
    complaints = []
    if needs.spill:
        complaints.append(f"spills registers ({needs.spill} bytes)")
    if needs.stack:
        complaints.append(f"uses a stack frame ({needs.stack} bytes)")
    if needs.local:
        complaints.append(f"touches local memory ({needs.local} LDL/STL instructions)")
    if needs.ldg128 < wide.loads:
        complaints.append(f"lacks 128-bit global loads ({needs.ldg128} LDG.E.128, expected {wide.loads} or more)")
    if needs.stg128 < wide.stores:
        complaints.append(f"lacks 128-bit global stores ({needs.stg128} STG.E.128, expected {wide.stores} or more)")
    if tensor_cores and not needs.mma:
        complaints.append("uses no tensor cores (HMMA, HGMMA or UTC*MMA)")
    return complaints
