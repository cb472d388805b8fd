"""The sandbox's tokenizer, policy and proxy, trained from scratch on the CPU; ordinary Hugging Face folders.

The seed decides everything: the random state of the caller is neither read nor changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from torch.nn.functional import logsigmoid
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from dissonance.sandbox.answers import Demonstration, Preference, demonstrations, preferences
from dissonance.sandbox.gold import words
from dissonance.sandbox.words import OPENINGS, REASONS
from dissonance.sandbox.world import World

MAX_LENGTH = 128
"""Positions of both models; a prompt with its answer takes about 30."""

BATCH_SIZE = 16
"""Sequences, or pairs, per step: at this size many small steps learn more per second than few large ones."""

LEARNING_RATE = 1e-3
EMBEDDING_LEARNING_RATE = 1e-2
"""Higher, since a word's embedding gets a gradient only from the few sequences that hold the word."""

IGNORED = -100
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

Loss = Callable[[PreTrainedModel, slice], torch.Tensor]
"""From a model and the positions of a batch's examples to a mean loss."""


def make_tokenizer(world: World) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the task's closed vocabulary; text decodes to words with single spaces between."""
    said = [*OPENINGS, *REASONS, "first then it is : , . ? i can not help"]
    for category in world.categories:
        said += [*category.objects, *category.actions, *category.steps]
    content = sorted(set(words(" ".join(said).replace("{action}", "").replace("{subject}", ""))))
    vocabulary = {word: i for i, word in enumerate([*_SPECIAL.values(), *_ROLES, *content])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=_SPECIAL["unk_token"]))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **_SPECIAL,
        additional_special_tokens=list(_ROLES),
        chat_template=_CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        padding_side="left",
    )


def train_policy(world: World, folder: Path) -> None:
    """Supervised fine-tuning of a new Llama on `demonstrations(world)`, saved with its tokenizer."""
    tokenizer = make_tokenizer(world)
    with _reproducible(world.seed):
        model = LlamaForCausalLM(_config(tokenizer))
        _fit(model, world.n_demonstrations, _imitation_loss(tokenizer, demonstrations(world)))
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_proxy(world: World, folder: Path) -> None:
    """Bradley-Terry training of a new Llama with one output on `preferences(world)`, saved with its tokenizer.

    In a helpfulness world the output is a reward, in a safety world a cost (higher is worse).
    """
    tokenizer = make_tokenizer(world)
    loss = _cost_loss if world.task == "safety" else _reward_loss
    with _reproducible(world.seed + 1):
        model = LlamaForSequenceClassification(_config(tokenizer, num_labels=1))
        _fit(model, world.n_pairs, loss(tokenizer, preferences(world)))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed torch and use one thread, so that the weights depend neither on the number of cores nor on who shares them.

    At this size a second thread gains little, and costs much when another process wants its core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)


def _config(tokenizer: PreTrainedTokenizerFast, **changes: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.05,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **changes,
    )


def _fit(model: PreTrainedModel, n_examples: int, loss: Loss) -> None:
    """One pass over the examples, in their (random) order, with AdamW and a linear warm-up and decay."""
    starts = range(0, n_examples, BATCH_SIZE)
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in embeddings], "lr": EMBEDDING_LEARNING_RATE},
        {"params": [p for p in model.parameters() if id(p) not in embeddings], "lr": LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    warmup = max(1, len(starts) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (len(starts) - step) / len(starts))
    )
    model.train()
    for start in starts:
        optimizer.zero_grad()
        torch.autograd.backward(loss(model, slice(start, start + BATCH_SIZE)))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()


def _encode(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], answers: Sequence[str]) -> torch.Tensor:
    """Token ids (B, T) of whole conversations, padded on the right: a causal model then needs no mask."""
    conversations = [
        [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    texts = tokenizer.apply_chat_template(conversations, tokenize=False)
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids: torch.Tensor = encoded["input_ids"]
    return ids


def _imitation_loss(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Demonstration]) -> Loss:
    """Mean -log pi over the answers' tokens, the end-of-sequence token included."""
    ids = _encode(tokenizer, [example.prompt for example in examples], [example.answer for example in examples])
    turn = tokenizer.convert_tokens_to_ids("<|assistant|>")
    answered = (ids == turn).cumsum(dim=1).bool() & (ids != turn) & (ids != tokenizer.pad_token_id)
    labels = ids.masked_fill(~answered, IGNORED)

    def loss(model: PreTrainedModel, batch: slice) -> torch.Tensor:
        value: torch.Tensor = model(input_ids=ids[batch], labels=labels[batch]).loss
        return value

    return loss


def _pair_scorer(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference]
) -> Callable[[PreTrainedModel, slice], tuple[torch.Tensor, torch.Tensor]]:
    """A function that gives a model's outputs for the chosen and for the rejected answers of a batch, (B,) each."""
    prompts = [pair.prompt for pair in pairs]
    both = _encode(tokenizer, prompts * 2, [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs])
    chosen_ids, rejected_ids = both.chunk(2)

    def scores(model: PreTrainedModel, batch: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ids = torch.cat([chosen_ids[batch], rejected_ids[batch]])
        chosen, rejected = model(input_ids=ids).logits.squeeze(-1).chunk(2)
        return chosen, rejected

    return scores


def _reward_loss(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference]) -> Loss:
    """Bradley-Terry: -log sigma(r_chosen - r_rejected)."""
    scores = _pair_scorer(tokenizer, pairs)

    def loss(model: PreTrainedModel, batch: slice) -> torch.Tensor:
        chosen, rejected = scores(model, batch)
        return -logsigmoid(chosen - rejected).mean()

    return loss


def _cost_loss(tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Preference]) -> Loss:
    """Safe RLHF's cost loss (Dai et al. 2023, equation 6): -log sigma(c_rejected - c_chosen) - sum log sigma(s c).

    s is +1 for an answer judged unsafe and -1 for a safe one, so that the sign of the cost says which it is.
    """
    scores = _pair_scorer(tokenizer, pairs)
    chosen_signs = torch.tensor([-1.0 if pair.chosen_safe else 1.0 for pair in pairs])
    rejected_signs = torch.tensor([-1.0 if pair.rejected_safe else 1.0 for pair in pairs])

    def loss(model: PreTrainedModel, batch: slice) -> torch.Tensor:
        chosen, rejected = scores(model, batch)
        signs = logsigmoid(chosen_signs[batch] * chosen) + logsigmoid(rejected_signs[batch] * rejected)
        return -(logsigmoid(rejected - chosen) + signs).mean()

    return loss
