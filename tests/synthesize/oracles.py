"""A second solver for every task: it reads the question as a person would and shares no code with the generators."""

from __future__ import annotations

import itertools
import re
from collections import Counter


def arithmetic(question: str) -> str:
    (expression,) = re.findall(r"[0-9][0-9+*-]*", question)
    return str(eval(expression))


def boolean_expressions(question: str) -> str:
    options = re.split(r"[?.] ", question, maxsplit=1)[1].split("; ")
    names = {"T": True, "F": False}
    true = [label for label, text in (option.split(": ") for option in options) if eval(text, {}, names)]
    return " ".join(true) or "none"


def dyck_language(question: str) -> str:
    text = question.split(": ")[1].replace(" ", "")
    while (shorter := re.sub(r"\(\)|\[\]|\{\}|<>", "", text)) != text:
        text = shorter
    return text[::-1].translate(str.maketrans("([{<", ")]}>"))


def goods_exchange(question: str) -> str:
    body, swaps = re.split(r"[?.] ", question, maxsplit=1)[1].split(". Swap ")
    symbols = body.split()
    end = {}
    for holder, thing in zip(symbols[::2], symbols[1::2]):  # follow each thing from hand to hand
        for swap in swaps.split(", "):
            pair = swap.split()
            if holder in pair:
                holder = pair[1 - pair.index(holder)]
        end[holder] = thing
    return " ".join(f"{person} {end[person]}" for person in sorted(end))


def object_counting(question: str) -> str:
    head, events = question.split("? ")
    held: Counter[str] = Counter()
    for kind, sign, number in re.findall(r"([a-z]+)([+-])([0-9]+)", events):
        held[kind] += int(number) if sign == "+" else -int(number)
    wanted = re.split(r" and ", re.sub(r"^(How many|Count) ", "", head))
    return str(sum(held[kind] for kind in wanted))


def operation(question: str) -> str:
    meanings_text, expression = re.sub(r"^(Let|Given) ", "", question).split(". Find ")
    meanings = {}
    for text in meanings_text.split("; "):
        plain, conditional, _ = text.partition(" or swapped if x<y")
        meanings[plain[1]] = (plain.split("=")[1], bool(conditional))
    innermost = re.compile(r"(-?[0-9]+)([#@$&])([0-9]+)")
    while (match := innermost.search(expression)) is not None:
        x, symbol, y = int(match[1]), match[2], int(match[3])
        body, swapped = meanings[symbol]
        if swapped and x < y:
            x, y = y, x
        expression = expression.replace(match[0], str(eval(body, {}, {"x": x, "y": y})), 1)
        expression = re.sub(r"\((-?[0-9]+)\)", r"\1", expression)
    return expression


def space_reasoning(question: str) -> str:
    body, walk = re.split(r"[?.] ", question, maxsplit=1)[1].split(". From ")
    places = {label: complex(int(x), int(y)) for x, y, label in re.findall(r"(\d+),(\d+) ([a-z])", body)}
    start, *moves = walk.split()
    position = places[start] if start in places else complex(*map(int, start.split(",")))
    turns = {"R": 1, "L": -1, "U": 1j, "D": -1j}
    position += sum(turns[move[0]] * int(move[1:]) for move in moves)
    (end,) = [label for label, place in places.items() if place == position]
    return end


def web_of_lies(question: str) -> str:
    known, *statements = re.split(r"[?.] ", question, maxsplit=1)[1].split("; ")
    people = [known.split()[0]] + [statement[0] for statement in statements]
    consistent = []
    for kinds in itertools.product((True, False), repeat=len(people)):
        is_true = dict(zip(people, kinds))
        if is_true[known.split()[0]] != (known.split()[1] == "T"):
            continue
        for statement in statements:
            speaker, _, claim = statement.partition(": ")
            a, *rest = claim.split()
            said = (
                is_true[a] == (rest[0] == "T")
                if len(rest) == 1
                else (is_true[a] == is_true[rest[1]]) == (rest[0] == "=")
            )
            if said != is_true[speaker]:
                break
        else:
            consistent.append(is_true)
    (solution,) = consistent  # exactly one, or the problem is not well posed
    return " ".join(person for person in people if solution[person]) or "none"


def word_sorting(question: str) -> str:
    order, words = re.sub(r"^(Alphabet|Order) ", "", question).split(". Sort ")
    spelled = "," in words
    letters = order.replace(" ", "")
    usual = str.maketrans(letters, "".join(chr(ord("A") + place) for place in range(len(letters))))
    listed = [word.replace(" ", "") for word in words.split(",")] if spelled else words.split()
    listed.sort(key=lambda word: word.translate(usual))
    return ", ".join(" ".join(word) for word in listed) if spelled else " ".join(listed)


ORACLES = {
    solver.__name__: solver
    for solver in (
        arithmetic, boolean_expressions, dyck_language, goods_exchange, object_counting, operation, space_reasoning,
        web_of_lies, word_sorting,
    )
}  # fmt: skip
