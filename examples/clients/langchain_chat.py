"""Ask one question with LangChain: a prompt with places to fill in, the model, and a parser.

pip install langchain-openai
"""

from connection import Server, run
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from pydantic import SecretStr


def main(server: Server) -> None:
    model = ChatOpenAI(
        base_url=server.url,
        api_key=SecretStr(server.key),
        model=server.model,
        temperature=0,
        max_completion_tokens=64,
    )
    prompt = ChatPromptTemplate.from_messages([("user", "What is {a} + {b}?")])
    chain = prompt | model | StrOutputParser()
    print(chain.invoke({"a": 47, "b": 38}))


if __name__ == "__main__":
    run(main)
