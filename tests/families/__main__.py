"""Tries every family with every method, and writes the table of docs/compatibility.md:  python -m tests.families

With names, ``python -m tests.families Llama BERT``, tries these families alone and writes nothing.
"""

from __future__ import annotations

import logging
import sys
import time
import warnings

import torch

from tests.families.cell import METHODS, STEPS, Result, try_cell
from tests.families.table import FAMILIES, PAGE, written


def main() -> None:
    names = sys.argv[1:] or list(FAMILIES)
    if unknown := [name for name in names if name not in FAMILIES]:
        sys.exit(f"no such family: {', '.join(unknown)}; there are: {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("lorank").setLevel(logging.ERROR)
    results: dict[str, dict[str, Result]] = {}
    failed = 0
    began = time.monotonic()
    for name in names:
        results[name] = {}
        for method in METHODS:
            try:
                result = try_cell(FAMILIES[name], method)
            except AssertionError as error:
                failed += 1
                result = Result(f"WRONG: {error}")
            results[name][method] = result
            done = sum(map(len, results.values()))
            print(f"{done:4d}/{len(names) * len(METHODS)} {name}, {method}: {result.says}", flush=True)
    found = [result for row in results.values() for result in row.values()]
    moved = [result for result in found if result.says == "yes"]
    sentence = (
        f"{len(names)} families with {len(METHODS)} methods, {STEPS} steps each: in {len(moved)} of {len(found)} ranks "
        f"moved within the budget and plain PEFT, in another process, computed what the live model did (largest "
        f"difference {max(result.difference for result in found):.0e})."
    )
    print(f"{sentence} {(time.monotonic() - began) / 60:.1f} minutes")
    if failed:
        sys.exit(f"{failed} cells are wrong; the page is as before")
    if not sys.argv[1:]:
        PAGE.write_text(
            written({n: {m: r.says for m, r in row.items()} for n, row in results.items()}, sentence), "utf-8"
        )


if __name__ == "__main__":
    main()
