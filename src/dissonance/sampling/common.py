"""What holds of completions wherever they are drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from dissonance.errors import DataError
from dissonance.records import Completion


def check_room(lengths: Mapping[str, int], new: int, context: int | None) -> None:
    """Check that prompts leave room for new tokens.

    Args:
        lengths: tokens of each prompt, by prompt_id.
        new: tokens that an answer may have.
        context: positions of the policy; None where it has no limit.

    Raises:
        DataError: some do not.
    """
    too_long = [name for name, length in lengths.items() if context and length + new > context]
    if too_long:
        raise DataError(
            f"{len(too_long)} prompts leave no room for {new} new tokens in the policy's {context} positions "
            f"(the first, {too_long[0]!r}, has {lengths[too_long[0]]} tokens): shorten them or lower max_new_tokens"
        )


def one_likelihood(completions: Sequence[Completion]) -> list[Completion]:
    """Give equal token ids of a prompt the same log-likelihood: rounding must not break a tie."""
    first: dict[tuple[str, tuple[int, ...]], float] = {}
    for c in completions:
        first.setdefault((c.prompt_id, c.token_ids), c.logprob)
    return [replace(c, logprob=first[c.prompt_id, c.token_ids]) for c in completions]
