"""Tokenizers that need no download: bytes, characters, and a BPE trained on the data; or any from the Hub.

All are `PreTrainedTokenizerFast` with `<|endoftext|>` as BOS and EOS and `<|pad|>`, and give back exactly the text
they were given. Source of the byte alphabet: GPT-2's byte-level BPE, as in `tokenizers`.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .recipe import RecipeError, TokenizerRecipe

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"

# Words with the space before them, digits in pairs, punctuation, and white space; merges never cross these.
_WORDS = r"'(?:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8: ids 0 to 255 are the bytes, 256 ends a document, 257 pads."""
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(_byte_symbols())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def char_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token per character that occurs in `texts`, in order of code points. Any other character is an error."""
    characters = sorted(set().union(*(set(text) for text in texts)))
    # An unk_token outside the vocabulary makes `tokenizers` raise instead of dropping the character.
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<|unknown character|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return _wrap(backend)


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with `vocab_size` tokens, 256 bytes and 2 special ones included, trained on `texts`.

    Raises:
        RecipeError: If the texts are too small for so many tokens.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() < vocab_size:
        raise RecipeError(
            f"data.tokenizer.vocab_size must be at most {backend.get_vocab_size()} for this text, which has no more "
            f"pairs to merge; got {vocab_size}."
        )
    return _wrap(backend)


def hub_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A tokenizer from the Hub or a folder; it must have a token that starts or ends a document.

    Raises:
        RecipeError: If it cannot be loaded or has neither BOS nor EOS.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RecipeError(f"data.tokenizer.path {path} holds no tokenizer that can be loaded: {reason}") from error
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise RecipeError(f"the tokenizer {path} has neither bos_token nor eos_token. Save one with it.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token if tokenizer.eos_token is not None else tokenizer.bos_token
    return tokenizer


def make_tokenizer(recipe: TokenizerRecipe, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that a recipe asks for; `texts` is only read for char and bpe."""
    if recipe.kind == "byte":
        return byte_tokenizer()
    if recipe.kind == "char":
        return char_tokenizer(texts)
    if recipe.kind == "bpe":
        return bpe_tokenizer(texts, recipe.vocab_size)
    return hub_tokenizer(recipe.path, recipe.revision)


def document_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before every document: BOS, or EOS where a tokenizer has no BOS."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Iterator[list[int]]:
    """Token ids of each text, without special tokens; text that spells a special token stays text.

    Raises:
        RecipeError: If a character is not in the vocabulary of a character tokenizer.
    """
    if not is_all_backend(tokenizer):
        yield from (tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) for text in texts)
        return
    with whole_texts(tokenizer) as backend:
        try:
            encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
        except Exception as error:  # tokenizers raises a bare Exception
            reason = _unknown_characters(tokenizer, texts) or f"the text cannot be tokenised: {error}"
            raise RecipeError(reason) from error
    yield from (encoding.ids for encoding in encodings)


def is_all_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the backend alone makes the tokens. `JSONGPT2Tokenizer` of modeling_fox escapes texts before it."""
    return tokenizer.is_fast and type(tokenizer)._encode_plus is PreTrainedTokenizerFast._encode_plus


@contextlib.contextmanager
def whole_texts(tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokenizer]:
    """The backend of a fast tokenizer, which inside the block gives every text all of its tokens, and no other ones.

    Many files on the Hub, and every call with `truncation` or `padding`, leave it cutting and padding.
    """
    backend = tokenizer.backend_tokenizer
    special, truncation, padding = backend.encode_special_tokens, backend.truncation, backend.padding
    # Otherwise a document that contains "<|endoftext|>" would end there.
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    try:
        yield backend
    finally:
        backend.encode_special_tokens = special
        if truncation is not None:
            backend.enable_truncation(**truncation)
        if padding is not None:
            backend.enable_padding(**padding)


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Short hash of everything that decides how text becomes ids."""
    if tokenizer.is_fast:
        with whole_texts(tokenizer) as backend:
            text = backend.to_str() + ("" if is_all_backend(tokenizer) else type(tokenizer).__name__)
    else:
        text = repr(sorted(tokenizer.get_vocab().items())) + repr(type(tokenizer))
    return hashlib.sha256(f"{text} {document_token_id(tokenizer)}".encode()).hexdigest()[:16]


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """`save_pretrained`, so that `AutoTokenizer.from_pretrained` gives the same tokenizer back."""
    tokenizer.save_pretrained(folder)


def _wrap(backend: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )
    return tokenizer


def _byte_symbols() -> list[str]:
    """The printable character that stands for each byte: the byte itself where printable, else 256 and up."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    replacement = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(replacement)) for byte in range(256)]


def _unknown_characters(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> str | None:
    unknown = sorted(set().union(*(set(text) for text in texts)) - set(tokenizer.get_vocab()))
    if not unknown or len(tokenizer.get_vocab()) > 5000:
        return None
    shown = ", ".join(repr(c) for c in unknown[:10])
    return (
        f"the text has {len(unknown)} characters that the training text has not: {shown}. "
        "Use data.tokenizer.kind byte, or hold out other documents."
    )
