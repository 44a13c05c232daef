"""The tokenizer of story arithmetic: a token a word, a token a digit, the vocabulary read off the
templates.

A word keeps its leading space (" apples"), so decoding is concatenation and `decode(encode(text)) == text`.
A digit is a token of its own, with (" 1") or without ("4") a space before it: a model that fills a number
in parallel then commits to each digit by itself, which is where parallel decoding shows its mistakes.

`build_tokenizer` returns a standard fast tokenizer that `AutoTokenizer.from_pretrained` loads. `encode` is
the same mapping as a dictionary look-up, an order of magnitude faster, for generating training data.
"""

from __future__ import annotations

import re
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING

from dllm_toolkit.data import templates, worded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS, MASK, BOS, UNKNOWN = "<pad>", "<eos>", "<mask>", "<bos>", "<unk>"
SPECIALS = (PAD, EOS, MASK, BOS, UNKNOWN)
# Used by both implementations, so it keeps to what Python's `re` and `tokenizers` (Oniguruma) read alike.
WORD_PATTERN = r"'s| ?[A-Za-z]+| ?[0-9]| ?[^A-Za-z0-9\s]|\s"
_WORD = re.compile(WORD_PATTERN)


def split_words(text: str) -> list[str]:
    """The tokens of `text` as strings; their concatenation is `text`."""
    return _WORD.findall(text)


def _literal(template: str) -> str:
    """`template` with a digit in place of every slot, which keeps the words around the slots apart."""
    return "".join(words + ("" if slot is None else "0") for words, slot, _, _ in Formatter().parse(template))


@cache
def vocabulary() -> dict[str, int]:
    """Token to id: the special tokens, then every word of the terse style, sorted, then what the worded style adds, sorted."""
    sides = (side for wordings in templates.ALL_WORDINGS for wording in wordings for side in wording)
    sentences = [_literal(side) for side in sides if side]
    sentences += [_literal(templates.CLOSING)]
    sentences += [_literal(subject) for subject in templates.SUBJECTS]
    # A slot's filler always follows a space: sentences are joined by spaces after a first word.
    fillers = [*templates.GIRLS, *templates.BOYS, *templates.ITEMS, *templates.PLACES, *templates.COLORS]
    fillers += [word for pair in (*templates.BOXES, *templates.THINGS) for word in pair]
    fillers += [pronoun for row in templates.PRONOUNS for pronoun in row]
    words = {word for sentence in (*sentences, *fillers) for word in split_words(" " + sentence)}
    words.update(split_words(_literal(templates.PROMPT)))
    words.update(form for digit in range(10) for form in (f"{digit}", f" {digit}"))
    added = {word for sentence in worded.literals() for word in split_words(sentence)} - words
    return {word: index for index, word in enumerate((*SPECIALS, *sorted(words), *sorted(added)))}


def encode(text: str) -> list[int]:
    """Token ids of generated text, equal to `build_tokenizer().encode(text)`.

    Raises ValueError for a word outside the vocabulary, where the transformers tokenizer would write
    `<unk>`.
    """
    table = vocabulary()
    try:
        return [table[word] for word in _WORD.findall(text)]
    except KeyError as error:
        raise ValueError(
            f"a word is not in the story vocabulary, got {error.args[0]!r}. It holds only the words of the "
            "story templates. Write the problem with words that "
            "`dllm_toolkit.data.tokenizer.vocabulary()` lists."
        ) from None


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The transformers fast tokenizer of story arithmetic; it adds no special tokens by itself."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(vocabulary(), unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        mask_token=MASK,
        bos_token=BOS,
        unk_token=UNKNOWN,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
