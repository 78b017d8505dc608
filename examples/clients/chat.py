"""Ask one question with the OpenAI client, and print the whole answer."""

from connection import Server, run
from openai import OpenAI


def main(server: Server) -> None:
    client = OpenAI(base_url=server.url, api_key=server.key)
    answer = client.chat.completions.create(
        model=server.model,
        messages=[{"role": "user", "content": "What is 47 + 38?"}],
        temperature=0,
        max_tokens=64,
    )
    print(answer.choices[0].message.content)


if __name__ == "__main__":
    run(main)
