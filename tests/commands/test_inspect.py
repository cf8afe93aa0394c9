"""`longact inspect` as a user types it, against the same figures computed with numpy from plain forwards."""

import json
from itertools import combinations, product

import numpy as np
import pytest
import tiny
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from longact_kernels.cli import main
from longact_kernels.commands.inspect.text import Domain, load_domains, sequences

pytestmark = pytest.mark.usefixtures("no_network")

DENSITY, LENGTH, BATCHES = 0.4, 32, 3
COUNT = 3  # of the 8 channels of a head: 0.4 × 8, rounded
TEXTS = {
    "verse": "Shall I compare thee to a summer's day? Thou art more lovely and more temperate: " * 3,
    "sums": "".join(f"{a} + {b} = {a + b}; " for a in range(10) for b in range(10)),
}
FAST = ["--dtype", "float32", "--length", LENGTH, "--batches", BATCHES, "--density", DENSITY, "--lengths", "16,64,128"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and two texts in it."""
    root = tmp_path_factory.mktemp("inspect")
    tiny.save(root / "model")
    for name, text in TEXTS.items():
        (root / f"{name}.txt").write_text(text)
    return root


def inspect(*words) -> int:
    return main(["inspect", *map(str, words)])


@pytest.fixture(scope="module")
def found(place):
    out = place / "out"
    assert inspect(place / "model", "--text", place / "verse.txt", place / "sums.txt", *FAST, "--output", out) == 0
    return out


@pytest.fixture(scope="module")
def results(found):
    return json.loads((found / "inspect.json").read_text())


def activations(folder, ids: list[int]) -> dict[str, np.ndarray]:
    """What the query and key projections of a model put out on a text, [T, N] each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "c_attn")):
            module.register_forward_hook(lambda m, x, y, name=name: kept.update({name: y[0].detach().numpy()}))
    model(torch.tensor([ids]))
    return kept


def statistics(y: np.ndarray) -> dict[str, np.ndarray]:
    return {"absmax": np.abs(y).max(0), "l2": np.sqrt((y.astype(np.float64) ** 2).sum(0))}


def chosen(values: np.ndarray) -> set[int]:
    """The channels of largest value of each head of 8."""
    heads = values.reshape(-1, 8)
    return {h * 8 + c for h, head in enumerate(heads) for c in np.argsort(-head, kind="stable")[:COUNT]}


def jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def batches(place):
    """By text, by batch: the statistics of each projection."""
    tokenizer = tiny.tokenizer()
    found = {}
    for name, text in TEXTS.items():
        ids = tokenizer(text)["input_ids"]
        rows = [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(BATCHES)]
        found[name] = [{p: statistics(y) for p, y in activations(place / "model", row).items()} for row in rows]
    return found


def test_magnitudes_are_those_of_a_plain_forward(found, batches):
    kept = load_file(found / "magnitudes.safetensors")
    everything = [batch for text in batches.values() for batch in text]
    assert len(kept) == 2 * len(everything[0]) == 8
    for name in everything[0]:
        kind = name.rpartition(".")[2][0]
        absmax = np.max([batch[name]["absmax"] for batch in everything], axis=0)
        l2 = np.mean([batch[name]["l2"] for batch in everything], axis=0)
        np.testing.assert_allclose(kept[f"{name}.{kind}.absmax"], absmax, rtol=1e-5)
        np.testing.assert_allclose(kept[f"{name}.{kind}.l2"], l2, rtol=1e-5)


def test_overlaps_are_those_of_the_sets(results, batches):
    overlap = results["overlap"]
    names = list(next(iter(batches.values()))[0])
    sets = {
        (text, i, p, s): chosen(batch[p][s])
        for text, found in batches.items()
        for i, batch in enumerate(found)
        for p in names
        for s in ("absmax", "l2")
    }
    same = [jaccard(sets[t, i, p, "absmax"], sets[t, i, p, "l2"]) for t in TEXTS for i in range(BATCHES) for p in names]
    assert overlap["absmax with l2"] == pytest.approx(np.mean(same), abs=1e-6)
    for s in ("absmax", "l2"):
        for a, b in product(TEXTS, repeat=2):
            pairs = [(i, j) for i, j in product(range(BATCHES), repeat=2) if a != b or i != j]
            wanted = np.mean([jaccard(sets[a, i, p, s], sets[b, j, p, s]) for i, j in pairs for p in names])
            assert overlap["domains"][s][a][b] == pytest.approx(wanted, abs=1e-6)
        within = [overlap["domains"][s][a][a] for a in TEXTS]
        assert overlap["between batches"][s] == pytest.approx(np.mean(within))
        assert overlap["between domains"][s] == pytest.approx(overlap["domains"][s]["verse"]["sums"])
        for kind in ("q", "k"):
            layers = [p for p in names if p.endswith(f"{kind}_proj")]
            pairs = [(t, *ij) for t in TEXTS for ij in combinations(range(BATCHES), 2)]
            wanted = [np.mean([jaccard(sets[t, i, p, s], sets[t, j, p, s]) for t, i, j in pairs]) for p in layers]
            np.testing.assert_allclose(overlap["by layer"][kind][f"{s} between batches"], wanted, atol=1e-6)


