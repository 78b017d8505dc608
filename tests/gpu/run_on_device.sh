#!/usr/bin/env bash
# Builds the engine, checks the GPU lane and times it, on a machine with a CUDA GPU, PyTorch for it,
# CMake, Ninja, pytest, hypothesis and a C++ compiler. Needs neither vLLM nor a network.
#   tests/gpu/run_on_device.sh [FOLDER]   logs go to FOLDER, by default $OUT or build/gpu
# Exit status 1 if a check failed; the tables come last all the same.
set -uo pipefail
cd "$(dirname "$0")/../.."
logs=${1:-${OUT:-build/gpu}}
mkdir -p "$logs"
failed=()

check() { # NAME COMMAND...: its output in a log, its last line here
  local name=$1 start=$SECONDS
  shift
  if "$@" >"$logs/$name.log" 2>&1; then
    echo "passed  $name ($((SECONDS - start)) s): $(tail -1 "$logs/$name.log")"
  else
    failed+=("$name")
    echo "FAILED  $name ($((SECONDS - start)) s):"
    tail -40 "$logs/$name.log"
  fi
}

machine() {
  lscpu
  echo "NUMA nodes of GPUs: $(cat /sys/bus/pci/drivers/nvidia/*/numa_node 2>/dev/null | tr '\n' ' ')"
  grep -E 'MemTotal|HugePages_Total' /proc/meminfo
  nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max \
    --format=csv
  python3 -c 'import torch; print("PyTorch", torch.__version__)'
}

pytest() { python3 -m pytest -q --confcutdir=tests/gpu -p no:cacheprovider "$@"; }

sanitizer() { # one small pass of every path; compute-sanitizer slows kernels down a hundredfold
  compute-sanitizer --error-exitcode 1 --tool "$1" \
    python3 -m pytest -q --confcutdir=tests/gpu -p no:cacheprovider tests/gpu/test_lane.py \
    -k 'cuda and (streamed_against_float32 or many_layers)'
}

check machine machine
check build python3 -m build_tools.engine
check lane pytest tests/gpu
check engine pytest tests/test_moe_layer.py -k 'not odd' -x
if command -v compute-sanitizer >/dev/null; then
  check memcheck sanitizer memcheck
  check racecheck sanitizer racecheck
fi
check engine-speed python3 -m benchmarks.moe_block --format bf16,int8,int4 --tokens 1,16,512
check lane-speed python3 -m benchmarks.gpu_lane

grep -E 'Model name|^CPU\(s\)|NUMA node\(s\)|Socket' "$logs/machine.log"
grep -oE 'avx512_bf16|avx512_vnni|avx512_fp16|amx_bf16|amx_int8|amx_tile' "$logs/machine.log" | sort -u | tr '\n' ' '
echo
cat "$logs/engine-speed.log" | tail -30
cat "$logs/lane-speed.log"
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
