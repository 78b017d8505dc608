"""Measure how good a model is: exact match on questions, and likelihood of a text.

questions = load_questions()
result = score(questions, ask_server(questions, "http://localhost:8000/v1"))
print(result.accuracy, result.by_task["add"].accuracy)

`lvllm.evaluation.measure` runs several models over the same questions and text, for a table.
"""

from lvllm.evaluation.answers import ask_server, ask_transformers, ask_vllm
from lvllm.evaluation.errors import EvaluationError
from lvllm.evaluation.questions import Question, load_questions
from lvllm.evaluation.scoring import Result, Tally, score

__all__ = [
    "EvaluationError",
    "Question",
    "Result",
    "Tally",
    "ask_server",
    "ask_transformers",
    "ask_vllm",
    "load_questions",
    "score",
]
