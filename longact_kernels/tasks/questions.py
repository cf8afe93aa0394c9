"""RULER's two QA tasks over the user's documents, and a question that stands at the end of a chain of keys."""

import random
from itertools import pairwise

from longact_kernels.tasks.documents import Question
from longact_kernels.tasks.haystack import scatter
from longact_kernels.tasks.needles import needle
from longact_kernels.tasks.sample import Sample, Setting
from longact_kernels.tasks.words import names, number, uuid4

CHAINS = 3
HOPS = 3


def answer_from_documents(rng: random.Random, size: int, setting: Setting) -> Sample:
    """A question, and the documents that answer it among `size` others."""
    (question,), documents = draw(rng, size, setting, 1)
    text = "\n\n".join(f"Document {i}:\n{document}" for i, document in enumerate(documents, start=1))
    return Sample(
        f"Answer a question from the following documents, in as few words as possible.\n\n{text}\n\n{question.text}",
        list(question.answers),
        "Answer:",
    )


def key_chain(rng: random.Random, size: int, setting: Setting) -> Sample:
    """A question that has to be found first: at the end of one of `CHAINS` chains of keys, after LoongRL's KeyChain.

    The other chains lead to other questions, whose answers stand in the text, too. Over the user's documents if there
    are any (the right ones among `size` others), and else over needles (in `size` pieces of the haystack).
    """
    if setting.library is not None:
        questions, pieces = draw(rng, size, setting, CHAINS)
        ends = [question.text for question in questions]
        answers = list(questions[0].answers)
        lines, between = [], "\n\n"
    else:
        assert setting.haystack is not None
        keys, values = names(rng, CHAINS), [number(rng) for _ in range(CHAINS)]
        ends = [f"What is the special magic number for {key}?" for key in keys]
        answers = [values[0]]
        lines = [needle("number", key, value) for key, value in zip(keys, values, strict=True)]
        pieces, between = setting.haystack.passage(rng, size), setting.haystack.between
    chains = [[uuid4(rng) for _ in range(HOPS + 1)] for _ in ends]
    for chain, end in zip(chains, ends, strict=True):
        lines += [f"The key {one} leads to the key {other}." for one, other in pairwise(chain)]
        lines.append(f"The key {chain[-1]} leads to the question: {end}")
    rng.shuffle(lines)
    question = (
        "In the following text, keys lead to other keys, and some to a question.\n"
        f"{between.join(scatter(rng, pieces, lines))}\n\n"
        f"Follow the keys from {chains[0][0]} on until one leads to a question. What is the answer to that question?"
    )
    return Sample(question, answers, "The answer to that question is")


def draw(rng: random.Random, size: int, setting: Setting, count: int) -> tuple[list[Question], list[str]]:
    """`count` questions, and their documents among `size` others, in random order.

    What is drawn does not depend on `size`: a longer prompt has the shorter one's documents.
    """
    assert setting.library is not None
    questions = rng.sample(setting.library.questions, count)
    own = list(dict.fromkeys(document for question in questions for document in question.documents))
    others = [document for document in setting.library.documents if document not in own]
    rng.shuffle(others)
    place = {document: rng.random() for document in (*own, *others)}
    return questions, sorted((*own, *others[:size]), key=place.__getitem__)
