"""Builds the drivers of tests/cuda_on_cpu and runs CUDA kernels with them on the CPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import struct
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TIME_LIMIT_S = 240
CACHE_S = 3 * 24 * 3600  # what was not used for so long is deleted

COMMON_FLAGS = ["-std=c++17", "-g1", "-fno-omit-frame-pointer", "-pthread"]
# Per build: flags of the driver, and what the runtime gets instead; instrumented, it would be reported itself.
# AddressSanitizer sees null pointers by itself, and the checks cost a third of the compilation.
UNDEFINED = ["-fsanitize=undefined", "-fno-sanitize=null,vptr", "-fno-sanitize-recover=all"]
BUILDS = {
    "plain": (["-O2"], []),
    "asan": (["-O1", "-fsanitize=address", *UNDEFINED], ["-DCUDA_ON_CPU_ASAN"]),
    "tsan": (["-O1", "-fsanitize=thread"], ["-DCUDA_ON_CPU_TSAN"]),
}
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0",
}

MAGIC = b"cuda_on_cpu 1\n"
TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int32, torch.int64, torch.uint8]


class BuildError(RuntimeError):
    """A driver cannot be built."""


class KernelError(RuntimeError):
    """A driver did not end well: what it wrote to stderr."""


@dataclass(frozen=True)
class Misaligned:
    """A tensor that shall lie so many bytes past a 256-byte boundary, instead of on it."""

    tensor: torch.Tensor
    bytes: int


Value = torch.Tensor | Misaligned | int | float | str | Sequence[int] | Sequence[float]


def run(
    name: str,
    inputs: Mapping[str, Value],
    *,
    build: str = "plain",
    seed: int = 0,
    defines: Sequence[str] = (),
    sources_override: Path | None = None,
) -> dict[str, torch.Tensor]:
    """Runs a driver on a case and returns its results.

    Args:
        name: the driver, tests/cuda_on_cpu/<name>.cpp.
        inputs: what the driver reads by name: dense tensors, which keep their memory layout, also as `Misaligned`;
            numbers, texts and lists of numbers.
        build: "plain", "asan" (AddressSanitizer and UndefinedBehaviorSanitizer) or "tsan" (ThreadSanitizer).
        seed: decides the order of blocks and threads.
        defines: macros to define, "NAME" or "NAME=value".
        sources_override: a folder to use instead of csrc/.

    Returns:
        The results by name; numbers as 0-d tensors.

    Raises:
        BuildError: the driver does not compile, or this machine has no compiler or no CUDA headers.
        KernelError: the driver failed: a sanitizer's report, a message of the shim, or a crash.
    """
    program = _program(name, build, tuple(defines), sources_override)
    with tempfile.TemporaryDirectory() as folder:
        case, results = Path(folder, "case"), Path(folder, "results")
        case.write_bytes(_encode(inputs))
        try:
            done = subprocess.run(
                [*_fixed_addresses(), program, case, results, str(seed)],
                capture_output=True,
                text=True,
                errors="replace",
                check=False,
                timeout=TIME_LIMIT_S,
                env={**os.environ, **SANITIZER_OPTIONS},
            )
        except subprocess.TimeoutExpired as error:
            raise KernelError(f"{name} ({build}): still running after {TIME_LIMIT_S} s") from error
        if done.returncode != 0:
            how = f"exit status {done.returncode}"
            if done.returncode < 0:
                how = f"killed by {signal.Signals(-done.returncode).name}"
            raise KernelError(f"{name} ({build}): {how}\n{done.stderr}")
        return _decode(results.read_bytes())


@cache
def _fixed_addresses() -> tuple[str, ...]:
    """Where addresses are randomised widely, ThreadSanitizer finds its shadow memory taken.

    Some containers forbid to switch that off, and mostly it works there all the same.
    """
    command = ("setarch", "-R")
    if shutil.which(command[0]) is None:
        return ()
    return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else ()


def build(name: str, build: str = "plain", defines: Sequence[str] = (), sources_override: Path | None = None) -> Path:
    """Compiles tests/cuda_on_cpu/<name>.cpp, unless that was done before with the same sources.

    Args:
        name, build, defines, sources_override: as in `run`.

    Returns:
        The path of the executable.

    Raises:
        BuildError: as in `run`.
    """
    return _program(name, build, tuple(defines), sources_override)


def _program(name: str, build: str, defines: tuple[str, ...], sources_override: Path | None) -> Path:
    if build not in BUILDS:
        raise BuildError(f"expected build to be one of {', '.join(BUILDS)}, got {build!r}")
    # The sources of a session stay as they are, those of an override may be on their way through many mutations.
    if sources_override is None:
        return _linked_once(name, build, defines)
    return _linked(name, build, defines, Path(sources_override))


@cache
def _linked_once(name: str, build: str, defines: tuple[str, ...]) -> Path:
    return _linked(name, build, defines, ROOT / "csrc")


def _linked(name: str, build: str, defines: tuple[str, ...], csrc: Path) -> Path:
    source = HERE / f"{name}.cpp"
    if not source.is_file():
        raise BuildError(f"there is no driver {source}")
    if not csrc.is_dir():
        raise BuildError(f"there is no folder {csrc} to take the kernels from")
    compiler = _compiler()
    sanitize, _ = BUILDS[build]
    flags = [*_flags(build), *sanitize, f"-I{csrc}", *(f"-D{macro}" for macro in defines)]
    # Kernel headers want the keywords before anything else, whatever order a driver's includes are sorted into.
    flags += ["-include", str(HERE / "shim" / "cuda.h")]
    flags += ["-fno-extern-tls-init"]  # an `extern __shared__` array has none, and g++ would call it
    objects = [str(_object(compiler, source, flags)), str(_runtime(compiler, build))]
    return _made(
        [_version(compiler), *sanitize, *objects],
        name,
        lambda program: [compiler, *sanitize, "-pthread", "-o", str(program), *objects],
    )


@cache
def _runtime(compiler: str, build: str) -> Path:
    return _object(compiler, HERE / "shim" / "runtime.cpp", [*_flags(build), "-O2"])


def _flags(build: str) -> list[str]:
    _, define = BUILDS[build]
    return [*COMMON_FLAGS, f"-I{HERE}", f"-I{HERE / 'shim' / 'stand_ins'}", f"-isystem{cuda_headers()}", *define]


def _object(compiler: str, source: Path, flags: list[str]) -> Path:
    """The compiled source, from the cache where nothing that it includes has changed."""
    listing = _call([compiler, *flags, "-MM", "-MT", "object", str(source)])
    files = [Path(file) for file in listing.partition(":")[2].replace("\\\n", " ").split()]
    contents = [f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return _made(
        [_version(compiler), *flags, *contents],
        f"{source.stem}.o",
        lambda made: [compiler, *flags, "-c", "-o", str(made), str(source)],
    )


def _made(key: Sequence[str], name: str, command: Callable[[Path], list[str]]) -> Path:
    """A file of the cache; made first, where there is none with this key."""
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()[:20]
    made = _cache() / f"{digest}-{name}"
    if made.exists():
        made.touch()
    else:
        # Other test runs may be making the same one.
        with tempfile.TemporaryDirectory(dir=_cache()) as folder:
            unfinished = Path(folder, name)
            _call(command(unfinished))
            os.replace(unfinished, made)
    return made


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    return done.stdout


@cache
def _cache() -> Path:
    folder = ROOT / "build" / "cuda_on_cpu"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="cuda_on_cpu-"))
    for made in folder.iterdir():
        if made.is_file() and time.time() - made.stat().st_mtime > CACHE_S:
            made.unlink(missing_ok=True)
    return folder


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise BuildError(f"the compiler {compiler} was not found: install g++, or name one by CXX")
    return compiler


@cache
def _version(compiler: str) -> str:
    return _call([compiler, "--version"])


@cache
def cuda_headers() -> Path:
    """The folder with cuda_fp16.h: a toolkit's, or that of the wheel which torch installs.

    Returns:
        The folder.

    Raises:
        BuildError: there is none.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        homes.append(str(Path(os.path.realpath(nvcc)).parents[1]))
    folders = [Path(home, "include") for home in homes if home]
    for site_packages in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        folders += sorted(Path(site_packages).glob("nvidia/cu[0-9]*/include"), reverse=True)
        folders.append(Path(site_packages, "nvidia", "cuda_runtime", "include"))
    for folder in folders:
        if (folder / "cuda_fp16.h").is_file():
            return folder
    raise BuildError(
        "no CUDA headers were found (cuda_fp16.h; looked in CUDA_HOME, CUDA_PATH, /usr/local/cuda, beside nvcc and in "
        "nvidia/*/include of site-packages): install a CUDA toolkit, or a torch with CUDA, or the wheel "
        "nvidia-cuda-runtime"
    )


