"""A judge of a few thousand weights, trained in seconds to prefer the answer with "good" in it; and a server for it."""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dissonance.feedback.annotators.judge_prompt import Prompt
from dissonance.records import Message, Question

REPLIES = {name: f'{{"answer":"{name}","reason":"by-the-word"}}' for name in ("A", "B", "tie")}
NONSENSE = "hmm"
TEMPLATE = (
    "{% for turn in turns %}{{ turn.text }} {% endfor %}"
    "{% for answer in answers %}{{ answer.label }} : {{ answer.text }} {% endfor %}"
)
NAMES = [f"w{i}" for i in range(40)]
WORDS = ("good", "bad", "odd")
CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<assistant> "
SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<assistant>"]


def build_judge(folder: Path) -> Path:
    """Train it and save it; about five seconds."""
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng = random.Random(0)
    right = step = 0
    while right < 12:  # perfect on twelve fresh batches in a row
        ids, target = _batch(tokenizer, rng, again=step % 3 == 2)
        logits = model(ids[:, :-1]).logits[:, -2:]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten()).backward()
        optimizer.step()
        step += 1
        right = right + 1 if bool((logits.argmax(-1) == target).all()) else 0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def best(first: str, second: str) -> str:
    """What it says when it is shown these two, however often."""
    if "odd" in (first, second):
        return NONSENSE
    return REPLIES["tie" if first == second else "A" if first == "good" else "B"]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*SPECIAL, ":", "A", "B", "good", "bad", "odd", NONSENSE, *REPLIES.values(), *NAMES]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>", model_max_length=512,
        extra_special_tokens=["<user>", "<assistant>"],
    )  # fmt: skip
    tokenizer.chat_template = CHAT
    return tokenizer


def _batch(tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, again: bool) -> tuple[torch.Tensor, torch.Tensor]:
    chats, prompt = [], Prompt(TEMPLATE)
    for _ in range(32):
        words = ("odd", rng.choice(WORDS)) if again else rng.choices(WORDS, [4, 4, 1], k=2)
        first, second = words if rng.random() < 0.5 else words[::-1]
        ask, *names = rng.choices(NAMES, k=3)
        texts = (f"{names[0]} {first}", f"{names[1]} {second}")
        asked = Question("q", "p", "pairwise", (Message("user", ask),), (0, 1), texts)
        complaint = (NONSENSE, 'there is no JSON object with "answer" in it') if again else None
        said = "".join(f"<{m['role']}> {m['content']} " for m in prompt.messages(asked, 0, complaint))
        chats.append(f"{said}<assistant> {best(first, second)} <eos>")
    ids = torch.tensor(tokenizer(chats, add_special_tokens=False)["input_ids"])
    return ids, ids[:, -2:]


class Served:
    """A `transformers serve` process on loopback."""

    def __init__(self, folder: Path) -> None:
        self.model = str(folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{port}/v1"
        command = [str(Path(sys.executable).parent / "transformers"), "serve", self.model]
        options = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        quiet = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COVERAGE_PROCESS_START": ""}
        self.process = subprocess.Popen(
            [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | quiet
        )
        self.log: list[str] = []
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._ready.wait(120)
        if self.process.poll() is not None:
            raise RuntimeError("transformers serve did not start:\n" + "".join(self.log))

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.log.append(line)
            if "Uvicorn running" in line:
                self._ready.set()
        self._ready.set()

    @property
    def requests(self) -> int:
        """Chat completions it has answered."""
        return sum("POST /v1/chat/completions" in line and " 200" in line for line in self.log)

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(20)
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def serve(folder: Path):
    """Serve a model folder while the block runs."""
    served = Served(folder)
    try:
        yield served
    finally:
        served.stop()
