"""The bookkeeping of tables on streams and under capture, with a stand-in for the GPU that copies in their order."""

import pytest
import torch

from longact_kernels.ops import sparse_adamw, uploads


class Gpu:
    """Does eager copies at once, and captured ones when their graph is replayed."""

    def __init__(self, monkeypatch):
        self.stream, self.capturing, self.made, self.graph = "A", False, [], []
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.stream)
        monkeypatch.setattr(sparse_adamw, "upload", self.upload)

    def upload(self, device, *tables):
        copies = tuple(torch.full_like(table, -1) for table in tables)
        for table, copy in zip(tables, copies, strict=True):
            (self.graph if self.capturing else self.made).append((table, copy))
            if not self.capturing:
                copy.copy_(table)
        return copies

    def replay(self):
        for table, copy in self.graph:
            copy.copy_(table)


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def make():
    pytest.importorskip("triton")
    weight = torch.zeros(8, 16)
    rest = [torch.arange(3)], [torch.zeros(8, 16)], [torch.zeros(8, 16)], [torch.zeros(8, dtype=torch.int32)], []
    numbers = (torch.tensor(1e-3), 0.9, 0.99, 1e-8, 0.0)
    grads = [torch.zeros(8, 16)], [torch.zeros(8, 16)]
    calls = [sparse_adamw.AdamWCall([weight], grad, *rest, *numbers) for grad in grads]
    launcher = sparse_adamw.Launcher(calls[0])
    launcher._device = torch.device("cuda")

    def table(call):
        layout = sparse_adamw.GradLayout.of(call.grads)
        return launcher._on_device(call, layout)[:2]

    def holds(copies, call):
        table, weight_of = copies
        return call.grads[0].data_ptr() in table[0].tolist() and weight_of.tolist() == [0]

    return table, holds, calls


def test_a_step_copies_nothing_until_gradients_move(gpu):
    table, holds, (first, second) = make()
    assert holds(table(first), first)
    made = len(gpu.made)
    assert holds(table(first), first) and len(gpu.made) == made
    assert holds(table(second), second) and len(gpu.made) == made + 1


def test_a_table_is_used_on_the_stream_only_that_copied_it(gpu):
    table, holds, (first, second) = make()
    on_a = table(first)
    gpu.stream = "B"
    on_b = table(first)
    assert all(a is not b for a, b in zip(on_a, on_b, strict=True))
    table(second)
    gpu.stream = "A"
    assert table(first)[0] is on_a[0] and holds(on_a, first)


def test_a_captured_table_is_of_its_graph_only(gpu):
    table, holds, (first, second) = make()
    warm = table(first)
    gpu.capturing = True
    captured = table(first)
    assert captured[0] is not warm[0]
    gpu.capturing = False
    # Between capture and replay an eager step has the table of its own, which no replay writes.
    eager = table(first)
    assert eager[0] is warm[0] and holds(eager, first) and not holds(captured, first)
    moved = table(second)
    gpu.replay()
    assert holds(captured, first) and holds(moved, second)


def test_a_table_first_made_under_capture_is_not_used_outside(gpu):
    table, holds, (first, _) = make()
    gpu.capturing = True
    captured = table(first)
    gpu.capturing = False
    assert not holds(captured, first) and holds(table(first), first)


def test_what_a_graph_copies_from_is_its_own_for_good(monkeypatch):
    monkeypatch.setattr(uploads, "_reserve", torch.zeros(256, dtype=torch.uint8))
    first, second = torch.arange(5), torch.arange(3, dtype=torch.int32)
    pinned = [uploads._from_reserve(table) for table in (first, second, first)]
    pinned[1].fill_(-1)
    assert [held.tolist() for held in pinned] == [first.tolist(), [-1] * 3, first.tolist()]
    assert all(held.data_ptr() % 16 == pinned[0].data_ptr() % 16 for held in pinned)
    assert len(uploads._reserve) == 256 - 48 - 16 - 48
