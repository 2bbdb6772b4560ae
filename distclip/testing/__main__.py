"""Check random layouts and explore schedules: `python -m distclip.testing --layouts 2000` or `--schedules 1000000`."""

from __future__ import annotations

import argparse
import sys
import time

from ..errors import ArgumentError
from .cases import random_case
from .check import find_failure
from .processes import run_seeds
from .sampling import all_scenarios, explore_all, sample_in_processes
from .simulation import check_memory


def main(argv: list[str] | None = None) -> int:
    """Run the command line, and return the exit status: 1 if anything fails."""
    parser = argparse.ArgumentParser(prog="python -m distclip.testing", description=__doc__)
    parser.add_argument("--layouts", type=int, help="number of random layouts (default: 200, without other options)")
    parser.add_argument("--schedules", type=int, help="number of random schedules at 8 to 64 ranks")
    parser.add_argument("--exhaustive", action="store_true", help="all interleavings of three ranks")
    parser.add_argument("--ranks", help="numbers of ranks, as 4 or 2..8 (default: 2..4 for layouts)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first layout or schedule (default: 0)")
    parser.add_argument("--processes", type=int, default=2, help="processes for schedules (default: 2)")
    args = parser.parse_args(argv)
    low, _, high = (args.ranks or "2..4").partition("..")
    sizes = range(int(low), int(high or low) + 1)
    if args.layouts is None and args.schedules is None and not args.exhaustive:
        args.layouts = 200
    if min(args.layouts or 1, args.schedules or 1, args.processes) < 1 or not sizes or sizes[0] < 2:
        parser.error(f"{' '.join(argv or sys.argv[1:])}: expected at least 1 layout, schedule and process, and 2 ranks")
    try:
        check_memory(sizes[-1])
    except ArgumentError as error:
        parser.error(f"--ranks {args.ranks}: {error}")
    has_failed = False
    if args.layouts is not None:
        has_failed |= _check_layouts(args.layouts, sizes, args.seed)
    if args.exhaustive:
        has_failed |= _exhaust()
    if args.schedules is not None:
        has_failed |= _sample(args.schedules, args.seed, args.processes, None if args.ranks is None else sizes)
    return 1 if has_failed else 0


def _check_layouts(num_layouts: int, sizes: range, first_seed: int) -> bool:
    num_refused = num_failed = 0
    for i, size in enumerate(sizes):
        seeds = range(first_seed + i, first_seed + num_layouts, len(sizes))
        begin = time.monotonic()
        for seed, answers in run_seeds(size, seeds):
            case = random_case(seed, size)
            num_refused += answers[0].refusal is not None
            if (failure := find_failure(case, answers)) is not None:
                num_failed += 1
                print(f"FAILED: --ranks {size} --seed {seed} --layouts 1\n{case}\n{failure}\n", flush=True)
        print(f"{size} ranks: {len(seeds)} layouts in {time.monotonic() - begin:.0f} s", flush=True)
    print(f"{num_layouts} layouts, {num_failed} failed, {num_refused} refused because they are ambiguous")
    return num_failed > 0


def _exhaust() -> bool:
    begin, scenarios = time.monotonic(), all_scenarios()
    totals = explore_all(scenarios)
    for finding in totals.findings:
        print(f"FAILED: {finding}\n", flush=True)
    print(
        f"{len(scenarios)} scenarios of 3 ranks, {totals.schedules:.3g} interleavings in {totals.states} states, "
        f"{totals.runs} runs of a rank, {len(totals.findings)} failed, "
        f"{'all complete' if totals.is_complete else f'{totals.num_cut} cut short'}, {time.monotonic() - begin:.0f} s"
    )
    return bool(totals.findings)


def _sample(num_schedules: int, first_seed: int, num_processes: int, sizes: range | None) -> bool:
    begin = time.monotonic()
    totals = sample_in_processes(num_schedules, first_seed, num_processes, sizes)
    for finding in totals.findings:
        print(f"FAILED: --schedules 1 --seed {finding.seed}\n{finding}\n", flush=True)
    print(
        f"{totals.schedules} schedules, {totals.states} store operations in them, {totals.runs} runs of a rank, "
        f"{len(totals.findings)} failed, {time.monotonic() - begin:.0f} s in {num_processes} processes"
    )
    return bool(totals.findings)


if __name__ == "__main__":
    sys.exit(main())
