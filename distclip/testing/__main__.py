"""Check random layouts: `python -m distclip.testing --layouts 2000`."""

from __future__ import annotations

import argparse
import sys
import time

from .cases import random_case
from .check import find_failure
from .world import run_seeds


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if any layout fails."""
    parser = argparse.ArgumentParser(prog="python -m distclip.testing", description=__doc__)
    parser.add_argument("--layouts", type=int, default=200, help="number of layouts (default: 200)")
    parser.add_argument("--ranks", default="2..4", help="numbers of ranks, as 4 or 2..8 (default: 2..4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first layout (default: 0)")
    args = parser.parse_args(argv)
    low, _, high = args.ranks.partition("..")
    sizes = range(int(low), int(high or low) + 1)
    if args.layouts < 1 or not sizes or sizes[0] < 2:
        parser.error(f"--layouts {args.layouts} --ranks {args.ranks}: expected at least 1 layout and 2 ranks")

    num_refused = num_failed = 0
    for i, size in enumerate(sizes):
        seeds = range(args.seed + i, args.seed + args.layouts, len(sizes))
        begin = time.monotonic()
        for seed, answers in run_seeds(size, seeds):
            case = random_case(seed, size)
            num_refused += answers[0].refusal is not None
            if (failure := find_failure(case, answers)) is not None:
                num_failed += 1
                print(f"FAILED: --ranks {size} --seed {seed} --layouts 1\n{case}\n{failure}\n", flush=True)
        print(f"{size} ranks: {len(seeds)} layouts in {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{args.layouts} layouts, {num_failed} failed, {num_refused} refused because they are ambiguous")
    return 1 if num_failed else 0


if __name__ == "__main__":
    sys.exit(main())
