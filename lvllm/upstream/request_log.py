"""What vLLM's interface for Anthropic's clients logs, without what clients wrote.

Of a refused request, OpenAI's interfaces log its status alone. This one also logs a traceback with
the reason, which may quote the request, and at the level DEBUG it logs whole requests and answers.
"""

import logging

__all__ = ["hide_requests"]

LOGGERS = (
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.anthropic.serving",
)


def hide_requests() -> None:
    """Keep what clients wrote out of these logs; faults of the server stay in them."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(_says_nothing_of_a_request)


def _says_nothing_of_a_request(record: logging.LogRecord) -> bool:
    if record.levelno <= logging.DEBUG:
        return False
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, Exception) and _is_the_clients(error))


def _is_the_clients(error: Exception) -> bool:
    """Whether vLLM answers this error with a status that blames the request."""
    from vllm.entrypoints.serve.exception_handling.error_response import create_error_response

    return create_error_response(error).error.code < 500
