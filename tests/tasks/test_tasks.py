"""The task generators: each prompt is read back, and answered, from its text alone."""

import collections
import json
import random
import re

import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from longact_kernels.integrations.prompts import encode_prompts
from longact_kernels.tasks import TASKS, Setting, build_dataset
from longact_kernels.tasks.build import largest
from longact_kernels.tasks.documents import Library, Question
from longact_kernels.tasks.haystack import NOISE, Haystack, read_haystack
from longact_kernels.tasks.rows import read_json_lines

WORDS, UUID = r"[a-z]+-[a-z]+", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
LINE = re.compile(rf"One of the special magic (number|uuid)s for ({WORDS}|{UUID}) is: (\d{{7}}|{UUID})\.")
TOKENIZER = tiny.tokenizer()
PROSE = Haystack(tuple(f"Sentence {i} of a story." for i in range(50)), " ")
LIBRARY = Library(
    [Question(f"Who wrote book {i}?", (f"Author {i}", f"A. {i}"), (f"Book {i} is by Author {i}.",)) for i in range(20)],
    [f"Book {i} is by Author {i}." for i in range(20)],
)
SEEDS = st.integers(0, 2**32)


def make(task, seed=0, size=None, length=1000):
    made = TASKS[task]
    setting = Setting(
        length,
        {"noise": Haystack((NOISE,), "\n"), "prose": PROSE, None: None}[made.haystack],
        LIBRARY if task == "qa" else None,
    )
    return made.make(random.Random(seed), size or max(made.least, 12), setting)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A text file and one of questions."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "story.txt").write_text(" ".join(PROSE.pieces))
    rows = [{"question": q.text, "answers": q.answers, "context": q.documents[0]} for q in LIBRARY.questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def dataset(task="niah_multikey_2", split="train", count=4, seed=0, length=700, tokenizer=TOKENIZER, **more):
    return build_dataset(task, tokenizer, split=split, count=count, seed=seed, length=length, **more)


def needs(task, files) -> dict:
    if task == "qa":
        return {"documents": str(files / "questions.jsonl")}
    return {"haystack": str(files / "story.txt")} if TASKS[task].haystack == "prose" else {}


def tokens(row) -> int:
    return len(encode_prompts(TOKENIZER, [row["prompt"]])[0])


def test_there_are_all_of_rulers_configurations_and_the_key_chain():
    needles = ["single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery"]
    # `qa` makes both of RULER's, from the documents of either.
    assert set(TASKS) == {*(f"niah_{name}" for name in needles), "vt", "cwe", "fwe", "qa", "key_chain"}


@pytest.mark.parametrize(
    ("task", "kind", "keys", "values", "asked"),
    [
        ("niah_single_1", "number", 1, 1, 1),
        ("niah_single_2", "number", 1, 1, 1),
        ("niah_single_3", "uuid", 1, 1, 1),
        ("niah_multikey_1", "number", 4, 1, 1),
        ("niah_multikey_2", "number", 12, 1, 1),
        ("niah_multikey_3", "uuid", 12, 1, 1),
        ("niah_multivalue", "number", 1, 4, 1),
        ("niah_multiquery", "number", 4, 1, 4),
    ],
)
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_answers_are_the_values_of_the_keys_asked_for(task, kind, keys, values, asked, seed):
    sample = make(task, seed)
    found = collections.defaultdict(list)
    for one, key, value in LINE.findall(sample.question):
        assert one == kind and re.fullmatch(UUID if kind == "uuid" else r"\d{7}", value)
        found[key].append(value)
    assert [len(ones) for ones in found.values()] == [values] * keys
    question = sample.question.splitlines()[-1]
    wanted = [key for key in found if key in question]
    assert len(wanted) == asked
    assert sorted(sample.answers) == sorted(value for key in wanted for value in found[key])
    assert all(key in sample.answer_prefix for key in wanted)
    assert not any(answer in sample.answer_prefix for answer in sample.answers)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_the_answers_are_the_variables_that_hold_the_value(seed):
    sample = make("vt", seed)
    value = re.search(r"value (\d{5})", sample.question.splitlines()[-1])[1]
    holders = {value}
    # In the order of the text, one pass is enough.
    for variable, held in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", sample.question):
        if held in holders:
            holders.add(variable)
    assert len(sample.answers) == 5 and holders == {value, *sample.answers}


@pytest.mark.parametrize("length", [1000, 8000])
@given(seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_the_answers_are_the_words_that_come_most_often(length, seed):
    sample = make("cwe", seed, size=20, length=length)
    counts = collections.Counter(re.findall(r"\d+\. (\S+)", sample.question))
    ranked = counts.most_common()
    assert {word for word, _ in ranked[:10]} == set(sample.answers)
    assert ranked[9][1] > ranked[10][1]


@given(seed=SEEDS, size=st.integers(80, 600))
@settings(max_examples=25, deadline=None)
def test_the_answers_are_the_three_most_frequent_codes(seed, size):
    sample = make("fwe", seed, size=size)
    counts = collections.Counter(re.findall(r"\b[a-z]{6}\b|\.{3}", sample.question.splitlines()[1]))
    assert counts.total() == pytest.approx(size, rel=0.15)
    # Zipf's law: the second comes a quarter as often as the first.
    assert counts.pop("...") == pytest.approx(4 * max(counts.values()), abs=2)
    ranked = counts.most_common()
    assert [word for word, _ in ranked[:3]] == sample.answers
    assert ranked[2][1] > ranked[3][1]


@given(seed=SEEDS, size=st.integers(1, 30))
@settings(max_examples=15, deadline=None)
def test_the_document_that_answers_the_question_is_among_the_others(seed, size):
    sample = make("qa", seed, size=size)
    book = re.search(r"book (\d+)\?", sample.question.splitlines()[-1])[1]
    assert sample.answers == [f"Author {book}", f"A. {book}"]
    documents = re.findall(r"Document \d+:\n(.*)", sample.question)
    assert len(documents) == len(set(documents)) == min(size + 1, 20)
    assert f"Book {book} is by Author {book}." in documents


@pytest.mark.parametrize("library", [None, LIBRARY])
@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_following_the_keys_leads_to_the_question(library, seed):
    setting = Setting(1000, None if library else PROSE, library)
    sample = TASKS["key_chain"].make(random.Random(seed), 10, setting)
    links = dict(re.findall(rf"The key ({UUID}) leads to the (key {UUID}|question: [^?]*\?)", sample.question))
    at = f"key {re.search(UUID, sample.question.splitlines()[-1])[0]}"
    hops = 0
    while at.startswith("key "):
        at, hops = links[at.removeprefix("key ")], hops + 1
    assert hops == 4 and len(links) == 3 * hops
    if library:
        book = re.search(r"book (\d+)\?", at)[1]
        assert f"Author {book}" in sample.answers and f"by Author {book}." in sample.question
    else:
        values = {key: value for _, key, value in LINE.findall(sample.question)}
        assert len(values) == 3
        assert sample.answers == [values[re.search(WORDS, at.removeprefix("question: "))[0]]]


@pytest.mark.parametrize("task", TASKS)
def test_every_task_fills_the_length_and_keeps_within_it(task, files):
    length = 2600
    rows = dataset(task, count=3, length=length, **needs(task, files))
    for row in rows:
        assert tokens(row) <= length
        # The longest piece of any of them, with what goes before it.
        assert tokens(row) > length - 120 or task == "qa"
    assert len({row["prompt"][0]["content"] for row in rows}) == 3


def test_all_the_documents_are_taken_where_they_are_too_few(files):
    (row,) = dataset("qa", count=1, length=1600, documents=str(files / "questions.jsonl"))
    assert row["prompt"][0]["content"].count("Document ") == 20


@given(st.integers(1, 40), st.integers(0, 30), st.integers(0, 400), st.integers(1, 60))
@settings(max_examples=200, deadline=None)
def test_the_largest_size_that_fits_is_found(pace, base, length, most):
    def of(n):
        return base + pace * n + n % 3 if pace > 3 else base + pace * n

    fitting = [n for n in range(1, most + 1) if of(n) <= length]
    if fitting:
        assert largest(of, length, 1, most) == fitting[-1]


def test_needles_can_be_counted_out():
    assert [len(LINE.findall(row["prompt"][0]["content"])) for row in dataset(needles=3)] == [3] * 4


@pytest.mark.parametrize("task", TASKS)
def test_a_sample_depends_on_its_index_only(task, files):
    more = {"length": 2600, **needs(task, files)}
    rows = dataset(task, count=3, **more)
    assert rows[:2] == dataset(task, count=2, **more)
    assert rows[1:] == dataset(task, count=2, first=1, **more)
    assert rows != dataset(task, count=3, seed=1, **more)


def test_held_out_prompts_are_apart_from_the_training_prompts(files):
    def values(split):
        rows = dataset(split=split, count=20, seed=3)
        return {value for row in rows for *_, value in LINE.findall(row["prompt"][0]["content"])}

    def questions(split):
        rows = dataset("qa", split=split, count=60, length=1600, documents=str(files / "questions.jsonl"))
        return {row["prompt"][0]["content"].splitlines()[-1] for row in rows}

    assert not values("train") & values("test")
    assert questions("train") and questions("test") and not questions("train") & questions("test")


def test_the_first_prompt_of_the_demo():
    # As many needles as fit into its 300 tokens of SmolLM2; the README's figures are those of these prompts.
    (row,) = dataset(count=1, length=10_000, needles=9)
    user, begun = row["prompt"]
    head, *lines, question = user["content"].splitlines()
    assert head == (
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards."
    )
    assert lines[0] == "One of the special magic numbers for late-island is: 8964486."
    assert lines[-1] == "One of the special magic numbers for zesty-prairie is: 8171899."
    assert question == "What is the special magic number for gentle-turtle mentioned in the provided text?"
    assert begun == {
        "role": "assistant",
        "content": "The special magic number for gentle-turtle mentioned in the provided text is",
    }


def test_a_model_without_a_chat_template_gets_text_that_ends_in_the_answers_beginning():
    (row,) = dataset(count=1, tokenizer=tiny.tokenizer(chat=False))
    assert row["prompt"].endswith("mentioned in the provided text is")


def test_a_chat_model_goes_on_with_the_answer_that_the_prompt_began():
    (row,) = dataset(count=1)
    text = TOKENIZER.decode(encode_prompts(TOKENIZER, [row["prompt"]])[0])
    assert text.endswith("mentioned in the provided text is")
    opened = TOKENIZER.decode(encode_prompts(TOKENIZER, [row["prompt"][:1]])[0])
    assert opened.endswith("\na:")


def test_a_haystack_is_a_file_or_the_files_of_a_folder(tmp_path):
    (tmp_path / "b.txt").write_text("Three. Four!\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "rows.jsonl").write_text('{"text": "One.\\nTwo?"}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert read_haystack(str(tmp_path / "b.txt")).pieces == ("Three.", "Four!")
    assert read_haystack(str(tmp_path)).pieces == ("One.", "Two?", "Three.", "Four!")
    (tmp_path / "table.md").write_text("a " * 90 + "b.")
    assert [len(piece.split()) for piece in read_haystack(str(tmp_path / "table.md")).pieces] == [40, 40, 11]
    assert read_haystack("noise").hide(random.Random(0), 2, []) == f"{NOISE}\n{NOISE}"


@given(SEEDS, st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_a_longer_haystack_has_the_same_needles(seed, size):
    short, long = (PROSE.hide(random.Random(seed), n, ["A!", "B!"]).split("! ") for n in (size, size + 40))
    texts = [PROSE.hide(random.Random(seed), n, ["A!", "B!"]) for n in (size, 3 * size)]
    for text in texts:
        assert 0 <= text.index("A!") < text.index("B!")
    assert len(short) and len(long)


def test_rows_with_a_byte_order_mark_and_empty_lines(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"a": "1"}\r\n\r\n{"a": "2"}\r\n')
    assert read_json_lines(tmp_path / "rows.jsonl", "dataset") == [{"a": "1"}, {"a": "2"}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 50}, "length: got 50, but the shortest prompt of this task takes"),
        ({"needles": 90}, "with needles 90 a prompt of this task takes.*or lower needles"),
        ({"needles": 0}, "needles: got 0"),
        ({"task": "vt", "needles": 3}, "needles: got 3, but prompts of .* are made of pieces of the haystack"),
        ({"task": "poetry"}, "task: got 'poetry', needed one of niah_single_1"),
        ({"task": "niah_single_2"}, "haystack: niah_single_2 hides its needles in a text; name a text file"),
        ({"haystack": "noise"}, "haystack: got 'noise', but prompts of .* are made of needles"),
        ({"task": "qa"}, "documents: qa asks questions about documents; name a JSON Lines file"),
        ({"task": "vt", "documents": "x"}, "documents: got 'x', but vt asks no questions"),
        ({"task": "key_chain", "documents": "x", "haystack": "y"}, "takes one of them"),
        ({"task": "vt", "haystack": "EMPTY"}, "haystack: .* has no text in it"),
        ({"task": "vt", "haystack": "FOLDER"}, "has no .txt, .md, .rst or .jsonl files in it"),
        ({"task": "qa", "documents": "BROKEN"}, "documents: line 2 of .* is not valid JSON"),
        ({"task": "qa", "documents": "LACKING"}, "documents: row 1 of .* has question, answer; needed question"),
    ],
)
def test_what_cannot_be_is_refused(change, message, tmp_path):
    (tmp_path / "EMPTY").write_text("\n")
    (tmp_path / "FOLDER").mkdir()
    (tmp_path / "BROKEN").write_text('{"question": "q"}\n{"question"\n')
    (tmp_path / "LACKING").write_text('{"question": "q", "answer": "a"}\n')
    change = {k: str(tmp_path / v) if isinstance(v, str) and v.isupper() else v for k, v in change.items()}
    with pytest.raises(ValueError, match=message):
        dataset(**change)
