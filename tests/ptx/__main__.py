"""Runs what ships from its PTX, warps one by one in random order, and prints what was noticed as JSON.

    PYTHONPATH=tests:kernels python -m ptx [--arch sm_90] [--only "layer_norm bf16*"] [--seed 0]

Without TRITON_INTERPRET. Exit code 0 when nothing was noticed, 1 when something was.
"""

import argparse
import json
import sys
import time
from fnmatch import fnmatchcase

import torch
from fastgpt_kernels.audit import shipped

from .launch import executing

# No tile depends on it, and no more divides it than divides GPT-2's, with which the head alone would take minutes.
_VOCABULARY = 1041


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx", description="What ships, from its PTX on this CPU.")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--only", default="*", help='calls by operation and label, such as "layer_norm bf16*"')
    parser.add_argument("--seed", type=int, default=0, help="of the order in which warps run")
    options = parser.parse_args()
    shipped._VOCABULARY = _VOCABULARY
    torch.manual_seed(0)
    torch.set_num_threads(1)

    kernels, problems, n_launches, started = set(), [], 0, time.perf_counter()
    for call in shipped.calls(options.arch):
        if not fnmatchcase(f"{call.operation} {call.label}", options.only):
            continue
        with executing(options.arch, n_multiprocessors=3, warps=True, seed=options.seed) as session:
            call.run()
        n_launches += len(session.launches)
        kernels |= {launch.kernel for launch in session.launches}
        for (kernel, kind, instruction), (times, example) in session.problems().items():
            problems.append(
                f"{call.operation} {call.label}: {kernel}: {kind} ({times} times; {example}): {instruction}"
            )
        print(f"{time.perf_counter() - started:.0f} s: {call.operation} {call.label}", file=sys.stderr, flush=True)
    print(json.dumps({"launches": n_launches, "kernels": sorted(kernels), "problems": problems}))
    return 1 if problems or not n_launches else 0


if __name__ == "__main__":
    sys.exit(main())
