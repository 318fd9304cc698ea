"""Print problems: `python -m stages.synthesize.tasks --task web_of_lies --difficulty 2 --count 3`."""

from __future__ import annotations

import argparse
import random

from stages.synthesize.tasks import LEVELS, TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), help="by default every task")
    parser.add_argument("--difficulty", type=int, choices=LEVELS, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in [options.task] if options.task else TASKS:
        rng = random.Random(options.seed)
        for _ in range(options.count):
            problem = TASKS[name].generate(rng, options.difficulty)
            print(f"[{name}, difficulty {options.difficulty}]")
            print(f"question   {problem.question}\nreasoning  {problem.reasoning}\nanswer     {problem.answer}\n")


if __name__ == "__main__":
    main()
