#!/usr/bin/env bash
# Everything that results/side_by_side.md says, measured anew on a CPU (about 35 minutes on two quiet cores):
#
#     LORA_TUNE_PEERS=FOLDER benchmarks/cpu.sh [--data FILE --tokenizer FOLDER]
#
# FILE is an alpaca file, FOLDER a tokenizer of the Qwen2.5 family; without them the data path is left as it was.
# Results are kept in benchmarks/results/, the tables in benchmarks/results/side_by_side.md.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD" HF_HUB_OFFLINE=1
unset OMP_NUM_THREADS MKL_NUM_THREADS
$PYTHON -m benchmarks.step --method lora --write
$PYTHON -m benchmarks.step --method qlora --write
for method in lora qlora; do
    $PYTHON -m benchmarks.step --method $method --against raw,floor,unfused --threads 1 --rounds 21 \
        --json benchmarks/results/floor_small_$method.json
done
$PYTHON -m benchmarks.memory --write
$PYTHON -m benchmarks.memory --batch 1 --length 4096 --json benchmarks/results/memory_small_one_row.json
$PYTHON -m benchmarks.recompute --json benchmarks/results/recompute.json
$PYTHON -m benchmarks.start --runs 5 --write || true # 1 where a bound is missed: the table says it
if [ $# -gt 0 ]; then
    $PYTHON -m benchmarks.data "$@" --write
    $PYTHON -m benchmarks.tokens "$@" --write
fi
$PYTHON -m benchmarks.table --write
