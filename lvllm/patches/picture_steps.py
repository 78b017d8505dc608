"""Steps that take a picture whole, where its tokens see each other."""

from typing import Any

__all__ = ["register", "whole"]


def register() -> None:
    """Make vLLM's scheduler keep to `disable_chunked_mm_input` at a picture's first token, too.

    vLLM 0.32 puts off a picture that does not fit into a step, and then cuts it in the next, which
    begins with the picture.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    upstream = Scheduler._try_schedule_encoder_inputs
    if upstream.__module__ == __name__:
        return

    def _try_schedule_encoder_inputs(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        *args: Any,
        **more: Any,
    ) -> Any:
        if self.scheduler_config.disable_chunked_mm_input:
            longest = self.scheduler_config.long_prefill_token_threshold
            longest = min(longest or self.max_num_scheduled_tokens, self.max_num_scheduled_tokens)
            pictures = [
                (feature.mm_position.offset, feature.mm_position.length)
                for feature in request.mm_features or ()
                if feature.mm_position.length <= longest  # others would wait for ever
            ]
            num_new_tokens = whole(pictures, num_computed_tokens, num_new_tokens)
        return upstream(self, request, num_computed_tokens, num_new_tokens, *args, **more)

    Scheduler._try_schedule_encoder_inputs = _try_schedule_encoder_inputs


def whole(pictures: list[tuple[int, int]], computed: int, new: int) -> int:
    """At most `new` tokens from `computed` on, that end in no picture (offset, length)."""
    for offset, length in pictures:
        if max(offset, computed) < computed + new < offset + length:
            return max(0, offset - computed)
    return new
