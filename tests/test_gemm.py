"""The matrix product of the C++ kernels for CPU, every variant that this machine runs, against fp64."""

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import cycle, product
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = ["-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize=null,vptr", "-fno-sanitize-recover=all"]
BUILDS = {"clones": ["-O3"], "no clones": ["-O3", "-DTRANSKD_NO_CLONES"], "sanitizers": SANITIZE}

# As csrc/cpu/common/gemm.h has them; sums are cut where gemm.cpp does.
PANEL_BYTES, TILE_ROWS, CHAIN = 128, 8, 256
FUNCTIONS = ("pack_panels", "pack_strips", "transpose", "multiply", "multiply_transposed")
PRODUCTS = ("multiply", "multiply_transposed")
# Changed by an addition of zero too, which a product that goes on into the padding of a panel makes.
GUARD = -0.0

# What a processor must have for a variant, as /proc/cpuinfo calls it.
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}

# Every edge of a tile, of its parts and of a panel; then what has none of them in common.
EDGES = list(product((1, 4, 5, 8, 9), (1, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64, 65)))
EDGES = [(m, n, k) for (m, n), k in zip(EDGES, cycle((1, 2, 3, 9, 64)))]
RANDOM = [tuple(int(size) for size in sizes) for sizes in np.random.default_rng(0).integers(1, 301, (12, 3))]
CHAINS = [(3, 35, 255), (13, 50, 256), (9, 19, 257), (8, 32, 512), (21, 37, 600)]
LONG = [(300, 297, 299), (1, 300, 1), (300, 1, 9)]
SIZES = [*EDGES, *RANDOM, *CHAINS, *LONG]


class Placed:
    """Values somewhere in a buffer that holds something else around and between them."""

    def __init__(self, values, strides, around, fill):
        self.values, self.strides, self.around = values, strides, around
        elements = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True))
        self.buffer = np.full(around + elements + around, fill, values.dtype)
        self.within(self.buffer)[...] = values

    def within(self, buffer):
        strides = [stride * buffer.itemsize for stride in self.strides]
        return as_strided(buffer[self.around :], self.values.shape, strides)

    def taken(self, buffer, what):
        """The values of a buffer that a function has written to; fails where anything else in it has changed."""
        restored = buffer.copy()
        self.within(restored)[...] = self.values
        changed = np.flatnonzero(bits(restored) != bits(self.buffer)) - self.around
        assert changed.size == 0, f"{what}: written beyond its values, at {changed[:10]} of {self.strides}"
        return self.within(buffer).copy()


@dataclass
class Call:
    function: str
    sizes: tuple[int, int, int]  # rows, columns, depth
    a: Placed
    b: Placed
    c: Placed
    add: bool = False
    ahead: int = 0

    def encoded(self):
        numbers = [FUNCTIONS.index(self.function), *self.sizes, self.add, self.ahead]
        for placed in (self.a, self.b, self.c):
            numbers += [placed.around, placed.buffer.size, placed.strides[0]]
        arrays = [placed.buffer.tobytes() for placed in (self.a, self.b, self.c)]
        return b"".join([np.array(numbers, np.int64).tobytes(), *arrays])

    def __str__(self):
        strides = [placed.strides[0] for placed in (self.a, self.b, self.c)]
        return f"{self.function} {self.sizes}, {strides} apart, add={self.add}, ahead={self.ahead}"


def bits(values):
    return np.ascontiguousarray(values).view(np.uint32 if values.itemsize == 4 else np.uint64)


@dataclass
class Driver:
    path: Path
    build: str

    def run(self, calls):
        """Per call and variant the number of the call, what it is, in words, and what it has made."""
        dtype = calls[0].a.buffer.dtype
        data = b"".join([np.int64(dtype.itemsize).tobytes(), *(call.encoded() for call in calls)])
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        done = subprocess.run([self.path], input=data, capture_output=True, check=False, env=environment)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr.decode(errors='replace')}"
        names, _, results = done.stdout.partition(b"\n")
        at = 0
        for number, call in enumerate(calls):
            for name in names.decode().split():
                c = np.frombuffer(results, dtype, call.c.buffer.size, at)
                at += c.nbytes
                what = f"{name} of {self.build}, {dtype}: {call}"
                yield number, what, call.c.taken(c, what)
        assert at == len(results)

    def variants(self):
        done = subprocess.run([self.path], input=np.int64(4).tobytes(), capture_output=True, check=True)
        return done.stdout.decode().split()

    def around(self, wanted):
        """With sanitizers a buffer ends where its values do, so that they see each step beyond.

        Without them it is wide enough for a panel, so that such a step changes a guard and not another buffer.
        """
        return 0 if self.build == "sanitizers" else 64 + wanted


