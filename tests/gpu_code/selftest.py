from gpu_code.declare import Cuda, Op

OP = Op("selftest", cuda=(Cuda("selftest_kernel"),))
