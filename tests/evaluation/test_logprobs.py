"""The reference reads passages in batches, of which each is as if it were read alone."""

from dataclasses import replace

import numpy as np
import pytest

from lvllm.evaluation import load_questions, logprobs
from lvllm.evaluation.passages import LocalTokenizer, of_chats
from tests.e2e.generate import TINY


def test_a_passage_is_read_as_if_it_were_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    passages = of_chats(load_questions()[::50], LocalTokenizer(str(TINY)))
    passages = replace(passages, first=(1,) * len(passages.ids))
    assert len({len(ids) for ids in passages.ids}) > 3

    def read() -> logprobs.Likelihoods:
        return logprobs.logprobs_from_transformers(passages, TINY, 445, dtype="float32")

    together = read()
    monkeypatch.setattr(logprobs, "LOGPROBS_OF_A_BATCH", 1)
    alone = read()
    assert together.whole
    np.testing.assert_allclose(together.logprobs, alone.logprobs, atol=2e-4)
    np.testing.assert_allclose(together.top_logprobs, alone.top_logprobs, atol=2e-4)
