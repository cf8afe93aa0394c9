"""Every launchable kernel compiles for every target, and its compiled code keeps the budgets; no GPU needed."""

import json
import os

import pytest

pytest.importorskip("triton")

from longact_kernels import budgets
from longact_kernels.commands import kernels

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

VARIANTS = list(budgets.variants())


@pytest.mark.parametrize("target", budgets.TARGETS)
@pytest.mark.parametrize("kernel", budgets.KERNELS)
def test_compiles_within_the_budgets(kernel, target):
    limits = budgets.TARGETS[target]
    wrong = []
    for variant in VARIANTS:
        if variant.kernel != kernel or target not in (variant.targets or budgets.TARGETS):
            continue
        b = budgets.budget(variant, target)
        fits = b.spills == 0 and b.shared <= limits.max_shared
        fits &= not variant.memory_bound or b.occupancy >= 0.5
        fits &= not variant.tensor_core or b.tensor_core != ""
        fits &= not variant.aligned or b.load_bits == 128
        if not fits:
            wrong.append(b)
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.main and v.memory_bound], ids=lambda v: v.label)
def test_issues_its_instructions_in_half_the_memory_time(variant, target):
    loop = budgets.main_loop(budgets.compile_variant(variant, target))
    for name, gpu in budgets.GPUS.items():
        if gpu.target == target:
            assert budgets.issue_share(loop, gpu) <= 0.5, name
    if variant.aligned:
        assert budgets.wide_share(loop, index="index_ptr" in variant.types) >= 0.9


def test_labels_are_unique():
    labels = [(v.kernel, v.label, v.targets) for v in VARIANTS]
    assert len(labels) == len(set(labels))


def test_occupancy():
    h100 = budgets.TARGETS["sm_90"]
    # CUDA's occupancy calculator: 64 registers leave 32 of 64 warps, 65 leave 28; 100 KiB leave 2 programs of 4 warps.
    assert budgets._occupancy(h100, 64, 0, 4) == 0.5
    assert budgets._occupancy(h100, 65, 0, 4) == 28 / 64
    assert budgets._occupancy(h100, 32, 100 * 1024, 4) == 8 / 64


def test_the_table_and_its_json(monkeypatch, capsys):
    listed = kernels.rows(None)
    assert {(v.kernel, target) for v, target in listed} == {(k, t) for k in budgets.KERNELS for t in budgets.TARGETS}
    assert len(kernels.rows("sm_90")) > len(listed) / len(budgets.TARGETS)
    monkeypatch.setattr(kernels, "rows", lambda target: listed[:1])
    assert kernels.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiled"][0]["registers"] > 0
    assert {p["gpu"] for p in answer["predicted"]} == set(budgets.GPUS)
    assert kernels.main([]) == 0
    assert "Predicted, not measured" in capsys.readouterr().out


def test_predicted_costs_are_what_the_design_expects():
    h100, work = budgets.GPUS["H100"], budgets.channel_stats_work(32768, 4096, 2)
    projection = 2 * 32768 * 4096 * 4096 / h100.flops
    assert work.seconds(h100) <= 0.07 * projection
    assert work.roofline(h100) >= 0.99
    salient = budgets.sparse_adamw_work(1229, 4096, 2, master=True)
    assert salient.moved <= 0.31 * budgets.sparse_adamw_work(4096, 4096, 2, master=True).minimum


def test_an_unknown_target_is_refused(refused):
    assert "sm_90" in refused("kernels", "--target", "sm_9")
