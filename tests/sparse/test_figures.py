"""The picture of a controller shows its numbers."""

import sys

import numpy as np
import pytest
from models import backward, tiny_model, tokens

from longact_kernels import LongAct, SalientAdamW
from longact_kernels.sparse.figures import report_figure


def trained(steps=2, **options):
    model = tiny_model()
    longact = LongAct(model, **options)
    optimizer = SalientAdamW(model.parameters(), lr=1e-2)
    for step in range(steps):
        backward(model, tokens(seed=step))
        optimizer.step()
        optimizer.zero_grad()
    return longact


def test_maps_and_lines_are_the_reports(tmp_path):
    longact = trained()
    report = longact.report()
    figure = longact.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels[:2]] == ["q_proj", "k_proj"]
    for axes in panels[:2]:
        layers = [layer for name, layer in report.items() if name.endswith(axes.get_title())]
        everything, coloured = (image.get_array() for image in axes.images)
        assert np.array_equal(everything, [layer["saliency"] for layer in layers])
        assert [np.flatnonzero(~row).tolist() for row in coloured.mask] == [of["salient"].tolist() for of in layers]
        assert all(layer["heads"] == [10] * (len(layer["saliency"]) // 10) for layer in layers)
        lines = [line for other in panels[2:] for line in other.lines if line.get_label() == axes.get_title()]
        assert [line.get_ydata().tolist() for line in lines] == [
            [layer[name] for layer in layers] for name in ("churn", "overlap")
        ]


def test_layers_of_different_widths_and_sets_without_a_churn_yet():
    longact = trained(steps=1, axis="columns")
    report = longact.report()
    name = next(iter(report))
    report[name] = {**report[name], "saliency": report[name]["saliency"][:7], "salient": np.array([3])}
    figure = report_figure(report)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert len(titles) == 3 and not any("churn" in title for title in titles)
    assert figure.axes[0].images[0].get_array().mask[0].sum() == 32 - 7


def test_what_is_missing_is_said(monkeypatch):
    longact = LongAct(tiny_model())
    with pytest.raises(RuntimeError, match=r"^plot: there is no salient set yet"):
        longact.plot()
    monkeypatch.setitem(sys.modules, "longact_kernels.sparse.figures", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        longact.plot()
