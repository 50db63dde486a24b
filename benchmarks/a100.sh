#!/usr/bin/env bash
# Everything the A100 rows need, in one go: benchmarks/a100.sh --help
set -euo pipefail
started_in=$PWD
cd "$(dirname "$0")/.."

usage() {
  cat <<'TEXT'
Usage: benchmarks/a100.sh [--out DIR] [--minutes N] [--any_gpu] [--dry_run]

Builds for the A100 in this machine, runs the GPU lane and every benchmark, and leaves the records in DIR with
a page about them, DIR/report.html. About five hours. Run it again with the same DIR after a kill: what was
finished is not repeated, the lane and the sweeps of bench generate go on in the middle. Another commit or
card needs another DIR.

  --out DIR      folder for records, logs and marks [a100_out in the checkout]
  --minutes N    of the GPU lane [40]
  --any_gpu      go on where the GPU is no A100; the records name the card they were measured on
  --dry_run      print the commands and run none
  -h, --help     this text

PYTHON names the interpreter [python3]. Peers that are not installed are named in the records as not
compared. For a full comparison, first (without the torch that they would bring; see dqkernels bench peers):
  pip install --no-deps gemlite humming-kernels bitblas ctranslate2 bitsandbytes torchao
TEXT
}

fail() {
  echo "a100.sh: $*" >&2
  exit 2
}

out=a100_out minutes=40 any_gpu=no dry_run=no python=${PYTHON:-python3}
while [ $# -gt 0 ]; do
  case "$1" in
    --out | --minutes) [ $# -gt 1 ] || fail "$1 needs a value" ;;&
    --out) out=$2 && shift 2 ;;
    --minutes) minutes=$2 && shift 2 ;;
    --any_gpu | --any-gpu) any_gpu=yes && shift ;;
    --dry_run | --dry-run) dry_run=yes && shift ;;
    -h | --help) usage && exit 0 ;;
    *) fail "no such option: $1; --help lists them" ;;
  esac
