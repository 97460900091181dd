"""Continue a text with a trained model: `python -m fox_training.generate MODEL --prompt TEXT`."""

from __future__ import annotations

import argparse
import sys
import time

from .commands import add_model_arguments, command_parser, errors_of_the_user, load

DESCRIPTION = """\
Continue a text with a causal language model, printed while it is generated.

A run of ours:     python -m fox_training.generate runs/demo/model --prompt "Fellow-Citizens of the Senate"
Always the same:   python -m fox_training.generate runs/demo/model --prompt "The " --temperature 0
From a pipe:       cat start.txt | python -m fox_training.generate runs/demo/model --prompt - --max-new-tokens 500

The text goes to stdout, the speed to stderr. The prompt stands behind the token that starts a document (BOS), as in
training; an empty prompt begins a new document.
"""


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults are written nowhere else."""
    parser = command_parser("generate", DESCRIPTION, "MODEL --prompt TEXT [options]")
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of save_pretrained, run folder, or Hub id")
    add("--prompt", metavar="TEXT", required=True, help="text to continue; - reads stdin")
    add = parser.add_argument_group("sampling").add_argument
    add("--max-new-tokens", type=int, default=200, metavar="N", help="(default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the most probable token (default: %(default)s)")
    add("--top-p", type=float, default=0.95, metavar="P", help=TOP_P_HELP)
    add("--seed", type=int, default=0, help="same seed, same text on the same machine (default: %(default)s)")
    add = parser.add_argument_group("machine").add_argument
    add_model_arguments(add)
    return parser


TOP_P_HELP = "sample from the fewest tokens that together have this probability; 1 = all (default: %(default)s)"


def main(argv: list[str] | None = None) -> int:
    """Run the command. Returns its exit status; prints one line for an error of the user."""
    args = parser().parse_args(argv)
    with errors_of_the_user(parser()):
        generate(args)
    return 0


def generate(args: argparse.Namespace) -> str:
    """Stream the continuation to stdout. Returns prompt and continuation as text.

    Raises:
        ValueError: If an argument cannot be followed.
    """
    _check(args)
    # Imported here so that --help answers at once.
    import torch
    from transformers import TextStreamer, set_seed

    from fox_training import pretrained
    from fox_training.tokenizers import document_token_id, encode_documents

    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    name = pretrained.resolve(args.model)
    tokenizer, model = load(name, attention=args.attention, dtype=args.dtype, device=args.device)
    tokens = [document_token_id(tokenizer), *(next(encode_documents(tokenizer, [prompt])) if prompt else [])]
    _check_length(model.config, len(tokens), args.max_new_tokens)

    set_seed(args.seed)
    inputs = torch.tensor([tokens], device=model.device)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": 0} if args.temperature else {}
    started = time.perf_counter()
    output = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=args.max_new_tokens,
        do_sample=args.temperature > 0,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True, clean_up_tokenization_spaces=False),
        **sampling,
    )
    seconds = time.perf_counter() - started
    new_tokens = output.shape[1] - len(tokens)
    print(f"{new_tokens} tokens in {seconds:.1f} s, {new_tokens / seconds:.0f} tokens/s", file=sys.stderr)
    return tokenizer.decode(output[0], skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _check(args: argparse.Namespace):
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}.")
    if not 0 <= args.temperature < float("inf"):
        raise ValueError(f"--temperature must be 0 or above, got {args.temperature}. 1 samples from the model itself.")
    if not 0 < args.top_p <= 1:
        raise ValueError(f"--top-p must be in (0, 1], got {args.top_p}: a probability, no percentage.")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"--seed must be in [0, 2**32), got {args.seed}.")


def _check_length(config, prompt_tokens: int, new_tokens: int):
    largest = getattr(config, "max_position_embeddings", None)
    # FoX has no positions to run out of; other models are undefined beyond theirs.
    if largest and config.model_type != "fox" and prompt_tokens + new_tokens > largest:
        raise ValueError(
            f"--max-new-tokens must be at most {largest - prompt_tokens} after {prompt_tokens} tokens of prompt, "
            f"got {new_tokens}: the model has {largest} positions."
        )


if __name__ == "__main__":
    sys.exit(main())
