"""How often are findings found where there is nothing, and where something was planted?

    python benchmarks/findings.py                       # digits, small models: about an hour on one core
    python benchmarks/findings.py nulls --repeats 5     # fewer models of each kind
    MNIST_DIR=... python benchmarks/findings.py --mnist # the default model on MNIST, five models of each kind

Claims, roles, needed heads and trusted maps of models and maps of which none should have any, and of those in which
something was planted. All are judged as if their accuracy were above chance; how many pass that gate has a column of
its own. No model that is judged has the seed of a control. Rates have the upper end of their 95% interval (Wilson).
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import Any

from parts import option_parser, parse
from tables import machine, table, versions

PARTS = ("nulls", "truths")
MODELS, MODELS_MNIST = 20, 5
COLUMNS = {
    "claims": "any claim",
    "roles": "any role",
    "needed": "a needed head",
    "trusted": "a trusted map",
    "gate": "accuracy above chance",
}


def rate(count: Any) -> str:
    from attention_visualizer.measures.intervals import share_interval

    if count is None or not count.total:
        return "–"
    share = share_interval(count.found, count.total)
    return f"{count.found} of {count.total}: {float(share.value):.0%} (at most {float(share.high):.0%})"


def null_table(nulls: list[Any], markdown: bool) -> str:
    """One row for each kind, and one for all kinds together; below it, what was found."""
    rows = [[each.kind, *(rate(getattr(each, column)) for column in COLUMNS)] for each in nulls]
    totals = [rate(total([getattr(each, column) for each in nulls])) for column in list(COLUMNS)[:-1]]
    rows.append(["all together", *totals, "–"])
    lines = [table(("nothing to be found", *COLUMNS.values()), rows, markdown)]
    for each in nulls:
        for column in list(COLUMNS)[:-1]:
            found = Counter(getattr(each, column).what) if getattr(each, column) else {}
            lines += [f"{each.kind}: {name}, {times}" for name, times in found.items()]
        if each.trusted_without_gate and each.trusted_without_gate.found:
            found = ", ".join(sorted(set(each.trusted_without_gate.what)))
            lines.append(f"{each.kind}: without the gate, a trusted map of {rate(each.trusted_without_gate)}: {found}")
    return "\n".join(lines)


def total(counts: list[Any]) -> Any:
    from planted_kinds import Count

    known = [each for each in counts if each is not None]
    return Count(sum(each.found for each in known), sum(each.total for each in known))


def truth_table(truths: list[Any], markdown: bool) -> str:
    rows = [[each.planted, each.size, f"{each.count.found} of {each.count.total}"] for each in truths]
    return table(("planted", "size", "found"), rows, markdown)


def main() -> None:
    parser = option_parser(__doc__, PARTS, "one model of each kind, smaller", repeats=MODELS)
    parser.add_argument("--mnist", action="store_true", help=f"the default model on MNIST; --repeats {MODELS_MNIST}")
    parser.add_argument("--trust", type=int, default=3, help="models whose maps are tested (default: 3)")
    parser.add_argument("--first", type=int, default=0, help="added to all seeds but the controls' (default: 0)")
    parser.add_argument("--only", default="", help="a regular expression: only kinds whose names it matches")
    options = parse(parser, PARTS)
    from planted import DIGITS, MNIST, QUICK, Setting
    from planted_kinds import Kinds

    print(f"{versions('torch', 'scikit-learn')}; {machine()}\n", flush=True)
    recipe = QUICK if options.quick else MNIST if options.mnist else DIGITS
    models = MODELS_MNIST if options.mnist and options.repeats == MODELS else options.repeats
    kinds = Kinds(Setting.of(recipe), models, min(models, options.trust), options.first)
    for part, make, show in (("nulls", kinds.nulls, null_table), ("truths", kinds.truths, truth_table)):
        if part in options.parts:
            found = []
            for name, count in make().items():
                if re.search(options.only, name):
                    found.append(count())
                    print(found[-1], file=sys.stderr, flush=True)
            print(show(found, options.markdown), flush=True)
            print(flush=True)


if __name__ == "__main__":
    main()