def _encode(inputs: Mapping[str, Value]) -> bytes:
    parts = [MAGIC]
    for name, value in inputs.items():
        tensor, misalignment = (value.tensor, value.bytes) if isinstance(value, Misaligned) else (_tensor(value), 0)
        if tensor.dtype not in TYPES:
            raise ValueError(f"{name}: expected one of {TYPES}, got {tensor.dtype}")
        parts.append(struct.pack("<I", len(name.encode())) + name.encode())
        parts.append(struct.pack("<II", TYPES.index(tensor.dtype), tensor.dim()))
        parts.append(struct.pack(f"<{2 * tensor.dim()}q", *tensor.shape, *tensor.stride()))
        parts.append(struct.pack("<Q", misalignment))
        parts.append(_memory(name, tensor))
    return b"".join(parts)


def _tensor(value: torch.Tensor | int | float | str | Sequence[int] | Sequence[float]) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, str):
        return torch.tensor(list(value.encode()), dtype=torch.uint8)
    numbers = [value] if isinstance(value, (int, float)) else value
    whole = all(isinstance(number, int) for number in numbers)
    return torch.tensor(value, dtype=torch.int64 if whole else torch.float64)


def _memory(name: str, tensor: torch.Tensor) -> bytes:
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected and tensor.numel():
            raise ValueError(
                f"{name}: expected a dense tensor, got shape {list(tensor.shape)}, stride {tensor.stride()}"
            )
        expected *= size
    flat = tensor.detach().as_strided((tensor.numel(),), (1,))
    return flat.contiguous().view(torch.uint8).numpy().tobytes()


def _decode(data: bytes) -> dict[str, torch.Tensor]:
    if not data.startswith(MAGIC):
        raise KernelError("the driver's results are not in the format of archive.h")
    results, at = {}, len(MAGIC)

    def take(layout: str) -> tuple[int, ...]:
        nonlocal at
        values = struct.unpack_from(layout, data, at)
        at += struct.calcsize(layout)
        return values

    while at < len(data):
        (length,) = take("<I")
        name = data[at : at + length].decode()
        at += length
        code, rank = take("<II")
        sizes = take(f"<{2 * rank}q")
        shape, stride = sizes[:rank], sizes[rank:]
        take("<Q")
        dtype = TYPES[code]
        count = torch.Size(shape).numel()
        raw = bytearray(data[at : at + count * dtype.itemsize])
        at += len(raw)
        flat = torch.frombuffer(raw, dtype=dtype) if count else torch.empty(0, dtype=dtype)
        results[name] = flat.as_strided(shape, stride) if count else flat.reshape(shape)
    return results
