"""Questions and answers in a few words, for lists: completions are A, B, ... as on the page of the question."""

from dissonance.feedback.blind import blind_order, letter
from dissonance.records import Answer, Question

_EXCERPT = 120


def shortened(text: str, most: int = _EXCERPT) -> str:
    """The start of a text on one line, at most `most` characters."""
    line = " ".join(text.split())
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def excerpt(question: Question) -> str:
    """The start of the last user turn, on one line, at most 120 characters."""
    turns = [message.content for message in question.messages if message.role == "user"]
    return shortened((turns or [message.content for message in question.messages] or [""])[-1])


def letters(question: Question) -> dict[int, str]:
    """What the lead's pages call each completion: completion_id -> letter, in the blind order."""
    return {completion_id: letter(place) for place, completion_id in enumerate(blind_order(question))}


def in_words(answer: Answer, question: Question) -> str:
    """An answer in terms of `letters`: `A is better`, `both bad`, `rated 4, safe`, `C > A = B`, `skipped`."""
    named, ids = letters(question), question.completion_ids
    if answer.choice in ("first", "second"):
        return f"{named[ids[0 if answer.choice == 'first' else 1]]} is better"
    if answer.choice is not None:
        return answer.choice.replace("_", " ")
    if answer.ranks is not None:
        levels: dict[int, list[str]] = {rank: [] for rank in sorted(answer.ranks)}
        for completion_id, rank in zip(ids, answer.ranks, strict=True):
            levels[rank].append(named[completion_id])
        return " > ".join(" = ".join(sorted(level)) for level in levels.values())
    rating = [f"rated {answer.rating}"] if answer.rating is not None else []
    safety = [] if answer.safe is None else ["safe" if answer.safe else "unsafe"]
    return ", ".join(rating + safety) or "skipped"
