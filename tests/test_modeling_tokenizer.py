"""The tokenizer of the published checkpoints: texts go in as JSON strings and come out as they were."""

import json
import pickle

import pytest
from test_modeling_conversion import OFFICIAL, PRO, write_checkpoint
from transformers import AutoTokenizer, GPT2Tokenizer

from fox_training import shard_worker
from fox_training.shard_worker import start_worker
from fox_training.tokenizers import encode_documents, is_all_backend, tokenizer_hash
from modeling_fox import FoxForCausalLM, JSONGPT2Tokenizer
from modeling_fox.convert import convert
from modeling_fox.tokenization_fox import escape, unescape

END = "<|endoftext|>"


def gpt2_bytes():
    """The character for each byte in the vocabulary of GPT-2: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_tokenizer(folder, **changes):
    """The files of the official tokenizer, with a vocabulary of bytes only."""
    folder.mkdir(exist_ok=True)
    tokens = [*(gpt2_bytes()[byte] for byte in range(256)), END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    config = {
        "tokenizer_class": "JSONGPT2Tokenizer", "add_bos_token": True, "model_max_length": 16384,
        "clean_up_tokenization_spaces": False, "bos_token": END, "eos_token": END, "unk_token": END,
        "auto_map": {"AutoTokenizer": ["tokenization_json_gpt2.JSONGPT2Tokenizer", None]},
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config | changes), encoding="utf-8")
    return folder


@pytest.fixture
def tokenizer(tmp_path):
    return AutoTokenizer.from_pretrained(write_tokenizer(tmp_path / "tokenizer"))


def test_auto_tokenizer_takes_our_class_and_no_code_of_theirs(tokenizer):
    assert type(tokenizer) is JSONGPT2Tokenizer


def test_a_newline_becomes_the_two_characters_of_json(tokenizer):
    # BOS, a, backslash, n, b.
    assert tokenizer("a\nb").input_ids == [256, 97, 92, 110, 98]
    assert tokenizer(["a\nb", '"'], add_special_tokens=False).input_ids == [[97, 92, 110, 98], [92, 34]]
    assert tokenizer.tokenize("\u00e9") == ["\\", "u", "0", "0", "e", "9"]
    # A backslash followed by n in the text is no newline.
    assert tokenizer("\\n", add_special_tokens=False).input_ids == [92, 92, 110]
    pairs = tokenizer(["a\n", "b"], ["c", "\n"], add_special_tokens=False).input_ids
    assert pairs == [[97, 92, 110, 99], [98, 92, 110]]
    words = tokenizer(["a\n", "b"], is_split_into_words=True, add_special_tokens=False).input_ids
    assert words == [97, 92, 110, 98]


def test_training_and_evaluation_escape_too(tokenizer, monkeypatch):
    """They take many texts at once, and none of them ends where it spells the end of a text."""
    plain = GPT2Tokenizer.from_pretrained(tokenizer.name_or_path)
    texts = ["a\nb", "\u00e9" + END]
    expected = [list(b"a\\nb"), list(b"\\u00e9" + END.encode())]
    assert list(encode_documents(tokenizer, texts)) == expected
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    start_worker(pickle.dumps(tokenizer), 256, "uint16")
    assert list(shard_worker._encode(texts)) == expected
    # What was tokenised without escapes is not taken for it.
    assert not is_all_backend(tokenizer) and is_all_backend(plain)
    assert tokenizer_hash(tokenizer) != tokenizer_hash(plain)


def test_the_class_of_transformers_does_not_escape(tmp_path, tokenizer):
    """What makes ours necessary; if this fails, Transformers calls the hook of the official class again."""
    plain = GPT2Tokenizer.from_pretrained(write_tokenizer(tmp_path / "plain", tokenizer_class="GPT2Tokenizer"))
    assert plain("a\nb", add_special_tokens=False).input_ids == [97, 10, 98]


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "two\nlines\r\n\ttabbed",
        'he said "no"',
        "back\\slash \\n \\u0041",
        "h\u00e9 \u4f60\u597d",
        "\U0001f98a!",
        "\x00\x1f\x7f",
        "",
        f"in the text: {END}",
        "/path/",
    ],
)
def test_every_text_comes_back(tokenizer, text):
    assert unescape(escape(text)) == text == json.loads(f'"{escape(text)}"')
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids[1:]) == text
    assert tokenizer.batch_decode([ids, ids[1:]]) == [END + text, text]


def test_what_a_model_did_not_finish_is_readable(tokenizer):
    def decoded(json_text):
        return tokenizer.decode([ord(letter) for letter in json_text])

    assert decoded("half of an escape: \\u00") == "half of an escape: \\u00"
    assert decoded("one\\") == "one\\"
    # Half of a pair cannot be printed; a bare quotation mark or newline is no JSON, but plain to see.
    assert decoded("fox \\ud83e") == "fox \ufffd"
    assert decoded('bare " and \n, then\\nescaped') == 'bare " and \n, then\nescaped'
    assert decoded("no \\d escape") == "no \\d escape"


def test_special_tokens_are_found_and_skipped(tokenizer):
    ids = tokenizer(f"a{END}b").input_ids
    assert ids == [256, 97, 256, 98]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "ab"


def test_saved_and_loaded_it_escapes_once(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert type(again) is JSONGPT2Tokenizer and again("a\nb").input_ids == [256, 97, 92, 110, 98]


def test_convert_takes_it_along(tmp_path):
    write_checkpoint(tmp_path / "theirs", OFFICIAL, PRO)
    write_tokenizer(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    FoxForCausalLM.from_pretrained(tmp_path / "ours")
    assert AutoTokenizer.from_pretrained(tmp_path / "ours")("a\nb").input_ids == [256, 97, 92, 110, 98]


def test_offsets_are_refused(tokenizer):
    with pytest.raises(ValueError, match="`return_offsets_mapping` must be False; got True"):
        tokenizer("a", return_offsets_mapping=True)
