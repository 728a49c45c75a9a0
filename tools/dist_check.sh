#!/usr/bin/env bash
# Builds the source distribution, installs the package from it into an empty folder and runs an op there. Takes the bin
# folder of an environment that holds the requirements of the build. The CUDA extension is left out to save its time.
set -euo pipefail
bin=$1
cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
export PATH="$bin:$PATH" TRANSKD_FAST_CUDA=0 # torch looks for ninja on PATH
unset PYTHONPATH

mkdir "$tmp/egg" "$tmp/source" "$tmp/elsewhere"
# An egg base of its own, because setuptools takes along whatever an older *.egg-info in the tree names.
PYTHONPATH=tools "$bin/python" >"$tmp/log" 2>&1 - "$tmp" <<'END' || { cat "$tmp/log" >&2; exit 1; }
import sys

import transkd_build

transkd_build.build_sdist(sys.argv[1], {"--global-option": ["egg_info", f"--egg-base={sys.argv[1]}/egg"]})
END
tar -xzf "$tmp"/transkd_fast-*.tar.gz -C "$tmp/source" --strip-components=1
"$bin/python" -m pip install --quiet --no-deps --no-build-isolation --target "$tmp/site" "$tmp/source"

cd "$tmp/elsewhere"
PYTHONPATH="$tmp/site" "$bin/python" - "$tmp/site" <<'END'
import sys

import torch

import transkd_fast as tf
from transkd_fast import kernels

for module in (tf, kernels):
    assert module.__file__.startswith(sys.argv[1] + "/"), f"expected an import from {sys.argv[1]}, got {module.__file__}"
state = tf.build_info()["extensions"]["_C"]
assert state["loaded"], state["reason"]
student, teacher = torch.rand(2, 3, 8, 8, requires_grad=True), torch.rand(2, 3, 8, 8)
with tf.count_runs() as runs:
    loss = tf.functional.hcl_loss([student], [teacher], backend="cpu")
loss.backward()
assert runs == {("hcl", "cpu"): 1}, runs
torch.testing.assert_close(loss, tf.functional.hcl_loss([student], [teacher], backend="eager"))
print(f"dist-check: transkd_fast {tf.__version__} installed from its source distribution runs hcl on cpu")
END
