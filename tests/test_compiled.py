"""Every launchable kernel compiles for every target, and its compiled code keeps the budgets; no GPU needed."""

import json
import os
import re

import pytest

pytest.importorskip("triton")

from longact_kernels.commands import kernels
from longact_kernels.compiled import assembly, budgets, rooflines, variants
from longact_kernels.compiled.targets import GPUS, TARGETS

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

VARIANTS = list(variants.variants())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kernel", variants.KERNELS)
def test_compiles_within_the_budgets(kernel, target):
    limits = TARGETS[target]
    wrong = []
    for variant in VARIANTS:
        if variant.kernel != kernel or target not in (variant.targets or TARGETS):
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
    loop = assembly.main_loop(variants.compile_variant(variant, target))
    for name, gpu in GPUS.items():
        if gpu.target == target:
            assert assembly.issue_share(loop, gpu) <= 0.5, name
    if variant.kernel == "sparse_adamw" and variant.aligned:
        # A thread has four neighbours of each matrix: 24 of 28 bytes travel in 128 bits, the 16-bit ones in 64, and no
        # number changes threads on its way, which would take shared memory and barriers.
        assert assembly.wide_share(loop) >= 0.85 and not any("BAR" in line for line in loop)
    elif variant.aligned:
        assert assembly.wide_share(loop, index="index_ptr" in variant.types) >= 0.9


def test_neighbouring_lanes_pack_neighbouring_slots():
    """A lane with several slots would load, each time, channels far from those of its neighbours."""
    pack = next(variant for variant in VARIANTS if variant.label == "pack bf16")
    ptx = variants.compile_variant(pack, "sm_90").asm["ptx"]
    assert len(re.findall(r"ld\.global[.\w]*\.b64", ptx)) == 1  # the index


def test_a_scattered_tile_lies_within_a_row():
    """Across rows, Triton 3.6 lays the lanes of a gather along them, and changes places in shared memory after it."""
    scatters = [v for v in VARIANTS if v.label in ("scatter bf16 rows", "scatter bf16 columns")]
    assert [variants.compile_variant(v, "sm_90").metadata.shared for v in scatters] == [0, 0]


def test_labels_are_unique():
    labels = [(v.kernel, v.label, v.targets) for v in VARIANTS]
    assert len(labels) == len(set(labels))


def test_occupancy():
    h100 = TARGETS["sm_90"]
    # CUDA's occupancy calculator: 64 registers leave 32 of 64 warps, 65 leave 28; 100 KiB leave 2 programs of 4 warps.
    assert budgets.occupancy(h100, 64, 0, 4) == 0.5
    assert budgets.occupancy(h100, 65, 0, 4) == 28 / 64
    assert budgets.occupancy(h100, 32, 100 * 1024, 4) == 8 / 64


def test_the_table_and_its_json(monkeypatch, capsys):
    listed = kernels.rows(None)
    assert {(v.kernel, target) for v, target in listed} == {(k, t) for k in variants.KERNELS for t in TARGETS}
    assert len(kernels.rows("sm_90")) > len(listed) / len(TARGETS)
    monkeypatch.setattr(kernels, "rows", lambda target: listed[:1])
    assert kernels.main(["--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["compiled"][0]["registers"] > 0
    assert {p["gpu"] for p in answer["predicted"]} == set(GPUS)
    assert kernels.main([]) == 0
    assert "Predicted, not measured" in capsys.readouterr().out


def test_predicted_costs_are_what_the_design_expects():
    h100, work = GPUS["H100"], rooflines.channel_stats_work(32768, 4096, 2)
    projection = 2 * 32768 * 4096 * 4096 / h100.flops
    assert work.seconds(h100) <= 0.07 * projection
    assert work.roofline(h100) >= 0.99
    salient = rooflines.sparse_adamw_work(1229, 4096, 2, master=True)
    whole, compact = (rooflines.sparse_adamw_columns_work(4096, 4096, 1229, 2, form) for form in (False, True))
    # bf16 beside fp32 moments and masters: nearly a dense step's 28 bytes an element; compact, 30% of 26 and all of 2.
    assert 0.97 < whole.moved / (28 * 4096 * 4096) < 1
    assert compact.moved == pytest.approx((0.3 * 26 + 2) * 4096 * 4096, rel=0.01)
    assert salient.moved <= 0.31 * rooflines.sparse_adamw_work(4096, 4096, 2, master=True).minimum


def test_an_unknown_target_is_refused(refused):
    assert "sm_90" in refused("kernels", "--target", "sm_9")
