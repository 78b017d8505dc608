"""Get an answer as JSON of a given schema, read by pydantic.

The server lets the model write nothing else. What the values are is up to the model: the demo
model has learnt no JSON, so its numbers are of no use. White space is allowed in JSON, and the demo
model would write it without end, unless the server was started with

    --structured-outputs-config '{"backend": "xgrammar", "disable_any_whitespace": true}'
"""

import sys

from connection import Server, run
from openai import OpenAI
from pydantic import BaseModel, Field


class Sum(BaseModel):
    left: int = Field(ge=0, le=99)
    right: int = Field(ge=0, le=99)
    total: int = Field(ge=0, le=198)


def main(server: Server) -> None:
    client = OpenAI(base_url=server.url, api_key=server.key)
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "What is 47 + 38?"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "sum", "schema": Sum.model_json_schema(), "strict": True},
        },
        temperature=0,
        max_tokens=64,
    )
    choice = answer.choices[0]
    if choice.finish_reason != "stop":
        sys.exit("the answer is not complete: max_tokens are too few")
    print(repr(Sum.model_validate_json(choice.message.content or "")))


if __name__ == "__main__":
    run(main)
