"""`longact study`: runs the arms of a study in processes side by side, and compares them."""

import argparse
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TaskID

from longact_kernels.commands.console import FAILED, INTERRUPTED, hide_library_bars, progress_bar, refusing
from longact_kernels.commands.study.config import read_study
from longact_kernels.commands.study.jobs import Pretraining, StudyFolder, Training, jobs_of, work
from longact_kernels.commands.study.report import write_results
from longact_kernels.commands.study.tuning import choose_rates, write_tuning

POLL_SECONDS = 0.5

Job = Pretraining | Training


def run(arguments: argparse.Namespace) -> int:
    """Runs a study; returns the exit status: 0, 1 if a run failed, 130 after Ctrl-C.

    Raises:
        Refusal: bad input.
    """
    console = Console()
    hide_library_bars()
    with refusing():
        study = read_study(Path(arguments.study))
        folder = StudyFolder(Path(arguments.output or f"runs/study-{study.name}"))
        bases, runs = jobs_of(study, folder)
        tuning_bases, tuning = jobs_of(study.tuning(), folder)
        with console.status("checking the options of all arms"):
            for job in tuning or runs:
                job.check()
    # Read by the libraries when a process of the study starts; those that pretrain and train share them.
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    failed: list[str] = []
    stopped = False
    # Its processes have to be told, whoever ends it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for title, jobs in (("pretraining", [*tuning_bases, *bases]), ("tuning", tuning)):
            if not failed:
                failed = run_all(title, jobs, arguments.jobs, threads, console)
        if tuning and not failed:
            study = study.with_rates(choose_rates(study, results_of(tuning)))
            runs = jobs_of(study, folder)[1]
            with refusing():
                for job in runs:
                    job.check()
        if not failed:
            failed = run_all("runs", runs, arguments.jobs, threads, console)
    except KeyboardInterrupt:
        stopped = True
    if tried := results_of(tuning):
        write_tuning(study, folder.path, tried, console)
    if results := results_of(runs):
        write_results(study, folder.path, results, console)
    for name in failed:
        console.print(
            f"{name} failed: {last_line(folder.log(name))} ({folder.log(name)})", soft_wrap=True, markup=False
        )
    if stopped or failed:
        done = len(tried) + len(results)
        console.print(f"{done} of {len(tuning) + len(runs)} runs are finished. Run the same command again to continue.")
    return INTERRUPTED if stopped else FAILED if failed else 0


def results_of(runs: Sequence[Training]) -> list[dict]:
    """Those of the runs that are finished."""
    return [run.result() for run in runs if run.is_done]


def run_all(title: str, jobs: Sequence[Job], at_once: int, threads: int, console: Console) -> list[str]:
    """Does the jobs that are not done, some at once; returns the names of those that failed.

    Raises:
        KeyboardInterrupt: Ctrl-C came, and all processes have ended.
    """
    todo = deque(job for job in jobs if not job.is_done)
    failed: list[str] = []
    if not todo:
        return failed
    # One process imports the libraries, and is copied for each job.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["longact_kernels.commands.study.jobs"])
    active: dict[BaseProcess, Job] = {}
    with Bars(title, jobs, console) as bars:
        try:
            while todo or active:
                while todo and len(active) < at_once:
                    job = todo.popleft()
                    process: BaseProcess = context.Process(target=work, args=(job, threads))
                    process.start()
                    active[process] = job
                wait([process.sentinel for process in active], timeout=POLL_SECONDS)
                for process in [process for process in active if not process.is_alive()]:
                    job = active.pop(process)
                    if process.exitcode:
                        failed.append(job.name)
                    elif not job.is_done:  # trained, and to be evaluated
                        todo.appendleft(job)
                bars.update(active.values())
        except KeyboardInterrupt:
            console.print("Stopping: the current runs save a checkpoint. Press Ctrl-C again to stop at once.")
            stop(active)
            raise
    return failed


def stop(processes: Sequence[BaseProcess] | dict[BaseProcess, Job]) -> None:
    """Lets processes end by themselves; a second Ctrl-C kills them."""
    try:
        tell(processes, signal.SIGINT)
        for process in processes:
            process.join()
    except KeyboardInterrupt:
        tell(processes, signal.SIGKILL)
        for process in processes:
            process.join()


def tell(processes: Sequence[BaseProcess] | dict[BaseProcess, Job], number: int) -> None:
    """Sends a signal to processes and to theirs."""
    for process in processes:
        # One that has just started is no group of its own yet; one that has ended is none any more.
        with suppress(ProcessLookupError):
            send: Callable = os.killpg if os.getpgid(process.pid or 0) == process.pid else os.kill
            send(process.pid, number)


class Bars:
    """How far all jobs have come, and those under way."""

    def __init__(self, title: str, jobs: Sequence[Job], console: Console):
        self.title, self.jobs = title, jobs
        self.bars: Progress = progress_bar(console)
        self.rows: dict[str, TaskID] = {}
        self.done = 0

    def __enter__(self) -> "Bars":
        self.bars.start()
        total = sum(job.steps for job in self.jobs)
        self.all = self.bars.add_task(self.title, total=total, note="", completed=self.steps_done())
        self.update([])
        return self

    def __exit__(self, *_):
        self.bars.stop()

    def steps_done(self) -> int:
        return sum(job.steps_done() for job in self.jobs)

    def update(self, active) -> None:
        done = sum(job.is_done for job in self.jobs)
        if done > self.done and not self.bars.console.is_terminal:
            self.bars.console.print(f"{self.title}: {done} of {len(self.jobs)}")
        self.done = done
        self.bars.update(self.all, completed=self.steps_done(), note=f"{done} of {len(self.jobs)}")
        names = {job.name for job in active}
        for name in [name for name in self.rows if name not in names]:
            self.bars.remove_task(self.rows.pop(name))
        for job in active:
            if job.name not in self.rows:
                self.rows[job.name] = self.bars.add_task(f"  {job.name}", total=job.steps, note="")
            steps = job.steps_done()
            note = f"step {steps}/{job.steps}" if isinstance(job, Training) else ""
            self.bars.update(self.rows[job.name], completed=steps, note=note)


def last_line(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines() if path.is_file() else []
    return lines[-1].strip() if lines else "it left no output, as on a full disk"
