"""Send a picture with a question.

The server must serve a model with vision, such as Qwen3-VL (examples/configs/qwen3-vl-moe.yaml). A
model without vision, as the demo model is, gets no picture: the server refuses the request.
"""

import base64
from io import BytesIO

from connection import Server, run
from openai import OpenAI
from PIL import Image, ImageDraw


def picture() -> str:
    """A red circle on white, as the URL that carries its bytes; a URL of the web works as well."""
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((24, 24, 104, 104), fill="red")
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def main(server: Server) -> None:
    client = OpenAI(base_url=server.url, api_key=server.key)
    answer = client.chat.completions.create(
        model=server.model,
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is in this picture?"},
                    {"type": "image_url", "image_url": {"url": picture()}},
                ],
            }
        ],
        temperature=0,
        max_tokens=64,
    )
    print(answer.choices[0].message.content)
    if answer.usage:
        print(f"{answer.usage.prompt_tokens} tokens of text and picture")


if __name__ == "__main__":
    run(main)
