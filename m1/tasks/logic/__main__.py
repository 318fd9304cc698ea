"""Print problems: `python -m m1.tasks.logic --task web_of_lies --difficulty 2 --count 3`.

With `--tokenizer FILE` print instead how long the problems of each task and level are in tokens, and how many
different ones there are.
"""

from __future__ import annotations

import argparse
import math
import random

from m1.tasks.logic import LEVELS, TASKS

SURVEY_DRAWS = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=sorted(TASKS), help="by default every task")
    parser.add_argument("--difficulty", type=int, choices=LEVELS, default=1)
    parser.add_argument("--count", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json; print lengths and counts")
    options = parser.parse_args()
    names = [options.task] if options.task else list(TASKS)
    if options.tokenizer:
        survey(names, options.tokenizer, options.seed)
        return
    for name in names:
        rng = random.Random(options.seed)
        for _ in range(options.count):
            problem = TASKS[name].generate(rng, options.difficulty)
            print(f"[{name}, difficulty {options.difficulty}]")
            print(f"question   {problem.question}\nreasoning  {problem.reasoning}\nanswer     {problem.answer}\n")


def survey(names: list[str], tokenizer_file: str, seed: int) -> None:
    """Print mean and largest token length of prompt and response, and the estimated number of different problems.

    The estimate is the N at which n draws of N equally likely problems give the d different ones found,
    d = N (1 - exp(-n / N)); where chances differ, there are more.
    """
    from tokenizers import Tokenizer as Backend  # printing problems should not need it

    from m1.tokenizer import Tokenizer

    tokenizer = Tokenizer(Backend.from_file(tokenizer_file))
    print("| task | level | prompt tokens, mean / max | response tokens, mean / max | different problems |")
    print("| --- | --- | --- | --- | --- |")
    for name in names:
        for level in LEVELS[:4]:
            rng = random.Random(seed)
            problems = [TASKS[name].generate(rng, level) for _ in range(SURVEY_DRAWS)]
            rows = [problem.row(with_response=True).to_json() for problem in problems[:500]]
            cells = []
            for key in ("prompt", "response"):
                lengths = [len(tokenizer.encode_chat(str(content[key]))) for content in rows]
                cells.append(f"{sum(lengths) / len(lengths):.0f} / {max(lengths)}")
            different = _population(SURVEY_DRAWS, len({problem.id for problem in problems}))
            print(f"| {name} | {level} | {cells[0]} | {cells[1]} | {different} |")


def _population(draws: int, found: int) -> str:
    if draws - found < 10:
        return f"above {draws**2 // 20:,}"
    low, high = float(found), draws**2 / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle * (1 - math.exp(-draws / middle)) < found else (low, middle)
    return f"about {low:,.0f}"


if __name__ == "__main__":
    main()
