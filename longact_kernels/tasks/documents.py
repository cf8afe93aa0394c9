"""Questions over the user's documents."""

import hashlib
from dataclasses import dataclass

from longact_kernels.tasks.rows import read_rows


@dataclass(frozen=True)
class Question:
    """A question, answers of which any one will do, and the documents that hold them."""

    text: str
    answers: tuple[str, ...]
    documents: tuple[str, ...]


def read_questions(source: str) -> list[Question]:
    """The questions that `--documents` names.

    Args:
        source: a file of JSON lines, or a data set on the Hub. Rows have `question`; `answer`, a string, or `answers`,
            a list or SQuAD's `{"text": [...]}`; and `context`, a document or a list of them.

    Raises:
        ValueError: there is no such thing, or a row lacks something.
    """
    questions = []
    for i, row in enumerate(read_rows(source, "documents")):
        answers = row.get("answers", row.get("answer"))
        answers = answers["text"] if isinstance(answers, dict) else answers
        context = row.get("context")
        if not (row.get("question") and answers and context):
            # SQuAD's second version has questions that the context does not answer.
            if answers == [] and row.get("question") and context:
                continue
            raise ValueError(
                f"documents: row {i + 1} of {source} has {', '.join(row)}; needed question, answer (or "
                "answers, a list) and context (a document or a list of documents)"
            )
        questions.append(
            Question(
                str(row["question"]),
                (answers,) if isinstance(answers, str) else tuple(answers),
                (context,) if isinstance(context, str) else tuple(context),
            )
        )
    return questions


@dataclass(frozen=True)
class Library:
    """The questions of a split, and the documents of all."""

    questions: list[Question]
    documents: list[str]


def library(questions: list[Question], split: str) -> Library:
    """The questions of a split: one in ten is kept for `"test"`, the same ones in whichever order the file has them.

    Raises:
        ValueError: there are not two questions.
    """
    if len(questions) < 2:
        raise ValueError("documents: got 1 question, needed at least 2, one of them to hold out")
    shuffled = sorted(questions, key=lambda question: hashlib.sha256(question.text.encode()).digest())
    held_out = max(1, len(questions) // 10)
    found = shuffled[:held_out] if split == "test" else shuffled[held_out:]
    return Library(found, list(dict.fromkeys(document for question in questions for document in question.documents)))
