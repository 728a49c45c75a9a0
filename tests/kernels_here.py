"""Which kernels of an op the tests of this machine run, on which device, and how many cases each of them can afford."""

from transkd_fast import backends


def kernels_of(op):
    """The backends with a kernel of the op that can run here; Triton's are interpreted where there is no GPU."""
    return [backend for backend in backends.BACKENDS[1:] if backends.why_not(op, backend) is None]


def interpreted(backend):
    return backend == "triton" and backends.interpreting_triton()


def device_of(backend):
    return "cuda" if backend in ("triton", "cuda") and not interpreted(backend) else "cpu"


def affordable(backend):
    """A field of `op_description.Cases`: the interpreter takes a second per call, the compiler part of one per case."""
    if interpreted(backend):
        return "few"
    return "some" if backend == "triton" else "every"