done
[[ $out = /* || $out = a100_out ]] || out=$started_in/$out
[[ $minutes =~ ^[1-9][0-9]*$ ]] || fail "--minutes must be a whole number above 0, got $minutes"

# ---- the card: asked by torch, which everything below needs anyway ----------------------------------------

gpu_name() {
  "$python" -c 'import torch; print(torch.cuda.get_device_name(0) if torch.cuda.is_available() else "")'
}

card=a100-80-sxm
if [ "$dry_run" = no ]; then
  gpu=$(gpu_name) || fail "$python has no torch that imports: pip install 'torch>=2.11,<2.14' for this driver's CUDA"
  [ -n "$gpu" ] || fail "torch sees no GPU here (torch.cuda.is_available() is False): nothing was run"
  case "$gpu" in
    *A100*40GB*) card=a100-40 ;;
    *"A100 80GB PCIe"*) card=a100-80-pcie ;;
    *A100*80GB*) ;;
    *) [ "$any_gpu" = yes ] || fail "the GPU is $gpu, no A100: nothing was run. --any_gpu measures it all the same" ;;
  esac
  mkdir -p "$out/done"
  begun="$(git rev-parse HEAD 2>/dev/null || echo no commit), $gpu"
  [ -e "$out/done/begun" ] || echo "$begun" >"$out/done/begun"
  [ "$(cat "$out/done/begun")" = "$begun" ] || fail "$out was begun with $(cat "$out/done/begun"), this is $begun: take another --out"
  echo "GPU: $gpu; records in $out"
  trap 'echo "a100.sh: stopped; run it again with --out $out to go on" >&2; exit 130' INT TERM
fi

# ---- steps: a mark in DIR/done says that one was finished --------------------------------------------------

failed=() records=() ran=no
step() { # step NAME COMMAND...: stdout and stderr go to DIR/NAME.log too
  local name=$1
  shift
  if [ "$dry_run" = yes ]; then
    printf '%q ' "$@"
    echo
    return
  fi
  if [ -e "$out/done/$name" ]; then
    echo "== $name: finished earlier"
    return
  fi
  echo "== $name: $*"
  ran=yes
  if "$@" 2>&1 | tee "$out/$name.log"; then
    touch "$out/done/$name"
  else
    failed+=("$name")
    echo "-- $name failed; $out/$name.log says why. The others go on" >&2
  fi
}

bench() { # bench NAME ARGUMENTS...: a record DIR/NAME-a100.json
  local name=$1
  shift
  records+=("$out/$name-a100.json")
  step "$name" "$python" -m dqkernels bench "$@" --out "$out/$name-a100.json"
}

if [ "$any_gpu" = no ]; then
  step build env DQKERNELS_BUILD=cuda DQKERNELS_CUDA_ARCHS=80 "$python" -m pip install -e '.[test,bench]'
else
  step build env DQKERNELS_BUILD=cuda "$python" -m pip install -e '.[test,bench]'
fi
# Without a build nothing below measures what it says.
[ ${#failed[@]} -eq 0 ] || exit 1
step info "$python" -m dqkernels info
step lane "$python" benchmarks/gpu_lane.py --minutes "$minutes" --out "$out/lane" --require_gpu
bench gemm gemm --seconds 900 --overwrite
bench linear linear --seconds 300 --overwrite
bench gemm-bf16 gemm --dtype bfloat16 --group_sizes -1 --seconds 600 --overwrite
bench gemm-grouped gemm --shapes 8192x8192,1024x1024,4096x1024,1024x4096 --tokens 1,16,64 --bits 4,2 \
  --group_sizes 64,128,32 --seconds 600 --overwrite
bench gemm-llama gemm --shapes llama-7b-linear --group_sizes -1,128 --seconds 600 --overwrite
bench kernels kernels --seconds 300 --overwrite
# In order of worth: the goals' model, its shallower forms, its memory, then the other shapes.
bench generate generate bart-large --seconds 1800 --resume
bench generate-layers generate bart-large --sweep layers --bits 4,2 --seconds 900 --resume
bench generate-memory generate bart-large --sweep memory --bits 4 --process_memory --seconds 1200 --resume
bench generate-base generate bart-base --seconds 900 --resume
bench generate-mbart generate mbart-large --bits 4 --batch_size 1,16 --num_beams 1,4 --seconds 900 --resume
# T5 has no biases and its own attention bias: another path through the decode loop.
bench generate-t5 generate t5-base --seconds 900 --resume
bench train-step train --device cuda --seconds 300 --overwrite
# What the bits cost and how large the files are: the same on every card, and quick.
bench quality quality --device cuda --pairs 1258 --resume
bench size size --overwrite
bench size-large size --shape bart-large --overwrite
# Last, so that every figure above is by rule: a table for this card, to be used and contributed.
step tune "$python" -m dqkernels tune bart-large --out "$out/tiles-a100.json"
# The page is drawn again where anything above was, of the records that there are.
if [ "$dry_run" = no ]; then
  [ "$ran" = no ] || rm -f "$out/done/report"
  there=()
  for file in "${records[@]}"; do [ ! -e "$file" ] || there+=("$file"); done
  records=("${there[@]}")
fi
[ ${#records[@]} -eq 0 ] || step report "$python" -m dqkernels plot --html "$out/report.html" "${records[@]}"
# Not measured, and never in one table or page with what is: what the datasheet of this card allows.
records=()
bench projected projected --card "$card" --overwrite

[ "$dry_run" = no ] || exit 0
echo
echo "Measured on $gpu. To commit (README and docs quote only what stands there):"
for file in "$out"/*-a100.json "$out/lane/gpu_lane.json"; do
  case "$file" in
    *projected-a100.json) continue ;;
    */tiles-a100.json) target="dqkernels/kernels/tables/$(basename "$file")" ;;
    */gpu_lane.json) target=benchmarks/results/gpu-lane-a100.json ;;
    *) target="benchmarks/results/$(basename "$file")" ;;
  esac
  [ ! -e "$file" ] || echo "  cp $file $target"
done
if [ ${#failed[@]} -gt 0 ]; then
  echo "failed: ${failed[*]}; run it again to repeat these alone" >&2
  exit 1
fi
