"""The server that the clients in this folder talk to, and the one line in which they fail."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass

import openai


@dataclass(frozen=True)
class Server:
    """A server and the model that it serves; `url` ends with /v1."""

    url: str
    key: str
    model: str


def run(main: Callable[[Server], None]) -> None:
    """Call `main` with the server of --url and --api-key, or of the environment.

    The variables are OPENAI_BASE_URL and OPENAI_API_KEY, which the OpenAI client reads as well. A
    server that does not answer, or refuses, ends the program with one line and exit code 1.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument(
        "--url", default=os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1"
    )
    # The clients want a key, even where the server wants none.
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY") or "none")
    given = parser.parse_args()
    try:
        client = openai.OpenAI(base_url=given.url, api_key=given.api_key, max_retries=0)
        main(Server(given.url, given.api_key, client.models.list().data[0].id))
    except openai.APIConnectionError:
        sys.exit(f"no server answers at {given.url}: `lvllm serve` starts one, --url names another")
    except openai.AuthenticationError:
        sys.exit(f"the server at {given.url} wants another key: --api-key or OPENAI_API_KEY")
    except openai.APIStatusError as error:
        sys.exit(f"the server at {given.url} refuses, status {error.status_code}: {error.message}")
