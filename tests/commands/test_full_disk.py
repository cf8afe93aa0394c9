"""Disks that are full, and folders that go while they are written to: one line, and what was whole before stays so."""

import json
import shutil
import subprocess

import pytest
import tiny
from safetensors.torch import load_file

from longact_kernels.cli import main
from longact_kernels.commands.train import report
from longact_kernels.commands.train.callbacks import MetricsFile
from longact_kernels.commands.train.checkpoints import flaw

pytestmark = pytest.mark.usefixtures("no_network")


def mount(*words) -> bool:
    return subprocess.run(["mount", *map(str, words)], capture_output=True).returncode == 0


class Disk:
    """A file system of its own at `path`."""

    def __init__(self, path):
        self.path = path

    def leave(self, free: int | None) -> None:
        """Leaves so many KiB free; None for enough."""
        size = 64 * 1024 if free is None else round(shutil.disk_usage(self.path).used / 1024) + free
        assert mount("-o", f"remount,size={size}k", self.path)


@pytest.fixture
def disk(tmp_path):
    (tmp_path / "disk").mkdir()
    if shutil.which("mount") is None or not mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path / "disk"):
        pytest.skip("file systems cannot be mounted here")
    (tmp_path / "disk" / "others").write_bytes(bytes(64 * 1024))  # a size of 0 would be no limit
    yield Disk(tmp_path / "disk")
    subprocess.run(["umount", "-l", tmp_path / "disk"])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a run of two steps, and one of four that nothing came between."""
    root = tmp_path_factory.mktemp("place")
    tiny.save(root / "model")
    for steps in (2, 4):
        assert main(train(root, root / f"run-{steps}", steps)) == 0
    return root


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "both_styles", lambda draw: {})


def train(root, run, steps, *more) -> list[str]:
    options = {"model": root / "model", "output_dir": run, "max_steps": steps, "lr_scheduler_type": "constant"}
    return ["train", *(f"--{key}={value}" for key, value in (options | tiny.SHORT_RUN).items()), *more]


def said(capsys, status: int, *words) -> str:
    """The one line that a command says where it comes to this exit status."""
    assert main([*map(str, words)]) == status
    told = capsys.readouterr().err
    assert "Traceback" not in told
    (line,) = [line for line in told.splitlines() if line.startswith("longact ")]
    assert line.startswith(f"longact {words[0]}: error: ")
    return line


def check_that_it_goes_on(place, run) -> None:
    assert flaw(run / "checkpoint-2") is None
    assert main(train(place, run, 4, "--resume")) == 0
    ours, theirs = (load_file(of / "model" / "model.safetensors") for of in (run, place / "run-4"))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


@pytest.mark.parametrize("free", [0, 40, 300, 500])
def test_training_goes_on_once_there_is_room_again(disk, place, capsys, free):
    run = shutil.copytree(place / "run-2", disk.path / "run")
    disk.leave(free)
    line = said(capsys, 1, *train(place, run, 4, "--resume"))
    assert "No space left" in line or "is the disk full?" in line
    disk.leave(None)
    check_that_it_goes_on(place, run)


@pytest.mark.parametrize("free", [12, 16, 60])
def test_a_finished_training_is_not_lost_with_its_report(disk, place, capsys, free):
    run = shutil.copytree(place / "run-2", disk.path / "run")
    for name in ("summary.json", "report.html", "saliency.safetensors"):
        (run / name).unlink()
    shutil.rmtree(run / "model")
    disk.leave(free)
    said(capsys, 1, *train(place, run, 2, "--resume"))
    disk.leave(None)
    assert main(train(place, run, 2, "--resume")) == 0
    assert (run / "report.html").is_file() and (run / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda run: mount("--bind", run, run) and mount("-o", "remount,ro,bind", run), "Read-only file system"),
        (lambda run: run.rename(run.with_name("elsewhere")), "No such file or directory"),
        (lambda run: shutil.rmtree(run) or run.write_text("mine"), "Not a directory"),
    ],
    ids=["read-only", "moved", "replaced"],
)
def test_a_folder_that_goes_in_mid_run(disk, place, capsys, monkeypatch, change, says):
    run = shutil.copytree(place / "run-2", disk.path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_optimizer_step", lambda *_, **__: bool(change(run)) and None)
        assert says in said(capsys, 1, *train(place, run, 4, "--resume"))
    subprocess.run(["umount", "-l", run], capture_output=True)
    if run.is_dir() or (run := run.with_name("elsewhere")).is_dir():
        check_that_it_goes_on(place, run)


@pytest.mark.slow
def test_evaluations_go_on_once_there_is_room_again(disk, place, capsys):
    pytest.importorskip("lm_eval")
    words = ["eval", place / "model", "--tasks", "niah_single_1", "--lengths", "1024", "--limit", "2", "--output"]
    for free in (0, 40):
        disk.leave(free)
        assert "No space left" in said(capsys, 1, *words, disk.path / "scores")
    disk.leave(None)
    assert main([*map(str, words), str(disk.path / "scores")]) == 0
    assert json.loads((disk.path / "scores" / "results.json").read_text())["cells"][0]["samples"] == 2
