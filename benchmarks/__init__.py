"""Measurements and audits: `python -m benchmarks` times, `python -m benchmarks.audit` compiles."""

import sys
from pathlib import Path

# The tolerance policy lies with the tests. Its folder, for `tests.tolerance` may be found in anybody's package `tests`.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