@pytest.fixture(scope="module", params=BUILDS)
def driver(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("gemm") / "gemm"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    flags = ["-std=c++17", f"-I{ROOT / 'csrc'}", *BUILDS[request.param]]
    done = subprocess.run(
        [*compiler, *flags, "-o", path, ROOT / "tests" / "gemm.cpp"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return Driver(path, request.param)


@pytest.fixture(params=[np.float32, np.float64], ids=["float", "double"])
def dtype(request):
    return np.dtype(request.param)


def blocks(matrix, width):
    """[k, n] as [ceil(n / width), k, width], zero beyond n."""
    k, n = matrix.shape
    count = -(-n // width)
    wide = np.zeros((k, count * width), matrix.dtype)
    wide[:, :n] = matrix
    return np.ascontiguousarray(wide.reshape(k, count, width).transpose(1, 0, 2))


def multiplication(function, a, b, before, driver, gaps=(0, 0, 0), around=0, ahead=0):
    """A call for a [m, k] b [k, n]; it adds to what was there before, if there was anything."""
    (m, k), n = a.shape, b.shape[1]
    width = PANEL_BYTES // a.itemsize
    panels = blocks(b, width)
    if function == "multiply":
        first, panel_stride = Placed(a, (k + gaps[0], 1), driver.around(around), np.nan), k * width
    else:
        strips, panel_stride = blocks(np.ascontiguousarray(a.T), TILE_ROWS), k * width + gaps[1]
        first = Placed(strips, (k * TILE_ROWS + gaps[0], TILE_ROWS, 1), driver.around(around), np.nan)
    second = Placed(panels, (panel_stride, width, 1), driver.around(around), np.nan)
    # What is not added to may hold anything.
    c = np.full((m, n), np.nan, a.dtype) if before is None else before
    placed = Placed(c, (n + gaps[2], 1), driver.around(around), GUARD)
    return Call(function, (m, n, k), first, second, placed, before is not None, ahead)


def moved(function, matrix, driver, gap_from=0, gap_to=0, around=0):
    rows, columns = matrix.shape
    if function == "transpose":
        shape, strides = (columns, rows), (rows + gap_to, 1)
    else:
        width = PANEL_BYTES // matrix.itemsize if function == "pack_panels" else TILE_ROWS
        shape, strides = (-(-columns // width), rows, width), (rows * width + gap_to, width, 1)
    first = Placed(matrix, (columns + gap_from, 1), driver.around(around), np.nan)
    to = Placed(np.full(shape, np.nan, matrix.dtype), strides, driver.around(around), GUARD)
    return Call(function, (rows, columns, 1), first, Placed(np.zeros(1, matrix.dtype), (1,), 0, 0), to)


def factors(random, sizes, dtype):
    m, n, k = sizes
    return tuple(random.standard_normal(shape).astype(dtype) for shape in ((m, k), (k, n), (m, n)))


def bound(k, magnitude, dtype):
    """Each product goes through its own rounding, the sums of its chain, those of the chains and the last one.

    Higham, Accuracy and Stability of Numerical Algorithms, section 3.1. The truth is rounded as well.
    """
    n = 1 + min(k, CHAIN) + -(-k // CHAIN)
    u, u64 = np.finfo(dtype).eps / 2, np.finfo(np.float64).eps / 2
    return (n * u / (1 - n * u) + (k + 1) * u64) * magnitude


def test_every_variant_that_the_processor_has_is_run(driver):
    expected = ["chosen", "usual"]
    flags = set()
    if sys.platform == "linux" and platform.machine() == "x86_64":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next(line for line in lines if line.startswith("flags")).split())
    if driver.build != "no clones" and has_clones():
        expected += [name for name, needed in (("v3", V3), ("v4", V4)) if needed <= flags]
    assert driver.variants() == expected


def has_clones():
    """Where csrc/cpu/common/clones.h has them."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    macros = subprocess.run(
        [*compiler, "-dM", "-E", "-x", "c++", "-include", "cstdlib", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    values = dict(line.split(maxsplit=2)[1:] for line in macros.splitlines() if len(line.split()) > 2)
    names = {"__x86_64__", "__linux__", "__GLIBC__"}
    return names <= set(values) and "__clang__" not in values and int(values["__GNUC__"]) >= 12


@pytest.mark.parametrize("add", [False, True], ids=["set", "add"])
@pytest.mark.parametrize("function", PRODUCTS)
def test_products_are_those_of_fp64(driver, dtype, function, add):
    random = np.random.default_rng(1)
    calls, truths = [], []
    for number, sizes in enumerate(SIZES):
        a, b, c = factors(random, sizes, dtype)
        gaps = (random.integers(0, 70, 3) * (number % 3 > 0)).tolist()
        ahead = int(random.integers(1, a.nbytes + 1)) * (number % 2)
        calls.append(multiplication(function, a, b, c if add else None, driver, gaps, number % 5, ahead))
        a, b, c = (x.astype(np.float64) for x in (a, b, c if add else np.zeros_like(c)))
        truths.append((a @ b + c, bound(sizes[2], np.abs(a) @ np.abs(b) + np.abs(c), dtype)))
    for number, what, made in driver.run(calls):
        truth, allowed = truths[number]
        assert (np.abs(made - truth) <= allowed).all(), f"{what}: off by {np.abs(made - truth).max()}"


@pytest.mark.parametrize("function", PRODUCTS)
def test_long_sums_are_made_of_short_chains(driver, dtype, function):
    k, small = 4 * CHAIN, np.finfo(dtype).eps / 4
    # Added one by one to 1, every one of them would be lost.
    a, b = np.full((9, k), small, dtype), np.ones((k, 35), dtype)
    a[:, 0] = 1
    for _, what, made in driver.run([multiplication(function, a, b, None, driver)]):
        assert (np.abs((made - 1) - (k - 1) * small) <= bound(k, 1 + k * small, dtype)).all(), what
        assert (made > 1).all(), what


@pytest.mark.parametrize("function", PRODUCTS)
def test_products_repeat_bit_for_bit_wherever_the_matrices_lie(driver, dtype, function):
    random = np.random.default_rng(2)
    calls = []
    for sizes in [(1, 1, 1), (7, 33, 20), (9, 47, 300), (30, 64, 257), (45, 50, 130)]:
        a, b, c = factors(random, sizes, dtype)
        for before in (None, c):
            places = [((0, 0, 0), 0, 0), ((1, 3, 1), 1, 64), ((13, 64, 31), 2, 100), ((64, 5, 128), 16, a.nbytes)]
            calls += [multiplication(function, a, b, before, driver, *place) for place in places]
    first = {}
    for number, what, made in driver.run(calls):
        key = (what.partition(" ")[0], calls[number].sizes, calls[number].add)
        assert np.array_equal(bits(made), bits(first.setdefault(key, made))), what
    assert len(first) == 10 * len(driver.variants())


@pytest.mark.parametrize("function", PRODUCTS)
def test_the_chosen_variant_is_the_best(driver, dtype, function):
    a, b, _ = factors(np.random.default_rng(3), (45, 50, 300), dtype)
    made = [made for _, _, made in driver.run([multiplication(function, a, b, None, driver)])]
    assert np.array_equal(bits(made[0]), bits(made[-1]))


@pytest.mark.parametrize("function", ["pack_panels", "pack_strips", "transpose"])
def test_elements_are_moved_as_they_are(driver, dtype, function):
    random = np.random.default_rng(4)
    shapes = [(rows, columns) for rows in (1, 7, 8, 9, 16, 17, 33) for columns in (1, 7, 8, 9, 15, 16, 17, 32, 33, 65)]
    calls = []
    for number, shape in enumerate([*shapes, *(sizes[:2] for sizes in RANDOM), (300, 299)]):
        gaps = (random.integers(0, 70, 2) * (number % 3 > 0)).tolist()
        matrix = random.standard_normal(shape).astype(dtype)
        calls.append(moved(function, matrix, driver, *gaps, around=number % 5))
    width = PANEL_BYTES // dtype.itemsize if function == "pack_panels" else TILE_ROWS
    for number, what, made in driver.run(calls):
        matrix = calls[number].a.values
        expected = matrix.T if function == "transpose" else blocks(matrix, width)
        assert np.array_equal(bits(made), bits(expected)), what
