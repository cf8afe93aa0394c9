"""`python -m bench.gpu.trials TRIAL CANDIDATE`: compiles a candidate and checks it; fails if it is wrong."""

import sys

from bench.gpu.stage import prepare_interpreter
from bench.gpu.trials import check

prepare_interpreter()
check(*sys.argv[1:])
