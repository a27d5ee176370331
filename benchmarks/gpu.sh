#!/usr/bin/env bash
# Everything that only a card can tell, in the order of its worth, within 25 minutes on one card:
#
#     benchmarks/gpu.sh [--again] [--list] [--dry] [--minutes 25] [--out FOLDER] [PART ...]
#
# Each part leaves its results as soon as it is done (benchmarks/results/gpu/NAME.json, and what it said in NAME.log); a
# part whose results are there is not made again unless --again is given, so that an interrupted run goes on. A part has
# a time limit, and none starts that has less than a minute left. Nothing is downloaded. Libraries may lie in a folder
# on PYTHONPATH (`pip install --target`); peers in LORA_TUNE_PEERS/TOOL, an environment or such a folder; what is not
# there is left out with a line. --list prints the parts, --dry makes them in small, on a CPU as well.
# Afterwards: python -m benchmarks.gpu_table --write
set -uf  # words with brackets are overrides of a recipe, no patterns of files
cd "$(dirname "$0")/.." || exit 2
PYTHON=${PYTHON:-python3}
OUT=benchmarks/results/gpu
MINUTES=25
AGAIN=no LIST=no DRY=no
CHOSEN=()
while [ $# -gt 0 ]; do
    case $1 in
        --again) AGAIN=yes ;;
        --list) LIST=yes ;;
        --dry) DRY=yes ;;
        --minutes) MINUTES=$2; shift ;;
        --out) OUT=$2; shift ;;
        -*) sed -n '2,13p' "$0" >&2; exit 2 ;;
        *) CHOSEN+=("$1") ;;
    esac
    shift
done

export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1 UNSLOTH_DISABLE_STATISTICS=1 TOKENIZERS_PARALLELISM=false
export PYTORCH_ALLOC_CONF=expandable_segments:True PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

# A card of less than 60 GiB cannot keep 8,192 tokens of an 8B: every side computes its layers again.
GIB=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
RECOMPUTE=none
[ "${GIB:-81920}" -lt 61440 ] && RECOMPUTE=all
SHAPE=8b WHOLE=llama-8b SHORT="--batch 4 --length 2048" LONG="--batch 1 --length 8192" ROUNDS=7 SIZES=8,12,16,24 STEPS=10
PEERS_ASKED=unsloth,trl,raw,llamafactory OURS=masked,unfused,compiled LENGTH=2048
if [ $DRY = yes ]; then
    SHAPE=tiny WHOLE=tiny SHORT="--batch 2 --length 32" LONG="--batch 1 --length 64" ROUNDS=1 SIZES=8 STEPS=1
    PEERS_ASKED=raw OURS=masked LENGTH=128
    [ "$OUT" = benchmarks/results/gpu ] && OUT=$(mktemp -d)
fi
WORK=${LORA_TUNE_BENCH:-${TMPDIR:-/tmp}/lora_tune-gpu}   # the random base, 16 GB, is made once
WEIGHTS="--weights $WORK/base-$SHAPE"
[ $DRY = yes ] && WEIGHTS=
STEP="-m benchmarks.step --shape $SHAPE --threads 1 --rounds $ROUNDS --base $WORK/base-$SHAPE --seconds {s}"

# name | seconds at most | command; {} is the results file, {s} the seconds after which a step says what it has
parts() {
    cat <<PARTS
versions|120|$PYTHON -m benchmarks.gpu_table --machine {}
kernels|240|$PYTHON -m benchmarks.gpu_table --tests {}
step_4x2048_qlora|600|$PYTHON $STEP --method qlora $SHORT --recompute $RECOMPUTE --against $PEERS_ASKED --json {}
step_1x8192_qlora|480|$PYTHON $STEP --method qlora $LONG --recompute $RECOMPUTE --against $PEERS_ASKED --json {}
context|540|$PYTHON -m benchmarks.context --shape $SHAPE --gib $SIZES --base $WORK/base-$SHAPE --json {}
step_4x2048_ours|300|$PYTHON $STEP --method qlora $SHORT --recompute $RECOMPUTE --against $OURS,raw --json {}
run|300|$PYTHON -m benchmarks.shaped_run --shape $WHOLE $WEIGHTS --steps $STEPS --keep {} train.max_length=$LENGTH eval.metrics=[loss] eval.samples=0
step_4x2048_lora|420|$PYTHON $STEP --method lora $SHORT --recompute $RECOMPUTE --against $PEERS_ASKED --json {}
step_1x8192_ours|300|$PYTHON $STEP --method qlora $LONG --recompute $RECOMPUTE --against $OURS,raw --json {}
PARTS
}

wanted() {
    [ ${#CHOSEN[@]} -eq 0 ] && return 0
    for name in "${CHOSEN[@]}"; do [ "$name" = "$1" ] && return 0; done
    return 1
}

if [ $LIST = yes ]; then
    parts
    exit 0
fi
mkdir -p "$OUT" "$WORK" || exit 2
BEGAN=$(date +%s)
FAILED=0
while IFS='|' read -r name limit command; do
    wanted "$name" || continue
    result=$OUT/$name.json
    if [ -s "$result" ] && [ $AGAIN = no ]; then
        echo "$name: is there already, $result"
        continue
    fi
    left=$((MINUTES * 60 - $(date +%s) + BEGAN))
    if [ $left -lt 60 ]; then
        echo "$name: not made, $MINUTES minutes are over"
        FAILED=1
        continue
    fi
    [ $left -lt "$limit" ] && limit=$left
    rm -f "$result"
    start=$(date +%s)
    echo "$name: at most $limit s"
    command=${command//\{\}/$result}
    # shellcheck disable=SC2086  (the command is words)
    timeout -k 10 "$limit" ${command//\{s\}/$((limit > 120 ? limit - 45 : limit))} >"$OUT/$name.log" 2>&1 </dev/null
    code=$?
    took=$(($(date +%s) - start))
    if [ -s "$result" ]; then
        echo "$name: done in $took s, exit code $code, $result"
    else
        FAILED=1
        echo "$name: no result after $took s, exit code $code: $(tail -n 1 "$OUT/$name.log" | cut -c 1-300)"
    fi
    printf '%s\t%s\t%s\n' "$name" "$code" "$took" >>"$OUT/parts.tsv"
done < <(parts)
exit $FAILED