def test_a_shorter_context_is_the_beginning_of_the_text(place, results):
    ids = tiny.tokenizer()(TEXTS["verse"])["input_ids"]
    runs = [
        {p: statistics(y) for p, y in activations(place / "model", ids[:length]).items()} for length in (16, 64, 128)
    ]
    context = results["context"]["verse"]
    assert context["lengths"] == [16, 64, 128]
    for s in ("absmax", "l2"):
        wanted = [np.mean([jaccard(chosen(run[p][s]), chosen(runs[-1][p][s])) for p in run]) for run in runs]
        np.testing.assert_allclose(context["overlap with the longest"][s], wanted, atol=1e-6)
    absmax = [np.concatenate([run[p]["absmax"] for p in run]).mean() for run in runs]
    np.testing.assert_allclose(context["mean absmax"], absmax, rtol=1e-5)
    rms = [
        np.concatenate([run[p]["l2"] for p in run]).mean() / n**0.5 for run, n in zip(runs, (16, 64, 128), strict=True)
    ]
    np.testing.assert_allclose(context["mean root mean square"], rms, rtol=1e-5)


def test_unevenness_of_a_projection(results, batches):
    first = results["projections"][0]
    everything = [batch[first["name"]] for text in batches.values() for batch in text]
    l2 = np.mean([batch["l2"] for batch in everything], axis=0)
    share = (l2[sorted(chosen(l2))] ** 2).sum() / (l2**2).sum()
    assert first["share of the sum of squares in the l2 set"] == pytest.approx(share, rel=1e-5)
    assert first["absmax of the largest channel"] == pytest.approx(np.max([b["absmax"] for b in everything]), rel=1e-5)
    assert (first["kind"], first["heads"]) == ("q", 4)


def test_pictures_and_what_was_read(found, results):
    for name in ("magnitudes", "overlap", "domains", "context"):
        assert (found / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not (found / "churn.png").exists() and results["churn"] == []
    assert list(results["domains"]) == ["verse", "sums"] and results["density"] == DENSITY
    assert results["versions"]["torch"] == torch.__version__


def test_queries_and_keys_in_one_projection(place, tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=258, n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=1)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny.tokenizer().save_pretrained(tmp_path / "gpt2")
    words = ["--text", place / "verse.txt", *FAST, "--batches", "2", "--output", tmp_path / "out"]
    assert inspect(tmp_path / "gpt2", *words) == 0
    kept = load_file(tmp_path / "out" / "magnitudes.safetensors")
    ids = tiny.tokenizer()(TEXTS["verse"])["input_ids"]
    runs = [activations(tmp_path / "gpt2", ids[i * LENGTH : (i + 1) * LENGTH]) for i in range(2)]
    for name in runs[0]:
        absmax = np.max([np.abs(run[name]).max(0) for run in runs], axis=0)
        np.testing.assert_allclose(kept[f"{name}.q.absmax"], absmax[:16], rtol=1e-5)
        np.testing.assert_allclose(kept[f"{name}.k.absmax"], absmax[16:32], rtol=1e-5)


def test_a_run_with_a_density_for_each_pattern_is_asked_for_one(place, tmp_path, refused):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"density": {"q_proj": 0.3, "": 0.1}}))
    (tmp_path / "run" / "metrics.jsonl").touch()
    message = refused("inspect", tmp_path / "run", "--text", place / "verse.txt", "--output", tmp_path / "out")
    assert "give one with --density" in message and not (tmp_path / "out").exists()


