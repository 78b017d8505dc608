"""The page: gradio's chat interface, with settings beside it."""

from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI

from lvllm.webui.answering import Answering

__all__ = ["application", "page"]

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


def application(blocks: gr.Blocks) -> FastAPI:
    """The page as an application, which runs neither gradio's analytics nor its public links."""
    # Nobody but the browser asks this program, so that it describes itself to nobody.
    silent: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
    return gr.mount_gradio_app(
        FastAPI(**silent),
        blocks,
        path="/",
        app_kwargs=silent,
        show_error=False,
        footer_links=[],
        # The browser would keep all conversations for gradio's page of earlier runs.
        run_history=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        enable_monitoring=False,
        max_file_size="20mb",
        css_paths=STYLE,
        theme=gr.themes.Default(primary_hue="indigo"),
    )
