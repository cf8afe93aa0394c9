"""The table of `longact tune`: what it chooses from timings, how it is kept, and what happens without a GPU."""

import io
import json
from pathlib import Path

import pytest
import torch

from longact_kernels import LongActWarning
from longact_kernels.commands import tune
from longact_kernels.ops import impl_table
from longact_kernels.ops.impl_table import choose


def timing(M, N, K, fused, separate, dtype="bfloat16"):
    return dict(dtype=dtype, M=M, N=N, K=K, linear_ms=1.0, fused_ms=fused, separate_ms=separate)


@pytest.fixture
def table_file(tmp_path, monkeypatch):
    path = tmp_path / "cache" / "tune.json"
    monkeypatch.setenv("LONGACT_TUNE", str(path))
    impl_table.measured.cache_clear()
    yield path
    impl_table.measured.cache_clear()


def test_the_nearest_measured_shape_decides():
    table = {"GPU": [timing(4096, 4096, 4096, 1.0, 2.0), timing(32768, 1024, 4096, 2.0, 1.0)]}
    assert choose(table, "GPU", "bfloat16", 4096, 4096, 4096) == "fused"
    assert choose(table, "GPU", "bfloat16", 8000, 4096, 5120) == "fused"
    assert choose(table, "GPU", "bfloat16", 65536, 2048, 4096) == "separate"


def test_other_gpus_and_dtypes_do_not_decide():
    table = {"GPU": [timing(4096, 4096, 1024, 1.0, 2.0)]}
    assert choose(table, "GPU", "bfloat16", 4096, 4096, 1024) == "fused"
    assert choose(table, "other", "bfloat16", 4096, 4096, 1024) == "separate"
    assert choose(table, "GPU", "float16", 4096, 4096, 1024) == "separate"


def test_the_table_is_kept_by_gpu(table_file):
    assert impl_table.measured() == {}
    tune.save({"first": [timing(1, 2, 3, 4.0, 5.0)]})
    tune.save({**impl_table.measured(), "second": []})
    assert impl_table.measured() == {"first": [timing(1, 2, 3, 4.0, 5.0)], "second": []}
    assert [file.name for file in table_file.parent.iterdir()] == ["tune.json"]


@pytest.mark.parametrize("content", ["{", "[]", json.dumps({"GPU": [{"M": 1}]})])
def test_an_unreadable_table_is_reported_and_left_alone(table_file, content):
    table_file.parent.mkdir()
    table_file.write_text(content)
    with pytest.warns(LongActWarning, match="tune.json cannot be read .* run `longact tune` again"):
        assert impl_table.measured() == {}
    assert table_file.read_text() == content


def test_where_the_table_lies(monkeypatch):
    monkeypatch.delenv("LONGACT_TUNE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert impl_table.table_path() == Path("/somewhere/longact_kernels/tune.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert impl_table.table_path() == Path.home() / ".cache" / "longact_kernels" / "tune.json"


def test_the_report_shows_ratios_to_the_product_alone():
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(tune.report("GPU", [timing(4096, 1024, 2048, 1.25, 1.5)]))
    text = console.export_text()
    assert "1.250" in text and "1.500" in text and "fused" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(refused, table_file):
    assert "needs a CUDA or ROCm GPU" in refused("tune")
    assert not table_file.exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_measures_on_a_gpu(monkeypatch, table_file, capsys):
    monkeypatch.setattr(tune, "SHAPES", [(256, 256)])
    monkeypatch.setattr(tune, "TOKENS", (1024,))
    assert tune.main([]) == 0
    (timings,) = impl_table.measured().values()
    assert len(timings) == 2 and all(t["fused_ms"] > 0 and t["separate_ms"] > 0 for t in timings)
