"""The page: gradio's chat interface, with settings beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gradio as gr

from lvllm.errors import LvllmError
from lvllm.webui.answering import Answering

__all__ = ["page", "shown"]

STYLE = Path(__file__).with_name("page.css")
THINKING = ("as the model does", "on", "off")
SAMPLING = ("Temperature", "Top-p", "Top-k", "Most tokens of an answer", "Seed")


def page(answering: Answering, models: list[str], system: str) -> gr.Blocks:
    """The page for the first of `models`; the others can be chosen. `system` can be changed."""
    name = models[0].rpartition("/")[2]
    with gr.Blocks(title=f"{name} - LvLLM", analytics_enabled=False, fill_height=True) as blocks:
        with gr.Accordion(f"{name}: settings", open=False, elem_id="settings"):
            settings = _settings(models, system)
        gr.ChatInterface(
            answering.answer,
            multimodal=True,
            editable=True,
            chatbot=gr.Chatbot(
                show_label=False,
                buttons=["copy"],
                placeholder=f"### {name}",
                scale=1,
                elem_id="chat",
            ),
            textbox=gr.MultimodalTextbox(
                placeholder="Your message",
                file_types=["image"],
                file_count="multiple",
                stop_btn=True,
                sources=["upload"],
                elem_id="question",
            ),
            additional_inputs=settings,
            analytics_enabled=False,
            api_visibility="private",
            # The server decides how many answers it computes at once.
            concurrency_limit=None,
            # Pictures are deleted after a day, and when the page ends.
            delete_cache=(3600, 86400),
        )
    return blocks


def _settings(models: list[str], system: str) -> list[gr.components.Component]:
    """What is sent with each question, in the order of `Answering.answer`'s arguments."""
    model = gr.Dropdown(models, value=models[0], label="Model", visible=len(models) > 1)
    with gr.Row():
        prompt = gr.Textbox(system, label="System prompt", lines=2, elem_id="system", scale=2)
        tools = gr.Textbox(
            "",
            label="Tools",
            placeholder="a JSON list; calls are shown, and not carried out",
            lines=2,
            scale=2,
        )
        thinking = gr.Radio(THINKING, value=THINKING[0], label="Thinking", min_width=240)
    with gr.Row():
        sampled = [
            gr.Textbox("", label=name, placeholder="the server's", max_lines=1, min_width=120)
            for name in SAMPLING
        ]
    return [model, prompt, thinking, tools, *sampled]


@contextmanager
def shown(blocks: gr.Blocks, host: str, port: int) -> Iterator[str]:
    """Serve the page until the block ends. Yields its URL. Raises LvllmError."""
    try:
        _, url, _ = blocks.launch(
            server_name=host,
            server_port=port,
            share=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=[],
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            max_file_size="20mb",
            css_paths=STYLE,
            theme=gr.themes.Default(primary_hue="indigo"),
        )
    except OSError as error:
        raise LvllmError(f"--host {host} --port {port} cannot be used: {error}") from None
    try:
        yield url
    finally:
        blocks.close(verbose=False)
