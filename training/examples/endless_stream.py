"""Follow a text that never ends: memory stays what the model remembers, however much it has read.

    python training/examples/endless_stream.py --file server.log --follow         as it grows; stop with Ctrl-C
    python training/examples/endless_stream.py --file book.txt --model runs/demo/model --plot memory.png
    python training/examples/endless_stream.py --generate --tokens 100000 --plot memory.png
    python training/examples/endless_stream.py --tokens 20000 --every 5000        a first try: random bytes

Reads a file as bytes or by the tokenizer of --model, feeds it in steps of --step tokens to one cache, and prints,
every --every tokens, how well the model foresaw them, what the cache holds and the peak memory of the process. With
--generate the model goes on by itself, one token after another. Without --model it is a random one that forgets within
--decay-time tokens. Ends with an error if the cache grew by more than a quarter after the first fifth, or the bound on
lost attention is not within the tolerance.
"""

from __future__ import annotations

import argparse
import codecs
import resource
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fox_training.cache_plot import plot_cache
from modeling_fox import FoxConfig, FoxEvictingCache, FoxForCausalLM


def load(options):
    """The model, and a function from text as bytes to tokens."""
    if options.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        model = AutoModelForCausalLM.from_pretrained(options.model)
        # A character may end in the next piece.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return model, lambda text: tokenizer(decoder.decode(text), add_special_tokens=False)["input_ids"]
    torch.manual_seed(options.seed)
    config = FoxConfig.pro(
        vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, fgate_decay_time_min=1.5,
        fgate_decay_time_max=options.decay_time, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return FoxForCausalLM(config), list


def tokens_of_file(options, encode):
    """Tokens of the file, and of what is appended to it while this runs."""
    with options.file.open("rb") as file:
        while True:
            text = file.read(65536)
            if text:
                yield from encode(text)
            elif options.follow:
                time.sleep(0.2)
            else:
                return


def random_tokens(options):
    generator = torch.Generator().manual_seed(options.seed)
    while True:
        yield from torch.randint(0, 256, (4096,), generator=generator).tolist()


def pieces(source, size):
    """Lists of `size` tokens, the last one shorter."""
    piece = []
    for token in source:
        piece.append(token)
        if len(piece) == size:
            yield piece
            piece = []
    if piece:
        yield piece


def peak_bytes() -> int:
    """The most that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def read(model, cache, source, options):
    """Feed tokens; yields the mean loss in nats of each piece and how many tokens it had."""
    last = None
    for piece in pieces(source, options.step):
        ids = torch.tensor([piece], device=model.device)
        logits = model(ids, past_key_values=cache, use_cache=True).logits.float()
        before = logits[:, :-1] if last is None else torch.cat((last, logits[:, :-1]), dim=1)
        targets = ids[:, -before.shape[1] :] if before.shape[1] else ids[:, :0]
        loss = torch.nn.functional.cross_entropy(before[0], targets[0]) if targets.numel() else logits.new_zeros(())
        last = logits[:, -1:]
        yield float(loss), len(piece)


def write(model, cache, options):
    """Let the model go on by itself; yields the same as `read`."""
    generator = torch.Generator(model.device).manual_seed(options.seed)
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    while True:
        probabilities = model(ids, past_key_values=cache, use_cache=True).logits[:, -1].float().softmax(dim=-1)
        ids = torch.multinomial(probabilities, 1, generator=generator)
        yield -float(probabilities[0, ids[0, 0]].log()), 1


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="text to read (default: random bytes)")
    parser.add_argument("--follow", action="store_true", help="wait for more at the end of the file")
    parser.add_argument("--generate", action="store_true", help="write in place of reading")
    parser.add_argument("--model", help="folder or name of a FoX model with a tokenizer (default: a random one)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    parser.add_argument("--tokens", type=int, default=1_000_000, help="at most so many (default: 1000000)")
    parser.add_argument("--step", type=int, default=256, help="tokens read at a time (default: 256)")
    parser.add_argument("--every", type=int, default=10_000, help="tokens between lines (default: 10000)")
    parser.add_argument("--decay-time", type=float, default=64.0, help="of the random model's slowest head, tokens")
    parser.add_argument("--log-tolerance", type=float, default=-10.0, help="log of the mass that may be lost")
    parser.add_argument("--max-cache-bytes", type=int, help="a hard limit (default: none)")
    parser.add_argument("--plot", type=Path, help="where to draw the memory")
    parser.add_argument("--seed", type=int, default=0, help="of weights, random bytes and sampling (default: 0)")
    options = parser.parse_args(argv)
    if options.follow and options.file is None:
        parser.error("--follow needs --file")
    if options.file is not None and not options.file.is_file():
        parser.error(f"--file must be a file; got {options.file}")
    model, encode = load(options)
    model.eval().to(options.device)
    cache = FoxEvictingCache(model.config, options.log_tolerance, max_cache_bytes=options.max_cache_bytes)
    source = random_tokens(options) if options.file is None else tokens_of_file(options, encode)
    steps = write(model, cache, options) if options.generate else read(model, cache, source, options)
    reports, process, losses, count, begin = [], [], 0.0, 0, time.perf_counter()
    try:
        for loss, number in steps:
            losses, count = losses + loss * number, count + number
            length = cache.get_seq_length()
            if length // options.every > (length - number) // options.every or length >= options.tokens:
                reports.append(cache.report())
                process.append(peak_bytes())
                rate = length / (time.perf_counter() - begin)
                print(
                    f"{losses / count:.3f} nats a token, {reports[-1]}, process {process[-1] / 2**20:.0f} MiB, "
                    f"{rate:.0f} tokens/s", flush=True,
                )  # fmt: skip
                losses, count = 0.0, 0
            if length >= options.tokens:
                break
    except KeyboardInterrupt:
        print("stopped")
    if not reports:
        print(f"read {cache.get_seq_length()} tokens, less than a line of {options.every}: {cache.report()}")
        return 0
    if options.plot is not None:
        plot_cache(reports, options.plot, process)
    early = max(x.memory_bytes for x in reports[: max(1, len(reports) // 5)])
    has_grown = max(x.memory_bytes for x in reports) > 1.25 * early
    print(
        f"the cache {'GREW' if has_grown else 'stays as it was'}: {early} bytes early, {reports[-1].memory_bytes} now"
    )
    return int(has_grown or (options.max_cache_bytes is None and not reports[-1].is_proven))


if __name__ == "__main__":
    sys.exit(main())
