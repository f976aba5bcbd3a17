"""Write the prompt files of the emoji configs, from what the world does not hold out.

    python training/emoji/prompts.py

Validation prompts are seen combinations too, others than the training prompts; what is held out is for
`alignkit evaluate`.
"""

import json
from pathlib import Path

from alignkit.emoji import prompts

FOLDER = Path(__file__).parents[2] / "configs" / "alignprop"


def write(name: str, asked: list[prompts.Prompt], **columns: object) -> None:
    if name.endswith(".txt"):
        lines = [p.prompt for p in asked]
    else:
        lines = [json.dumps({"prompt": p.prompt, **columns}) for p in asked]
    (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    singles, pairs, three = prompts.singles(unseen=False), prompts.pairs(unseen=False), prompts.exactly(3, unseen=False)
    write("emoji_validation_prompts.txt", singles[:20])
    write("emoji_prompts.txt", singles[20:])
    write("emoji_pairs_validation.jsonl", pairs[:20])
    write("emoji_pairs.jsonl", pairs[20:420])
    write("emoji_three_validation.jsonl", three[:20], count=3)
    write("emoji_three.jsonl", three[20:], count=3)
