"""One model through lm-eval: cell by cell, each kept as soon as it is finished."""

import gc
import hashlib
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from longact_kernels.commands.eval.data import source, unreachable
from longact_kernels.commands.eval.results import Cell, ResultFolder
from longact_kernels.commands.eval.tasks import RULER, build, documents_lack_answers, impossible, quiet
from longact_kernels.commands.files import append_line
from longact_kernels.integrations.packaged import locate
from longact_kernels.integrations.transformers import load_model

NOTES = {
    "longbench2": "accuracy by the likelihoods of the four letters, as lm-eval has it, which is not the official form",
    "longbench2_generate": 'the official form: a generated "The correct answer is (X)"; greedy',
    "ruler_qa_squad": "lm-eval's score is the mean over an answer's variants, RULER's own the best of them",
}
SQUAD_LENGTH = 2048


class Reader(HFLM):
    """lm-eval's transformers model, telling how far it is.

    Args:
        model, tokenizer: loaded.
        batch_size: prompts at a time.
        begin: called with the number of answers to come.
        advance: called after each answer.
    """

    def __init__(self, model, tokenizer, batch_size: int, begin: Callable[[int], None], advance: Callable[[], None]):
        # RULER's answers have a few dozen tokens: a model that thinks aloud would not come to one.
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, enable_thinking=False)
        self.begin, self.advance = begin, advance

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        super().set_cache_hook(AdvancingHook(cache_hook, self.advance))

    def generate_until(self, requests, disable_tqdm: bool = True):
        self.begin(len(requests))
        return super().generate_until(requests, disable_tqdm=disable_tqdm)

    def loglikelihood(self, requests, disable_tqdm: bool = True):
        self.begin(len(requests))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)


class AdvancingHook(CacheHook):
    """lm-eval's call after each answer, which keeps it and moves the bar."""

    def __init__(self, hook: CacheHook, advance: Callable[[], None]):
        self.hook, self.advance = hook, advance

    def add_partial(self, attr, req, res) -> None:
        self.hook.add_partial(attr, req, res)
        self.advance()


class Answers(dict):
    """The answers by now, by lm-eval's hash of the prompt; each is in a file as soon as it is there.

    lm-eval's own database waits for ever where a disk is full or its file is damaged.

    Args:
        path: of a line of JSON for each; those that are damaged are left out.
    """

    def __init__(self, path: Path):
        self.path = path
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            with suppress(ValueError, TypeError, KeyError):
                held = json.loads(line)
                answer = held["answer"]
                super().__setitem__(held["prompt"], tuple(answer) if isinstance(answer, list) else answer)

    def __setitem__(self, prompt: str, answer) -> None:
        if prompt not in self:  # lm-eval says each twice
            append_line(self.path, {"prompt": prompt, "answer": answer})
            super().__setitem__(prompt, answer)

    def commit(self) -> None:
        """Nothing is left to do."""


class Cached(CachingLM):
    """lm-eval's cache over our answers."""

    def __init__(self, reader: Reader, answers: Answers):
        self.lm, self.dbdict, self.cache_db = reader, answers, str(answers.path)
        reader.set_cache_hook(self.get_cache_hook())


