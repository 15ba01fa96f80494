"""`python -m benchmarks.peft_generate FILE`: the peer, transformers and PEFT, which answers one request at a
time.

FILE is JSON: base (folder), adapters (folders by name), threads, and requests with adapter, messages and max_tokens.
Prints JSON: per request the text, the number of tokens, and the seconds until the first token and until the last.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.generation.streamers import BaseStreamer


class FirstToken(BaseStreamer):
    """Records when the first token was generated."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.at = 0.0

    def put(self, value: Any) -> None:
        """Called with the prompt, then with each token."""
        self.num_calls += 1
        if self.num_calls == 2:
            self.at = time.monotonic()

    def end(self) -> None:
        pass


def main(given: dict[str, Any]) -> list[dict[str, Any]]:
    torch.set_num_threads(given["threads"])
    tokenizer: Any = AutoTokenizer.from_pretrained(given["base"], local_files_only=True)
    base: Any = AutoModelForCausalLM.from_pretrained(given["base"], dtype=torch.float32, local_files_only=True)
    first, *others = given["adapters"].items()
    model: Any = PeftModel.from_pretrained(base, first[1], adapter_name=first[0])
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name)
    model.eval()
    until = base.generation_config.eos_token_id
    ends = list({tokenizer.eos_token_id, *np.atleast_1d([] if until is None else until).tolist()})
    answers: list[dict[str, Any]] = []
    for request in [given["requests"][0], *given["requests"]]:  # the first one twice: a warm-up
        began, streamer = time.monotonic(), FirstToken()
        model.set_adapter(request["adapter"])
        prompt = tokenizer.apply_chat_template(
            request["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        whole = model.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=request["max_tokens"],
            eos_token_id=ends,
            pad_token_id=ends[0],
            streamer=streamer,
        )
        generated = whole[0, prompt["input_ids"].shape[1] :]
        answers.append(
            {
                "text": tokenizer.decode(generated, skip_special_tokens=True),
                "tokens": len(generated),
                "first_seconds": streamer.at - began,
                "seconds": time.monotonic() - began,
            }
        )
    return answers[1:]


if __name__ == "__main__":
    print(json.dumps(main(json.loads(Path(sys.argv[1]).read_text("utf-8")))))