def test_a_run_brings_its_model_its_density_and_its_churn(place, tmp_path):
    run = tmp_path / "run"
    tiny.save(run / "model")
    (run / "run.json").write_text(json.dumps({"density": 0.5}))
    speed = {"seconds_per_step": 1.0, "tokens_per_second": 10.0}
    records = [{"step": 1, "reward": 0.1}, {"step": 2, "reward": 0.2, "churn": 0.25}, {"step": 3, "churn": 0.75}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record | speed) + "\n" for record in records))
    words = [
        "--text",
        place / "verse.txt",
        "--length",
        16,
        "--batches",
        2,
        "--lengths",
        16,
        "--output",
        tmp_path / "out",
    ]
    assert inspect(run, *words) == 0
    results = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert results["churn"] == [{"step": 2, "churn": 0.25}, {"step": 3, "churn": 0.75}]
    assert results["density"] == 0.5
    assert (tmp_path / "out" / "churn.png").is_file()


def test_the_default_texts_need_no_file():
    first = [[piece for piece, _ in zip(domain.pieces(), range(3), strict=False)] for domain in load_domains([])]
    again = [[piece for piece, _ in zip(domain.pieces(), range(3), strict=False)] for domain in load_domains([])]
    assert first == again and len(first) == 3 and all(map(all, first))


def test_a_sequence_begins_as_the_tokenizer_begins_a_text():
    tokenizer = tiny.tokenizer()
    domain = Domain("letters", "here", lambda: iter(["abcd", "efgh"]))
    letters = tokenizer("abcdef")["input_ids"]
    assert sequences(domain, tokenizer, 2, 3).flatten().tolist() == letters

    class Beginning:
        bos_token_id = 99

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [99] * add_special_tokens + tokenizer(text)["input_ids"]}

    assert sequences(domain, Beginning(), 2, 3).tolist() == [[99, *letters[:2]], [99, *letters[2:4]]]


def test_a_folder_is_one_text_and_binary_files_are_passed_over(tmp_path):
    for name, content in {"b/2.md": b"two", "a.txt": b"one ", "c.bin": b"\xff\xfe\x00"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (domain,) = load_domains([str(tmp_path)])
    assert "".join(domain.pieces()) == "one two" and domain.name == tmp_path.name


def test_two_texts_of_one_name_go_by_their_paths(tmp_path):
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "book.txt").write_text("text")
    paths = [str(tmp_path / folder / "book.txt") for folder in ("x", "y")]
    assert [domain.name for domain in load_domains(paths)] == paths


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "missing.txt"], "text: found no file or folder missing.txt"),
        (["--text", "empty"], "text: empty holds no text"),
        (["--text", "verse.txt", "--length", "1024"], "text: verse (verse.txt) has 243 tokens, needed 2,048"),
        (["--length", "4096"], "length: got 4096, but the model reads 2048 tokens at most"),
        (["--lengths", "64,4096"], "lengths: got 4096, but the model reads 2048 tokens at most"),
        (["--lengths", "64,much"], "--lengths: got 'much', needed a whole number of at least 16"),
        (["--batches", "1"], "--batches: got '1', needed a whole number of at least 2"),
        (["--density", "1.5"], "density: got 1.5, needed a share above 0 and up to 1"),
        (["--colour"], "there is no option '--colour'"),
        (["--output", "held"], "output: held exists and is not an empty folder"),
        (["--dtype", "float8"], "--dtype: got 'float8', needed one of"),
    ],
)
def test_bad_input_gets_one_line(place, tmp_path, monkeypatch, refused, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "note").write_text("mine")
    (tmp_path / "verse.txt").write_text(TEXTS["verse"])
    held = sorted(tmp_path.rglob("*"))
    assert message in refused("inspect", place / "model", "--batches", "2", *words)
    assert sorted(tmp_path.rglob("*")) == held


def test_a_run_that_has_not_finished(tmp_path, refused):
    (tmp_path / "run.json").write_text("{}")
    assert "has not finished; continue it with longact train --resume" in refused("inspect", tmp_path)


def test_nan_names_the_projection(place, tmp_path, refused):
    model = tiny.model()
    model.model.layers[1].self_attn.k_proj.weight.data[3, 2] = torch.nan
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    words = ["--text", place / "verse.txt", *FAST, "--output", tmp_path / "out"]
    message = refused("inspect", tmp_path / "model", *words)
    assert "NaN or Inf in the output of model.layers.1.self_attn.k_proj" in message
