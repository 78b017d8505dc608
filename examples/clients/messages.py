"""Ask one question with Anthropic's client, through the endpoint /v1/messages."""

from anthropic import Anthropic
from connection import Server, run


def main(server: Server) -> None:
    # This client adds /v1 itself.
    client = Anthropic(base_url=server.url.removesuffix("/v1"), auth_token=server.key)
    answer = client.messages.create(
        model=server.model,
        messages=[{"role": "user", "content": "What is 47 + 38?"}],
        max_tokens=64,
        extra_body={"temperature": 0},  # the client's newer versions have no argument for it
    )
    print("".join(block.text for block in answer.content if block.type == "text"))


if __name__ == "__main__":
    run(main)
