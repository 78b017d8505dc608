"""Ask several questions at once, as several users would; the server computes them together."""

import asyncio
import time

from connection import Server, run
from openai import AsyncOpenAI

QUESTIONS = [
    "What is 47 + 38?",
    "What is 90 - 41?",
    "Which is larger, 512 or 498?",
    "Sort 42, 7, 19 from largest to smallest.",
]


async def ask_all(server: Server) -> None:
    async with AsyncOpenAI(base_url=server.url, api_key=server.key) as client:

        async def ask(question: str) -> str:
            answer = await client.chat.completions.create(
                model=server.model,
                messages=[{"role": "user", "content": question}],
                temperature=0,
                max_tokens=64,
            )
            return answer.choices[0].message.content or ""

        begin = time.monotonic()
        answers = await asyncio.gather(*map(ask, QUESTIONS))
    for question, answer in zip(QUESTIONS, answers, strict=True):
        print(f"{question} {answer}")
    print(f"{len(QUESTIONS)} users, {time.monotonic() - begin:.1f} s")


def main(server: Server) -> None:
    asyncio.run(ask_all(server))


if __name__ == "__main__":
    run(main)