class Subject:
    """A model that is evaluated, loaded when the first unfinished cell needs it.

    Args:
        name: what `load_model` takes.
        path: the folder of its results.
        batch_size: prompts at a time.
    """

    def __init__(self, name: str, path: Path, batch_size: int):
        self.name, self.batch_size = name, batch_size
        self.begin: Callable[[int], None] = lambda total: None
        self.advance: Callable[[], None] = lambda: None
        if state_of(name) is None:
            self.reader  # noqa: B018  downloads it
        self.results = ResultFolder(path, {"name": name, "state": state_of(name)})

    @cached_property
    def reader(self) -> Reader:
        device: dict = {"device_map": "auto"} if torch.cuda.is_available() else {}
        model, tokenizer = load_model(self.name, **device)
        return Reader(model, tokenizer, self.batch_size, lambda total: self.begin(total), lambda: self.advance())

    def unload(self) -> None:
        """Makes room for the next model."""
        self.__dict__.pop("reader", None)
        gc.collect()
        torch.cuda.empty_cache()

    def cell(self, task: str, length: int | None, limit: int | None, sized_by: "Subject") -> Cell:
        """The result of a task at a length, out of the folder or computed.

        Args:
            task, length: of lm-eval; `None` for a task with documents of their own length.
            limit: documents of each task at most.
            sized_by: the model whose tokenizer sizes the documents.
        """
        made_with = {
            "limit": limit,
            "sized_by": sized_by.results.model["state"],
            "text": source(task),
            "lm_eval": version("lm_eval"),
        }
        return self.results.cell(task, length, made_with, lambda: self.compute(task, length, limit, sized_by))

    def compute(self, task: str, length: int | None, limit: int | None, sized_by: "Subject") -> Cell:
        reader = self.reader
        sizing, folder = sized_by.sizing_tokenizer()
        reason = impossible(task, length, sizing, reader.max_length)
        if reason:
            return Cell(task, length, skipped=reason)
        try:
            loaded = build(task, length, sizing, folder, reader.max_length)
        except (ValueError, OSError) as error:
            return Cell(task, length, skipped=unreachable(error))
        if documents_lack_answers(loaded["tasks"]):
            return Cell(task, length, skipped=f"lm-eval makes no answers at {length} tokens")
        with quiet():
            found = evaluate(
                lm=Cached(reader, Answers(self.results.path / "answers.jsonl")),
                task_dict=loaded,
                limit=limit,
                apply_chat_template=reader.tokenizer.chat_template is not None,
                fewshot_as_multiturn=True,
                bootstrap_iters=0,
            )
        samples = [sample for each in found["samples"].values() for sample in each]
        metric = str(length) if task in RULER else samples[0]["metrics"][0]
        if not isinstance(samples[0][metric], int | float):
            return Cell(task, length, skipped=f"its metric, {metric}, is no mean over documents")
        return Cell(
            task,
            length,
            metric=metric,
            samples=[
                {
                    "document": sample["doc_hash"],
                    "score": float(sample[metric]),
                    "target": sample["target"],
                    "answer": sample["filtered_resps"][0]
                    if len(sample["arguments"]) == 1
                    else sample["filtered_resps"],
                }
                for sample in samples
                if sample["filter"] == samples[0]["filter"]
            ],
            notes=self.notes(task, length, samples),
        )

    def sizing_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Path]:
        """The tokenizer, and a folder that lm-eval can load it from without running code of a repository."""
        folder = self.results.path / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            self.reader.tokenizer.save_pretrained(folder)
        return AutoTokenizer.from_pretrained(folder), folder.resolve()

    def notes(self, task: str, length: int | None, samples: list[dict]) -> list[str]:
        notes = [NOTES[task]] if task in NOTES else []
        if task == "ruler_qa_squad" and length and length < SQUAD_LENGTH:
            notes.append(f"one document in a prompt below {SQUAD_LENGTH:,} tokens")
        prompts = [(sample["arguments"][0][0], sample["arguments"][0][1]) for sample in samples]
        cut = sum(
            len(self.reader.tok_encode(prompt))
            > self.reader.max_length
            - (more.get("max_gen_toks", self.reader.max_gen_toks) if isinstance(more, dict) else 1)
            for prompt, more in prompts
        )
        if cut:
            notes.append(f"{cut} of {len(prompts)} prompts are longer than the model reads, and lost their beginning")
        if self.reader.tokenizer.chat_template is None:
            notes.append("the model has no chat template: plain prompts")
        return notes


def state_of(name: str) -> str | None:
    """What changes with a model's weights; `None` for a Hub model that has not been downloaded.

    Sizes and times of a folder's files, or the commit of a Hub model.
    """
    folder = Path(locate(name))
    if folder.is_dir():
        files = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
        return hashlib.sha256(repr(files).encode()).hexdigest()[:16]
    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # no name that the Hub could have: loading says so
        return None
    return Path(config).parent.name if isinstance(config, str) else None


def quiet_lm_eval() -> None:
    """What matters to a user becomes a note or a reason; lm-eval's own log would drown it."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("datasets").setLevel(logging.ERROR)
