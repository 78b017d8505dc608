#!/bin/sh
# Ask one question with curl, and print the server's JSON. MODEL is the name that the server gives
# its model.
set -eu
url=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
curl --silent --show-error --fail-with-body "$url/chat/completions" \
    -H 'Content-Type: application/json' \
    -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" \
    -d '{
        "model": "'"${MODEL:-tiny-moe}"'",
        "messages": [{"role": "user", "content": "What is 47 + 38?"}],
        "temperature": 0,
        "max_tokens": 64
    }'
