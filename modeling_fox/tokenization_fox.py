# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""The tokenizer of the published FoX checkpoints, which were trained on the texts of LongCrawl64 as JSON strings.

There a newline is a backslash and an n, a quotation mark has a backslash before it, and what is not ASCII is the
`\\uXXXX` of its UTF-16. The official tokenizer escapes in a hook that Transformers 5 never calls: that class would
split the plain text, which these models have never seen.
"""

import json
import re

from transformers import GPT2Tokenizer

ESCAPE = re.compile(r'(?:\\u[0-9a-fA-F]{4})+|\\["\\/bfnrt]')
"""An escape of JSON, or a run of those that may be halves of a character."""


def escape(text):
    """`text`, or every string in a nest of lists, as it stands between the quotation marks of JSON in ASCII."""
    if isinstance(text, str):
        return json.dumps(text)[1:-1]
    return text if text is None else [escape(part) for part in text]


def unescape(text: str) -> str:
    """Undo `escape`. What is no escape, as where a model stopped in the middle of one, stays as it is."""
    text = ESCAPE.sub(lambda found: json.loads(f'"{found[0]}"'), text)
    # Half a character can be generated, but not printed.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class JSONGPT2Tokenizer(GPT2Tokenizer):
    """GPT-2's tokenizer on JSON-escaped text. It has the name of the official one, so that saved ones are found."""

    def _encode_plus(self, text, text_pair=None, return_offsets_mapping=False, **kwargs):
        if return_offsets_mapping:
            raise ValueError(
                "`return_offsets_mapping` must be False; got True. Tokens are pieces of the escaped text, so their "
                "offsets do not count characters of yours."
            )
        return super()._encode_plus(escape(text), escape(text_pair), **kwargs)

    def _decode(self, token_ids, **kwargs) -> str:
        return unescape(super()._decode(token_ids, **kwargs))


__all__ = ["JSONGPT2Tokenizer"]
