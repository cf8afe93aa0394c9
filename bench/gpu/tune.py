"""Stage 8: `longact tune`, whose table goes to the results' folder."""

import subprocess
import sys

from bench.gpu.stage import Stage


def run(stage: Stage) -> int:
    command = [sys.executable, "-c", "import sys; from longact_kernels.cli import main; sys.exit(main(['tune']))"]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(done.stdout)
    if stage.dry:
        # On a CPU the command refuses; what is tried here is that it starts.
        refused = done.returncode == 2 and "GPU" in done.stdout
        stage.row("tune", result="refused: no GPU" if refused else f"unexpected: {done.stdout[-300:]}")
        return int(not refused)
    stage.row("tune", result="written" if done.returncode == 0 else "failed")
    return done.returncode
