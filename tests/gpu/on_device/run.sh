#!/usr/bin/env bash
# Builds the engine, tests GPU offload and times it. The machine needs a CUDA GPU, PyTorch for CUDA,
# CMake, Ninja, pytest, hypothesis, rich, typer and a C++ compiler, but neither a network nor vLLM.
# If vLLM is installed, whole models run, too.
#   tests/gpu/on_device/run.sh [FOLDER [STEP...]]
# Logs go to FOLDER, which is $OUT or build/gpu by default. All steps run unless some are named:
# machine packages build offload engine memcheck racecheck engine-speed offload-speed serving
# The exit status is 1 if a step failed. The tables are printed at the end in any case.
set -uo pipefail
cd "$(dirname "$0")/../../.."
logs=${1:-${OUT:-build/gpu}}
mkdir -p "$logs"
steps=("${@:2}")
failed=()

step() { # NAME SECONDS COMMAND...: runs a command with its output in a log, and prints the last line
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  [ ${#steps[@]} -eq 0 ] || [[ " ${steps[*]} " == *" $name "* ]] || return 0
  if timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1; then
    echo "passed  $name ($((SECONDS - start)) s): $(tail -1 "$logs/$name.log")"
  else
    local code=$?
    failed+=("$name")
    echo "FAILED  $name ($((SECONDS - start)) s, status $code; 124 is its limit of $limit s):"
    tail -40 "$logs/$name.log"
  fi
}

leave_out() { # NAME WHY
  [ ${#steps[@]} -eq 0 ] || [[ " ${steps[*]} " == *" $1 "* ]] || return 0
  echo "left out  $1: $2"
}

machine() {
  lscpu
  echo "NUMA nodes of GPUs: $(cat /sys/bus/pci/drivers/nvidia/*/numa_node 2>/dev/null | tr '\n' ' ')"
  grep -E 'MemTotal|HugePages_Total' /proc/meminfo
  echo "locked memory: $(ulimit -l)"
  nvidia-smi --query-gpu=name,memory.total,driver_version,pcie.link.gen.max,pcie.link.width.max \
    --format=csv
  python3 -c 'import torch; print("PyTorch", torch.__version__, torch.cuda.get_device_name())'
}

packages() { # prints a line for each package that is missing
  local missing=0 tool
  for tool in cmake ninja "${CXX:-g++}"; do
    command -v "$tool" || { echo "missing: $tool" && missing=1; }
  done
  python3 - <<'PYTHON' || missing=1
import importlib
missing = []
for name in "torch triton numpy pytest hypothesis rich typer".split():
    try:
        module = importlib.import_module(name)
        print(name, getattr(module, "__version__", ""))
    except ImportError as error:
        missing.append(f"missing: {name} ({error})")
print("\n".join(missing or ["all packages are there"]))
raise SystemExit(bool(missing))
PYTHON
  return $missing
}
export -f machine packages

pytest=(python3 -m pytest -q --confcutdir=tests/gpu/on_device -p no:cacheprovider)
# compute-sanitizer slows kernels down a hundredfold, so it gets one small pass of every path.
small=("${pytest[@]}" tests/gpu/on_device/test_offload.py -k 'cuda and (streamed_against_float32 or many_layers)')

step machine 60 bash -c machine
step packages 120 bash -c packages
step build 900 python3 -m build_tools.engine
step offload 600 "${pytest[@]}" tests/gpu/on_device
step engine 600 "${pytest[@]}" tests/engine/test_expert_layer.py tests/engine/test_tiles.py -x
for tool in memcheck racecheck; do
  if command -v compute-sanitizer >/dev/null; then
    step $tool 900 compute-sanitizer --error-exitcode 1 --tool $tool "${small[@]}"
  else
    leave_out $tool "there is no compute-sanitizer"
  fi
done
step engine-speed 600 python3 -m benchmarks.moe_block --format bf16,int8,int4 --tokens 1,16,512
step offload-speed 900 python3 -m benchmarks.gpu_offload --trace "$logs/trace.json"
if python3 -c 'import vllm' 2>/dev/null; then
  step serving 7200 python3 -m benchmarks.gpu_serving --json "$logs/serving.json"
else
  leave_out serving "there is no vLLM"
fi

for log in machine engine-speed offload-speed serving; do
  [ -f "$logs/$log.log" ] || continue
  echo
  case $log in
    machine)
      grep -E 'Model name|^CPU\(s\)|NUMA node\(s\)|Socket' "$logs/$log.log"
      grep -oE 'avx512_bf16|avx512_vnni|avx512_fp16|amx_bf16|amx_int8|amx_tile' "$logs/$log.log" |
        sort -u | tr '\n' ' '
      echo
      ;;
    serving) sed -n '/layers, experts of/,$p' "$logs/$log.log" ;;
    *) tail -60 "$logs/$log.log" ;;
  esac
done
echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
