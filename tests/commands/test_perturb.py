"""`longact perturb`: a clamped model is one whose projections have zero rows and a bias, built here by hand."""

import json

import numpy as np
import pytest
import tiny
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from longact_kernels.cli import main
from longact_kernels.commands.inspect.channels import Statistics, bounds, find_parts, hooked
from longact_kernels.commands.perturb import run as module
from longact_kernels.commands.perturb.command import parser
from longact_kernels.commands.perturb.run import Clamp, Perturbation
from longact_kernels.commands.train.evaluate import evaluate
from longact_kernels.tasks.rewards import string_match

DENSITY, LENGTH, BATCHES = 0.4, 24, 4
COUNT = 3  # of the 8 channels of a head
TEXT = "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: rough winds do shake. "


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model whose channels differ, and a text."""
    root = tmp_path_factory.mktemp("perturb")
    model = tiny.model()
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight.data *= 10 * torch.exp(torch.randn(len(weight), 1))
    model.save_pretrained(root / "model")
    tiny.tokenizer().save_pretrained(root / "model")
    (root / "verse.txt").write_text(TEXT)
    return root


def words(place, *more) -> list[str]:
    fixed = [place / "model", "--text", place / "verse.txt", "--dtype", "float32", "--length", LENGTH]
    fixed += ["--batches", BATCHES, "--density", DENSITY, "--prompts", 2, "--task_length", 450]
    return [*map(str, (*fixed, "--max_completion_length", 4, "--batch_size", 2, *more))]


def perturb(place, out, *more) -> dict:
    assert main(["perturb", *words(place, "--output", out, *more)]) == 0
    return json.loads((out / "perturb.json").read_text())


@pytest.fixture(scope="module")
def plain(place):
    return AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def outputs(plain):
    """What the projections put out on the first half of the batches, [batch, T, N] each."""
    tokenizer = tiny.tokenizer()
    ids = torch.tensor([tokenizer(TEXT[i * LENGTH : (i + 1) * LENGTH])["input_ids"] for i in range(BATCHES // 2)])
    kept, handles = {}, []
    for name, layer in plain.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            hook = layer.register_forward_hook(lambda m, x, y, name=name: kept.update({name: y.detach().numpy()}))
            handles.append(hook)
    plain(ids)
    for handle in handles:
        handle.remove()
    return kept


def ranking(outputs, statistic: str) -> dict[str, np.ndarray]:
    if statistic == "absmax":
        return {name: np.abs(y).max((0, 1)) for name, y in outputs.items()}
    return {name: np.sqrt((y.astype(np.float64) ** 2).sum(1)).mean(0) for name, y in outputs.items()}


def extreme(values: np.ndarray, sign: int) -> list[int]:
    heads = (sign * values).reshape(-1, 8)
    return [h * 8 + c for h, head in enumerate(heads) for c in np.argsort(-head, kind="stable")[:COUNT]]


def surgery(plain, outputs, rows: dict[str, list[int]], mean: str) -> LlamaForCausalLM:
    """The model with those rows of its projections zero, and the mean as their bias."""
    config = type(plain.config)(**{**plain.config.to_dict(), "attention_bias": True})
    made = LlamaForCausalLM(config).float().eval()
    made.load_state_dict(plain.state_dict(), strict=False)
    for name, layer in made.named_modules():
        if getattr(layer, "bias", None) is not None:
            layer.bias.data.zero_()
        if name in rows:
            own = outputs[name].reshape(-1, outputs[name].shape[-1]).mean(0)
            value = own if mean == "channel" else np.full_like(own, own.mean())
            layer.weight.data[rows[name]] = 0
            layer.bias.data[rows[name]] = torch.tensor(value[rows[name]])
    return made


@torch.no_grad()
def losses(model) -> list[float]:
    """Mean negative log-likelihood of a token in each batch of the second half."""
    tokenizer, found = tiny.tokenizer(), []
    for i in range(BATCHES // 2, BATCHES):
        ids = torch.tensor([tokenizer(TEXT[i * LENGTH : (i + 1) * LENGTH])["input_ids"]])
        log_probs = model(ids).logits[0, :-1].log_softmax(-1)
        found.append(-log_probs[torch.arange(LENGTH - 1), ids[0, 1:]].mean().item())
    return found


@pytest.mark.parametrize(("statistic", "mean"), [("absmax", "global"), ("l2", "channel")])
def test_the_losses_are_those_of_a_model_clamped_by_hand(place, plain, outputs, tmp_path, statistic, mean):
    results = perturb(place, tmp_path / "out", "--statistic", statistic, "--mean", mean, "--seeds", "5,6")
    arms = {(arm["channels"], arm["seed"]): arm for arm in results["arms"]}
    assert list(arms) == [("none", None), ("bottom", None), ("random", 5), ("random", 6), ("top", None)]
    values = ranking(outputs, statistic)
    by_hand = {"none": plain}
    for channels, sign in (("top", 1), ("bottom", -1)):
        rows = {name: extreme(found, sign) for name, found in values.items()}
        by_hand[channels] = surgery(plain, outputs, rows, mean)
    for channels, model in by_hand.items():
        arm, wanted = arms[channels, None], losses(model)
        np.testing.assert_allclose(arm["nll"]["verse"], wanted, rtol=2e-5)
        assert arm["perplexity"] == pytest.approx(np.exp(np.mean(wanted)), rel=1e-4)
        assert arm["perplexity of domains"]["verse"] == pytest.approx(arm["perplexity"])
    # No two arms are the same model.
    assert len({arm["perplexity"] for arm in arms.values()}) == 5
    assert (tmp_path / "out" / "perturb.png").read_bytes().startswith(b"\x89PNG")


def test_answers_come_from_the_clamped_model(place, plain, outputs):
    arguments = parser().parse_args(words(place, "--output", place / "unused"))
    perturbation = Perturbation(arguments, Console())
    values = ranking(outputs, "absmax")
    rows = {name: extreme(found, 1) for name, found in values.items()}
    parts = perturbation.subject.parts
    clamped = torch.zeros(bounds(parts)[-1][1], dtype=torch.bool)
    for part, (start, _) in zip(parts, bounds(parts), strict=True):
        clamped[start + torch.tensor(rows[part.name])] = True
    means = torch.cat([torch.tensor(outputs[part.name].reshape(-1, len(part.rows)).mean(0)) for part in parts])
    statistics = Statistics(means, means, means)
    untouched = logits_of(perturbation.subject.model, lambda: perturbation.answer(lambda count: None))
    with hooked(parts, Clamp(clamped, statistics, parts, "channel")):
        clamped_logits = logits_of(perturbation.subject.model, lambda: perturbation.answer(lambda count: None))
    by_hand = surgery(plain, outputs, rows, "channel")
    options = dict(max_completion_length=4, eos_token_id=[1], batch_size=2)
    wanted = logits_of(
        by_hand, lambda: evaluate(by_hand, tiny.tokenizer(), perturbation.prompts, string_match, **options)
    )
    torch.testing.assert_close(clamped_logits, wanted, rtol=1e-4, atol=1e-5)
    assert (untouched - wanted).abs().max() > 0.01


def logits_of(model, answer) -> torch.Tensor:
    """The logits that a model chose its answers' tokens by."""
    kept = []
    handle = model.lm_head.register_forward_hook(lambda m, x, y: kept.append(y.detach()[:, -1]))
    answer()
    handle.remove()
    return torch.cat(kept)


