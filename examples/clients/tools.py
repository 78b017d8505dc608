"""Let the model call a function, run it, and give the result back to the model.

The server needs `enable-auto-tool-choice` and the `tool-call-parser` of the model's family. The
demo model knows no functions, and answers itself.
"""

import json
from typing import Any

from connection import Server, run
from openai import OpenAI

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add two numbers.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "required": ["a", "b"],
        },
    },
}


def add(a: int, b: int) -> int:
    return a + b


def main(server: Server) -> None:
    client = OpenAI(base_url=server.url, api_key=server.key)
    messages: list[Any] = [{"role": "user", "content": "What is 47 + 38?"}]
    while True:
        answer = client.chat.completions.create(
            model=server.model, messages=messages, tools=[ADD], temperature=0, max_tokens=256
        )
        message = answer.choices[0].message
        if not message.tool_calls:
            break
        messages.append(message)
        for call in message.tool_calls:
            if call.type == "function":
                result = add(**json.loads(call.function.arguments))
                print(f"{call.function.name}({call.function.arguments}) = {result}")
                messages.append({"role": "tool", "tool_call_id": call.id, "content": str(result)})
    print(message.content)


if __name__ == "__main__":
    run(main)
