"""Steps that take a picture whole, where its tokens see each other."""

from typing import Any

from lvllm.patches.registry import patch

__all__ = ["keep_pictures_whole", "tokens_without_a_cut"]


@patch(
    "vllm.v1.core.sched.scheduler:Scheduler._try_schedule_encoder_inputs",
    signature="(self, request, num_computed_tokens, num_new_tokens, encoder_compute_budget,"
    " shift_computed_tokens=0)",
    why="With disable_chunked_mm_input vLLM's scheduler puts off a picture that does not fit into a"
    " step, and then cuts it in the next step, which begins with the picture.",
    upstream="https://github.com/vllm-project/vllm/pull/52412",
    until="disable_chunked_mm_input holds at a picture's first token, too",
    platform="cpu",
)
def keep_pictures_whole(original: Any) -> Any:
    def _try_schedule_encoder_inputs(
        self: Any,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        *arguments: Any,
        **options: Any,
    ) -> Any:
        # An encoder-decoder model (Whisper) reads its inputs through cross-attention. Its positions
        # are not those of the decoder's prompt, so that there is nothing to cut.
        if self.scheduler_config.disable_chunked_mm_input and not self.is_encoder_decoder:
            longest = self.scheduler_config.long_prefill_token_threshold
            longest = min(longest or self.max_num_scheduled_tokens, self.max_num_scheduled_tokens)
            pictures = [
                (feature.mm_position.offset, feature.mm_position.length)
                for feature in request.mm_features or ()
                if feature.mm_position.length <= longest  # a longer one would wait for ever
            ]
            num_new_tokens = tokens_without_a_cut(pictures, num_computed_tokens, num_new_tokens)
        return original(self, request, num_computed_tokens, num_new_tokens, *arguments, **options)

    return _try_schedule_encoder_inputs


def tokens_without_a_cut(pictures: list[tuple[int, int]], computed: int, new: int) -> int:
    """Return how many of `new` tokens from position `computed` on to take, to end in no picture.

    Args:
        pictures: the offset and the length of each.
        computed: how many tokens of the prompt have been computed.
        new: the most tokens to take.
    """
    for offset, length in pictures:
        if max(offset, computed) < computed + new < offset + length:
            return max(0, offset - computed)
    return new
