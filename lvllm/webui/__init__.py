"""A chat in the browser with any OpenAI-compatible server. It needs the extra `webui` (gradio)."""
