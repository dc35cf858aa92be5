"""Everything that people feed the package, damaged by chance: 200,000 cases of tables, configs,
images, archives, run folders, weights, caches, plugins' names, reports and whole command lines.

A case passes if its call returns or raises the package's own error (a command: exits with 0, 1, 2
or 130, without a traceback and without control characters), writes nothing outside of its run
folder, cache and output, connects to nothing and starts nothing, and stays within bounds of memory
and time. `accepted`: cases whose input was taken as sound.

--only takes names of targets, with commas. --case TARGET:SEED repeats one case and prints what
happened.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from harness import Options, Results

from benchmarks.sides.fuzz_guard import Batch, Target, Verdict
from benchmarks.sides.fuzz_targets import all_targets, started

CASES = 200_000
_BATCH = 500
Verdicts = dict[str, list[Verdict]]


def fuzz(targets: Sequence[Target], cases: int, root: Path, workers: int) -> Verdicts:
    """Every target's share of the cases, in batches that the workers take in turn."""
    batches = []
    whole = sum(target.share for target in targets)
    for target in targets:
        count = max(1, round(cases * target.share / whole))
        size = min(_BATCH, max(10, count // 20))
        batches += [(target, range(at, min(at + size, count))) for at in range(0, count, size)]
    batches.sort(key=lambda batch: batch[1].start / batch[0].share)  # the targets end together

    def work(worker: int) -> None:
        box, known = root / f"box{worker}", set[tuple[str, str]]()
        with (root / f"verdicts{worker}").open("w", encoding="utf-8") as file:
            for target, seeds in batches[worker::workers]:
                for verdict in Batch(target, seeds, box).run():
                    file.write(json.dumps([target.name, asdict(verdict)]) + "\n")
                    kind = target.name, verdict.fault
                    if verdict.fault and kind not in known:
                        known.add(kind)
                        print(f"{target.name}:{verdict.seed} {verdict.fault}\n{verdict.detail}",
                              file=sys.stderr, flush=True)  # fmt: skip

    pids = [started(lambda worker=worker: work(worker)) for worker in range(workers)]
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    assert not any(ends), f"workers ended with {ends}"
    found: Verdicts = {target.name: [] for target in targets}
    for worker in range(workers):
        for line in (root / f"verdicts{worker}").read_text(encoding="utf-8").splitlines():
            name, verdict = json.loads(line)
            found[name].append(Verdict(**verdict))
    return found


def table(verdicts: Verdicts, results: Results) -> None:
    """A row for each target, one for all, and one for each kind of fault."""
    for name, cases in verdicts.items():
        results.add("fuzz", target=name, **_counts(cases))
    every = [case for cases in verdicts.values() for case in cases]
    results.add("fuzz", target="all", **_counts(every))
    for name, cases in verdicts.items():
        kinds = Counter(case.fault for case in cases if case.fault)
        first = {case.fault: case.seed for case in reversed(cases)}
        for fault, count in kinds.most_common():
            results.add("faults", case=f"{name}:{first[fault]}", cases=count, fault=fault)
    results.at_least("cases", CASES, len(every))
    results.at_most("cases with a fault", 0, sum(bool(case.fault) for case in every))


def _counts(cases: Sequence[Verdict]) -> dict[str, int | float]:
    faults = [case.fault for case in cases if case.fault]
    outside = sum("outside" in fault or fault.startswith(("socket", "os.")) for fault in faults)
    hangs = sum(fault.startswith(("hangs", "took", "memory")) for fault in faults)
    return {
        "cases": len(cases),
        "accepted": sum(case.accepted for case in cases),
        "tracebacks": len(faults) - outside - hangs,
        "hangs or memory": hangs,
        "outside": outside,
        "most MB": max(case.grown for case in cases) >> 20,
        "longest s": round(max(case.seconds for case in cases), 2),
        "all s": round(sum(case.seconds for case in cases)),
    }


def _repeat(case: str, targets: Sequence[Target], root: Path) -> None:
    name, _, seed = case.rpartition(":")
    [target] = [target for target in targets if target.name == name]
    [verdict] = Batch(target, [int(seed)], root / "box0").run()
    print(f"{case}: {verdict.fault or 'nothing wrong'}; accepted: {verdict.accepted}")
    print(verdict.detail or f"{verdict.seconds:.2f} s, {verdict.grown >> 20} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_AsWritten)
    parser.add_argument("--quick", action="store_true", help="2,000 cases")
    parser.add_argument("--cases", type=int, help=f"default: {CASES:,}")
    parser.add_argument("--only", help="names of targets, with commas")
    parser.add_argument("--case", metavar="TARGET:SEED", help="repeat one case")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/)")
    given = parser.parse_args()
    cases = given.cases or (2_000 if given.quick else CASES)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        root = Path(folder).resolve()
        targets = all_targets(root)
        if given.case is not None:
            _repeat(given.case, targets, root)
            return
        if given.only is not None:
            asked = given.only.split(",")
            targets = tuple(target for target in targets if target.name in asked)
        results = Results("fuzz")
        table(fuzz(targets, cases, root, len(os.sched_getaffinity(0))), results)
    partly = given.quick or given.cases is not None or given.only is not None
    results.publish(Options(partly, given.out))


_AsWritten = argparse.RawDescriptionHelpFormatter

if __name__ == "__main__":
    main()
