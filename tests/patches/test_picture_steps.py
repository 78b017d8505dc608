"""How many tokens a step takes where pictures must not be cut."""

from types import SimpleNamespace
from typing import Any

import pytest

from lvllm.patches.picture_steps import keep_pictures_whole, tokens_without_a_cut


def test_no_step_ends_within_a_picture() -> None:
    pictures = [(3, 10), (13, 5), (30, 4)]
    assert tokens_without_a_cut(pictures, 0, 3) == 3
    assert tokens_without_a_cut(pictures, 0, 9) == 3
    assert tokens_without_a_cut(pictures, 3, 9) == 0  # not even one that begins with it
    assert tokens_without_a_cut(pictures, 5, 7) == 0  # the rest of it, whose beginning was cached
    assert tokens_without_a_cut(pictures, 3, 10) == 10
    assert tokens_without_a_cut(pictures, 3, 12) == 10  # two that touch
    assert tokens_without_a_cut(pictures, 3, 20) == 20
    assert tokens_without_a_cut(pictures, 18, 14) == 12
    assert tokens_without_a_cut(pictures, 34, 1) == 1


@pytest.mark.parametrize(("encoder_decoder", "taken"), [(False, 3), (True, 4)])
def test_encoder_decoder_models_are_left_alone(encoder_decoder: bool, taken: int) -> None:
    """Whisper's audio of 1500 positions begins before a prompt of 4 tokens, and is not in it."""

    def upstream(self: Any, request: Any, computed: int, new: int, budget: int) -> int:
        return new

    scheduler = SimpleNamespace(
        scheduler_config=SimpleNamespace(
            disable_chunked_mm_input=True, long_prefill_token_threshold=0
        ),
        max_num_scheduled_tokens=2048,
        is_encoder_decoder=encoder_decoder,
    )
    offset = 0 if encoder_decoder else 3
    position = SimpleNamespace(offset=offset, length=1500)
    request = SimpleNamespace(mm_features=[SimpleNamespace(mm_position=position)])
    schedule = keep_pictures_whole.make(upstream)
    assert schedule(scheduler, request, 0, 4, 1500) == taken
