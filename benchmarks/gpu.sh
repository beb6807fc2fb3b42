#!/usr/bin/env bash
# Build, tests and benchmarks on a machine with a GPU, with what its Python has installed and no network.
# Results go to RESULTS (benchmarks/results); PYTHON names the interpreter (3.11 or newer).
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
site=build/gpu
commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)

"$python" -m pip install --no-index --no-deps --no-build-isolation --upgrade --target "$site" .
mkdir -p "$results"
export PYTHONPATH=$PWD/$site

# -P keeps the working directory, which has no kernels in it, off the import path.
"$python" -P - <<'PYTHON'
import torch
from td3_fast import ops

assert torch.cuda.is_available(), "no GPU"
assert ops.has_fused("cuda"), "built without CUDA kernels"
print(torch.cuda.get_device_name(), ops.build_facts())
PYTHON
"$python" -P -m pytest tests/ops
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -P -m pytest tests/ops/test_soft_embedding.py \
      -k "cuda and both_orders and float32" ||
      echo "$tool found errors, or cannot run here"
  done
fi
"$python" -P -m pytest benchmarks/test_soft_embedding.py benchmarks/test_item_cross_entropy.py \
  benchmarks/test_target_rank.py --sizes acceptance --benchmark-enable --benchmark-quiet \
  --benchmark-json "$results/ops-gpu-$commit.json"
