"""Exact-match score of a chat model on fixed questions, whatever serves it.

questions = load_questions()
result = score(questions, ask_server(questions, "http://localhost:8000/v1"))
print(result.accuracy, result.by_task["add"].accuracy)
"""

from lvllm.evaluation.backends import EvaluationError, ask_server, ask_transformers, ask_vllm
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
