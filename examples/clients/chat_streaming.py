"""Ask one question with the OpenAI client, and print the answer while it comes."""

from connection import Server, run
from openai import OpenAI


def main(server: Server) -> None:
    client = OpenAI(base_url=server.url, api_key=server.key)
    stream = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "Sort 42, 7, 19 from largest to smallest."}],
        temperature=0,
        max_tokens=64,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        if chunk.choices:
            print(chunk.choices[0].delta.content or "", end="", flush=True)
        if chunk.usage:  # the last chunk
            print(f"\n{chunk.usage.completion_tokens} tokens")


if __name__ == "__main__":
    run(main)
