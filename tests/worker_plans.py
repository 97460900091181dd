"""On each of two processes: the logits and the text of a model that is split, beside those of the whole one."""

import torch
from torch import distributed
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import modeling_fox  # noqa: F401
from helpers import random_tokens


@torch.no_grad()
def run(model, tokens, mask):
    logits = model(tokens, attention_mask=mask, use_cache=False).logits
    return logits * mask[..., None], model.generate(tokens, attention_mask=mask, max_new_tokens=8, do_sample=False)


def compare_all(folders):
    """Print for each folder and way to split: the way, this process's weights, largest error, whether texts agree."""
    distributed.init_process_group("gloo")
    tokens, mask = random_tokens(2, 12, vocab_size=96), torch.ones(2, 12, dtype=torch.int64)
    tokens[1, :4] = mask[1, :4] = 0
    for folder in folders:
        whole_logits, whole_text = run(AutoModelForCausalLM.from_pretrained(folder), tokens, mask)
        for kind in ("tp_size", "pp_size"):
            part = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**{kind: 2}))
            mine = sum(
                x._local_tensor.numel() if hasattr(x, "_local_tensor") else x.numel() for x in part.parameters()
            )
            logits, text = run(part, tokens, mask)
            error = float((logits - whole_logits).abs().max())
            print(f"RESULT {kind} {mine} {error} {torch.equal(text, whole_text)}", flush=True)
    distributed.destroy_process_group()
