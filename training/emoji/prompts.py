"""Write the prompt files of the emoji configs, from what the world holds out and what not.

python training/emoji/prompts.py
"""

import json
from pathlib import Path

from alignkit.emoji import prompts

FOLDER = Path(__file__).parents[2] / "configs" / "alignprop"


def write(name: str, asked: list[prompts.Prompt], **columns: object) -> None:
    lines = [json.dumps({"prompt": p.prompt, **columns}) for p in asked]
    (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write("emoji_pairs.jsonl", prompts.pairs(unseen=False)[:400])
    write("emoji_pairs_validation.jsonl", prompts.pairs(seed=1, unseen=False)[-20:])
    write("emoji_three.jsonl", prompts.exactly(3, unseen=False), count=3)
    write("emoji_three_validation.jsonl", prompts.exactly(3, seed=1, unseen=False)[:20], count=3)
