"""Prompts that are rewritten before they are drawn: by a function, or by a text-generation model of transformers."""

import functools
from collections.abc import Callable

Refiner = Callable[[str], str]

INSTRUCTION = (
    "Rewrite the prompt of a text-to-image model as one sentence with more visual detail. Keep every word in angle "
    "brackets.\nPrompt: {}\nRewritten:"
)


def build_refiner(name: str | Refiner, instruction: str = INSTRUCTION, max_new_tokens: int = 64) -> Refiner:
    """A function from prompt to prompt: itself, or of a model, by folder or Hub name (safetensors).

    A decoder (GPT, Qwen, Llama) continues `instruction`, with the prompt at {}, an encoder-decoder (T5) answers it; the
    first line is taken, greedily, so that the same prompt is always rewritten alike. The last model stays loaded.
    Raises ValueError where there is no such model.
    """
    return name if callable(name) else _of_model(name, instruction, max_new_tokens)


@functools.lru_cache(maxsize=1)
def _of_model(name: str, instruction: str, max_new_tokens: int) -> Refiner:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    from alignkit.artifacts import read_pretrained

    try:
        answers = AutoConfig.from_pretrained(name).is_encoder_decoder
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = read_pretrained(AutoModelForSeq2SeqLM if answers else AutoModelForCausalLM, name).eval()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"refine: expected a function or a text-generation model, got {name!r}: {str(error).splitlines()[0]}"
        ) from error

    def refine(prompt: str) -> str:
        inputs = tokenizer(instruction.format(prompt), return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)[0]
        new = ids if answers else ids[inputs.input_ids.shape[1] :]
        text = tokenizer.decode(new, skip_special_tokens=True).strip()
        return text.splitlines()[0].strip() if text else prompt

    return refine


def refined(refine: Refiner, prompt: str, phrases: list[str]) -> str:
    """The rewritten prompt. ValueError when it is no text, or lost a concept that the prompt has."""
    text = refine(prompt)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"refine: expected a prompt for {prompt!r}, got {text!r}.")
    lost = [phrase for phrase in phrases if phrase in prompt and phrase not in text]
    if lost:
        raise ValueError(f"refine: the rewritten prompt has lost the concept {lost[0]!r}: {text!r}.")
    return text.strip()
