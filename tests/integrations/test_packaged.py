"""Models that come as packages, against a forward pass in plain torch over what their GGUF file holds."""

from importlib.metadata import PackageNotFoundError, files
from math import sqrt
from pydoc_data.topics import topics

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from longact_kernels.integrations.packaged import PACKAGED
from longact_kernels.integrations.transformers import load_model

GEMMA = PACKAGED["gemma3-270m"]
FULL_EVERY, EPS = 6, 1e-6  # layers of full attention; a file does not say how many


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def rotated(x: Tensor, base: float) -> Tensor:
    """[T, heads, head_dim], the pairs half a head apart."""
    angles = torch.arange(len(x))[:, None] * base ** -torch.linspace(0, 1, x.shape[-1] // 2 + 1)[:-1]
    turn = torch.polar(torch.ones(()), angles)[:, None]
    a, b = x.chunk(2, -1)
    turned = torch.complex(a, b) * turn
    return torch.cat([turned.real, turned.imag], -1)


def logits(path, ids: Tensor) -> Tensor:
    """Those of Gemma 3 in fp32. A file's norm weights are factors, where transformers adds one to its own."""
    file = gguf.GGUFReader(path)
    w = {t.name: torch.from_numpy(np.array(gguf.dequantize(t.data, t.tensor_type))) for t in file.tensors}
    size = {key.removeprefix("gemma3."): field.contents() for key, field in file.fields.items() if "gemma3." in key}
    x = w["token_embd.weight"][ids] * sqrt(size["embedding_length"])
    distance = torch.arange(len(ids))[:, None] - torch.arange(len(ids))
    for i in range(size["block_count"]):
        layer = {name.split(".")[2]: weight for name, weight in w.items() if name.startswith(f"blk.{i}.")}
        full = (i + 1) % FULL_EVERY == 0
        base, seen = (size["rope.freq_base"], len(ids)) if full else (10_000.0, size["attention.sliding_window"])
        h = rms_norm(x, layer["attn_norm"])
        q, k, v = (
            (h @ layer[f"attn_{name}"].T).unflatten(-1, (-1, size["attention.key_length"])) for name in ("q", "k", "v")
        )
        q, k = (rotated(rms_norm(y, layer[f"attn_{n}_norm"]), base).transpose(0, 1) for n, y in (("q", q), ("k", k)))
        mask = (distance >= 0) & (distance < seen)
        y = nn.functional.scaled_dot_product_attention(q, k, v.transpose(0, 1), mask, enable_gqa=True)
        x = x + rms_norm(y.transpose(0, 1).flatten(1) @ layer["attn_output"].T, layer["post_attention_norm"])
        h = rms_norm(x, layer["ffn_norm"])
        y = nn.functional.gelu(h @ layer["ffn_gate"].T, approximate="tanh") * (h @ layer["ffn_up"].T)
        x = x + rms_norm(y @ layer["ffn_down"].T, layer["post_ffw_norm"])
    return rms_norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


def write_gemma(path) -> None:
    """A tiny random Gemma 3 as llama.cpp writes it, with a tokenizer of bytes and small letters."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz"]
    types = [gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * 27
    hidden, inner, head, heads, layers = 32, 48, 256, 4, FULL_EVERY  # transformers takes the head's size as given
    shapes = {"attn_q": (heads * head, hidden), "attn_k": (head, hidden), "attn_v": (head, hidden)}
    shapes |= {"attn_output": (hidden, heads * head), "ffn_down": (hidden, inner)}
    shapes |= {"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "attn_q_norm": (head,), "attn_k_norm": (head,)}
    shapes |= dict.fromkeys(("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"), (hidden,))
    file = gguf.GGUFWriter(path, "gemma3")
    file.add_context_length(64)
    file.add_embedding_length(hidden)
    file.add_block_count(layers)
    file.add_feed_forward_length(inner)
    file.add_head_count(heads)
    file.add_head_count_kv(1)
    file.add_layer_norm_rms_eps(EPS)
    file.add_key_length(head)
    file.add_value_length(head)
    file.add_rope_freq_base(1e6)
    file.add_sliding_window(8)
    file.add_tokenizer_model("llama")
    file.add_token_list(words)
    file.add_token_scores([0.0] * len(words))
    file.add_token_types(types)
    file.add_pad_token_id(0)
    file.add_eos_token_id(1)
    file.add_bos_token_id(2)
    file.add_unk_token_id(3)
    file.add_add_bos_token(True)
    random = np.random.default_rng(0)
    tensors = {"token_embd": (len(words), hidden), "output_norm": (hidden,)}
    tensors |= {f"blk.{i}.{name}": shape for i in range(layers) for name, shape in shapes.items()}
    for name, shape in tensors.items():
        # Of few bits, so that bf16 keeps them, also less one.
        values = random.integers(-16, 17, shape) / 32
        file.add_tensor(f"{name}.weight", (values + 1 if "norm" in name else values).astype(np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longact_kernels"


def test_a_model_in_parts(tmp_path, monkeypatch, cache, no_network):
    """Four installed packages, each with a quarter of the file."""
    write_gemma(tmp_path / "whole.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    quarter = -(-len(whole) // 4)
    for i, package in enumerate(GEMMA.packages):
        name = package.replace("-", "_")
        data, info = tmp_path / "site" / name / "data", tmp_path / "site" / f"{name}-7.0.dist-info"
        data.mkdir(parents=True)
        info.mkdir()
        (data / f"tiny.gguf.part0{i}").write_bytes(whole[i * quarter : (i + 1) * quarter])
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 7.0\n")
        (info / "RECORD").write_text(f"{name}/data/tiny.gguf.part0{i},,\n{name}-7.0.dist-info/METADATA,,\n")
    monkeypatch.syspath_prepend(tmp_path / "site")

    model, tokenizer = load_model("gemma3-270m", dtype="float32")
    ids = tokenizer("a number for you, naïve", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id and tokenizer.decode(ids[0, 1:]) == "a number for you, naïve"
    assert ids.shape[1] > 16  # twice the window of the layers with a short one
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[0], logits(tmp_path / "whole.gguf", ids[0]))

    assert [path.name for path in cache.iterdir()] == ["gemma3-270m-7.0"]
    monkeypatch.setattr("longact_kernels.integrations.packaged.unpack", lambda *_: pytest.fail("unpacked again"))
    load_model("gemma3-270m")


@pytest.mark.parametrize("name", PACKAGED)
def test_absent_packages_are_named_with_their_licence(name, monkeypatch, cache, refused):
    monkeypatch.setitem(PACKAGED, name, PACKAGED[name]._replace(packages=("no-such-package",)))
    for command in (["inspect", name], ["train", "--model", name]):
        line = refused(*command)
        assert f"model: {name} needs the package no-such-package; run pip install gguf" in line
        assert PACKAGED[name].licence in line
    assert not cache.exists()


@pytest.mark.slow
def test_gemma3_270m_computes_what_its_file_says(tmp_path):
    try:
        parts = [file.locate() for package in GEMMA.packages for file in files(package) if ".gguf" in file.name]
    except PackageNotFoundError:
        pytest.skip(GEMMA.install)
    (tmp_path / "whole.gguf").write_bytes(b"".join(part.read_bytes() for part in parts))
    model, tokenizer = load_model("gemma3-270m", dtype="float32")
    ids = tokenizer(topics["assignment"], return_tensors="pt").input_ids[:, :1024]  # twice the short window
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(found[:-1], ids[0, 1:])
            for found in (model(input_ids=ids).logits[0], logits(tmp_path / "whole.gguf", ids[0]))
        ]
    assert losses[1] < 3
    # The checkpoint has rounded the weights to bf16.
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-3, atol=0)
