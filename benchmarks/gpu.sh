#!/usr/bin/env bash
# Build, tests and benchmarks on a machine with a GPU, with what its Python has installed and no network, in under
# nine minutes: what is left of them when the tests have passed goes to the benchmarks.
# Results go to RESULTS (benchmarks/results); PYTHON names the interpreter (3.11 or newer), COMMIT what is run
# where git cannot say.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results}
commit=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
site=build/gpu
seconds=520
left() { echo $((seconds - SECONDS > 1 ? seconds - SECONDS : 1)); }

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
echo "built after $SECONDS s"
workers=$("$python" -c "import xdist" 2>/dev/null && echo "-n 8" || true)
# shellcheck disable=SC2086 # two words, or none
timeout "$(left)" "$python" -P -m pytest tests/ops tests/data tests/test_adam.py \
  tests/test_recorded.py tests/test_search.py tests/test_reproduce.py tests/test_cost.py -m gpu $workers
echo "tested after $SECONDS s"

# Both orders of one small problem, every allocation its own so that the tool sees beyond which it goes.
found=9
for tool in memcheck racecheck; do
  command -v compute-sanitizer >/dev/null || break
  code=0
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 75 compute-sanitizer --tool "$tool" --error-exitcode $found \
    "$python" -P -m pytest tests/ops/test_soft_embedding.py -k "cuda and both_orders and 129 and float32" || code=$?
  if [ $code -eq $found ]; then
    echo "$tool found errors" >&2
    exit 1
  fi
  [ $code -eq 0 ] || echo "$tool cannot run here, or not in 75 s (exit code $code)"
done
echo "checked after $SECONDS s"

timeout "$(left)" "$python" -P -m pytest benchmarks/test_outer_step.py -k on_a_gpu --benchmark-enable \
  --benchmark-quiet --benchmark-json "$results/outer-step-gpu-$commit.json" || [ $? -eq 124 ]
echo "outer steps measured after $SECONDS s"

# An interrupt lets pytest-benchmark write what it has measured so far.
code=0
timeout --signal=INT --kill-after=15 "$(left)" "$python" -P -m pytest benchmarks/test_soft_embedding.py \
  benchmarks/test_item_cross_entropy.py benchmarks/test_target_rank.py --sizes acceptance --benchmark-enable --benchmark-quiet \
  --benchmark-json "$results/ops-gpu-$commit.json" || code=$?
[ $code -eq 124 ] && echo "benchmarks cut short after $SECONDS s" && code=0
exit $code
