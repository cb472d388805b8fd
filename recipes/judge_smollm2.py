"""A judge on your own machine, asked about pairs whose better answer people have chosen; see judge.md.

python recipes/judge_smollm2.py preferences.jsonl --base-url http://127.0.0.1:8001/v1 --model MODEL --out judged.db

Kill it whenever you like, and start it again: it goes on where it was and pays for nothing twice.
"""

import argparse
import json
import random
from dataclasses import asdict
from pathlib import Path

from dissonance.feedback.annotators.budget import Budget
from dissonance.feedback.annotators.endpoint import EndpointSettings
from dissonance.feedback.annotators.judge import Judge, JudgeSettings
from dissonance.feedback.annotators.judge_prompt import TEMPLATE
from dissonance.feedback.annotators.run import annotate
from dissonance.feedback.store import Store
from dissonance.progress import console
from dissonance.records import Message, Question
from smollm2 import characters, read

SHORT = """Question: {{ turns[-1].text }}

{% for answer in answers %}Answer {{ answer.label }}: {{ answer.text }}

{% endfor %}Which answer is better? Reply with JSON only: {"answer": "A"} or {"answer": "B"}.
"""
"""For the smallest models, which copy a longer prompt instead of following it. Nothing is fenced: not for real use."""


def main() -> None:
    """Judge, and compare with what people chose."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines of prompt, chosen, rejected")
    parser.add_argument("--base-url", required=True)
    parser.add_argument("--model", required=True, help="as the server calls it")
    parser.add_argument("--out", type=Path, required=True, help="the label store")
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--short", action="store_true", help="a prompt for the smallest models")
    parser.add_argument("--max-tokens-total", type=int, default=1_000_000)
    arguments = parser.parse_args()
    questions, chosen = pairs(arguments.file, arguments.pairs)
    endpoint = EndpointSettings(arguments.model, arguments.base_url, max_tokens=64, timeout=600)
    template = SHORT if arguments.short else TEMPLATE
    settings = JudgeSettings(endpoint, concurrency=2, template=template, budget=Budget(arguments.max_tokens_total))
    with Store.open(arguments.out, "judge-recipe") as store:
        store.add_questions(questions)
        judge = Judge(store, settings)
        done = annotate(store, judge, console)
        said = {label.query_id: label.answer.choice for label in store.labels()}
        decided = {query for query, choice in said.items() if choice in {"first", "second"}}
        agreed = sum(said[query] == chosen[query] for query in decided)
        told = {"decided": len(decided), "agrees_with_people": agreed}
        print(json.dumps({**asdict(done), **asdict(judge.summary()), **told}, indent=1))
        judge.close()


def pairs(file: Path, count: int) -> tuple[list[Question], dict[str, str]]:
    """Short pairs, drawn at random, the chosen answer first or second at random; and where it stands."""
    rows = [row for row in read(file) if max(characters(turns) for turns in row.values()) <= 500]
    rng = random.Random(0)
    questions, chosen = [], {}
    for i, row in enumerate(rng.sample(rows, min(count, len(rows)))):
        sides = ["chosen", "rejected"]
        rng.shuffle(sides)
        texts = tuple(row[side][-1]["content"] for side in sides)
        asked = tuple(Message(turn["role"], turn["content"]) for turn in row["chosen"][:-1])
        questions.append(Question(f"q{i:03d}", f"p{i:03d}", "pairwise", asked, (0, 1), (texts[0], texts[1])))
        chosen[f"q{i:03d}"] = "first" if sides[0] == "chosen" else "second"
    return questions, chosen


if __name__ == "__main__":
    main()
