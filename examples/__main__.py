"""`python examples`: one after another and in one process, for what they import takes ten seconds and more.

The fine-tune leaves the base that the next two take. Each alone is `python examples/finetune.py` and so on, as printed.
"""

from __future__ import annotations

import argparse
import runpy
import shlex
import sys
from pathlib import Path

ROWS = "zero-shot,full,lora all 16,prompt 20"
EXAMPLES = (
    ("finetune.py",),
    ("multi_tenant.py", "--steps", "80", "--rounds", "3"),
    ("multi_job.py",),
    ("dialogue_summarization", "--quick", "--seeds", "1", "--only", ROWS, "--out", "out/lab-demo"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python examples", description="all of the demo, minutes of it")
    parser.parse_args()
    for name, *words in EXAMPLES:
        print(f"\n$ python examples/{shlex.join([name, *words])}", flush=True)
        sys.argv = [name, *words]
        try:
            runpy.run_path(str(Path(__file__).parent / name), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise


if __name__ == "__main__":
    main()
