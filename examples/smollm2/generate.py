"""Let a model continue a line of each kind of text of the corpus, greedily.

Run as `python generate.py MODEL`.
"""

from __future__ import annotations

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

TEXTS = ['The "if" statement is used for', "import os\nimport sys\n\n\ndef main("]
QUESTION = "There are 4 boxes with 25 eggs in each. 10 eggs are given away. How many eggs are left?"
TOKENS = 40


def show(name: str) -> None:
    """Print what the model of a directory writes."""
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name)
    chat = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    print(f"\n=== {name}")
    for text, shown in [*zip(TEXTS, TEXTS, strict=True), (asked, QUESTION + "\n")]:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        out = model.generate(**ids, max_new_tokens=TOKENS, do_sample=False)
        new = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"--- {shown}|{new}")


if __name__ == "__main__":
    show(sys.argv[1])
