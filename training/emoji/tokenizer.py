"""Make the emoji world's tokenizer: a real CLIPTokenizer whose merges make every word of the captions one token.

    python training/emoji/tokenizer.py

Words that the captions never use fall back to byte pairs, so a user may type anything.
"""

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from alignkit.emoji import WEIGHTS_DIR, captions

MAX_LENGTH = 32  # tokens, with start and end; the longest caption has some 20


def main() -> None:
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        special_tokens=[],
        initial_alphabet=alphabet + [f"{c}</w>" for c in alphabet],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions.vocabulary() * 8, trainer)
    import json

    state = json.loads(bpe.to_str())["model"]
    vocab = sorted(state["vocab"], key=state["vocab"].get)
    vocab += [f"{c}</w>" for c in sorted(alphabet) if f"{c}</w>" not in state["vocab"]] + [
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    tokenizer = CLIPTokenizer(
        vocab={token: i for i, token in enumerate(vocab)},
        merges=[tuple(merge) for merge in state["merges"]],
        model_max_length=MAX_LENGTH,
    )
    broken = [w for w in captions.vocabulary() if len(tokenizer(w).input_ids) != 3]
    assert not broken, f"not one token: {broken}"
    tokenizer.save_pretrained(WEIGHTS_DIR / "base" / "tokenizer")
    print(f"{len(tokenizer)} tokens", tokenizer("a photo of an xylophone on a blue background").input_ids)


if __name__ == "__main__":
    main()