def test_random_channels_come_from_their_seed(place):
    perturbation = Perturbation(
        parser().parse_args(words(place, "--seeds", "0,1", "--output", place / "unused")), Console()
    )
    saliency = torch.arange(float(bounds(perturbation.subject.parts)[-1][1]))
    first, again = (list(perturbation.arms(saliency)) for _ in range(2))
    assert all(torch.equal(a.clamped, b.clamped) for a, b in zip(first, again, strict=True))
    for arm in first:
        per_head = arm.clamped.view(-1, 8).sum(1)
        assert (per_head == (0 if arm.channels == "none" else COUNT)).all()
    _, bottom, one, other, top = (arm.clamped for arm in first)
    assert not (bottom & top).any() and not torch.equal(one, other)


def test_clamping_leaves_other_channels_alone():
    model = tiny.model()
    parts = find_parts(model)
    n = bounds(parts)[-1][1]
    clamped = torch.rand(n, generator=torch.Generator().manual_seed(0)) < 0.3
    statistics = Statistics(torch.zeros(n), torch.zeros(n), torch.arange(float(n)))
    clamp = Clamp(clamped, statistics, parts, "channel")
    for i, (start, end) in enumerate(bounds(parts)):
        output = torch.randn(2, 3, end - start)
        wanted = torch.where(clamped[start:end], torch.arange(float(start), float(end)), output)
        assert torch.equal(clamp(i, output), wanted)


def test_an_interrupt_leaves_the_arms_that_are_done(place, tmp_path, monkeypatch):
    calls = []

    def third_fails(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(module, "evaluate", third_fails)
    assert main(["perturb", *words(place, "--output", tmp_path / "out")]) == 130
    results = json.loads((tmp_path / "out" / "perturb.json").read_text())
    assert [arm["channels"] for arm in results["arms"]] == ["none", "bottom"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--statistic", "max"], "--statistic: got 'max', needed one of"),
        (["--mean", "median"], "--mean: got 'median', needed one of"),
        (["--seeds", "0,x"], "--seeds: got 'x', needed a whole number of at least 0"),
        (["--task", "poetry"], "--task: got 'poetry', needed one of"),
        (["--task_length", "20"], "task_length: got 20, but the shortest prompt"),
        (
            ["--task_length", "2047"],
            "task_length: got 2047, which with max_completion_length 4 is more than the 2048 tokens",
        ),
        (["--prompts", "0"], "--prompts: got '0', needed a whole number of at least 1"),
    ],
)
def test_bad_input_gets_one_line(place, tmp_path, refused, more, message):
    assert message in refused("perturb", *words(place, "--output", tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_smollm2_computes_with_its_top_channels(tmp_path):
    options = ["--length", "256", "--batches", "2", "--prompts", "1", "--output", str(tmp_path / "out")]
    assert main(["perturb", "smollm2", *options]) == 0
    arms = json.loads((tmp_path / "out" / "perturb.json").read_text())["arms"]
    perplexity = {(arm["channels"], arm["seed"]): arm["perplexity"] for arm in arms}
    random = [perplexity["random", seed] for seed in (0, 1, 2)]
    assert perplexity["none", None] < perplexity["bottom", None] < min(random)
    assert max(random) < perplexity["top", None]
