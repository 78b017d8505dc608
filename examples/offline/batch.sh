#!/bin/sh
# Answer the requests of a file, one JSON object a line in the form of OpenAI's Batch API, without a
# server:
#
#     sh examples/offline/batch.sh ANSWERS.jsonl
set -eu
answers=${1:?"sh examples/offline/batch.sh ANSWERS.jsonl"}
folder=$(dirname "$0")
LVLLM_MOE_NUMA_ENABLED=1 vllm run-batch -i "$folder/batch.jsonl" -o "$answers" \
    --model "$folder/../models/tiny-moe" --served-model-name tiny-moe \
    --dtype bfloat16 --max-model-len 512 --kv-cache-memory-bytes 134217728 --enforce-eager
