"""What `make gpu` does besides the tests and the benchmarks, as far as a CPU can tell."""

import json

import pytest
import torch

from bench import gpu
from longact_kernels.budgets import GPUS, qwen3_8b

TINY = gpu.Shapes(tokens=8, K=16, N=(20, 10), layers=2, head_dim=10, salient=3)


def test_every_predicted_kernel_has_a_call_to_time():
    assert gpu.calls(TINY, "cpu").keys() == gpu.predict("H100").keys()


def test_calls_run_and_are_timed():
    times = gpu.measure(TINY, "cpu", rounds=2)
    assert all(time > 0 for time in times.values())


def test_predictions_go_by_the_devices_name():
    h100 = gpu.predict("NVIDIA H100 80GB HBM3")
    launches = qwen3_8b().values()
    assert sum(h100.values()) == pytest.approx(sum(1e6 * work.seconds(GPUS["H100"]) for work in launches))
    assert gpu.predict("NVIDIA H200")["channel_stats"] < h100["channel_stats"]
    assert gpu.predict("some other GPU") == {}


def test_writes_json_and_a_picture(tmp_path):
    measured = dict.fromkeys(gpu.calls(TINY, "cpu"), 100.0)
    for predicted in (gpu.predict("H100"), {}):
        report = {"device": "a GPU", "measured_us": measured, "predicted_us": predicted}
        gpu.write(tmp_path, report)
        assert json.loads((tmp_path / "gpu.json").read_text()) == report
        assert (tmp_path / "gpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where there is no GPU")
def test_no_gpu_is_one_line(capsys):
    assert gpu.main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
