"""Two GPUs compute what one does: context parallelism over long rows, DDP and FSDP2 over several steps.

    torchrun --nproc_per_node 2 training/experiments/check_two_gpus.py [--tokens 65536]

1. Ulysses and the ring over one row of 65,536 tokens, forward and backward in bf16, of one document and of packed
   ones, with pruning and without. No gradient is further from one GPU's in fp32 than twice what one GPU's in bf16 is.
2. DDP, FSDP2 and FSDP2 with the ring, ten steps of AdamW: the losses are those of one GPU to 1e-2, and the time of a
   step beside that of one GPU.
3. A checkpoint of FSDP2 that is written in parts while training goes on: what loads it, on two GPUs or one, has its
   weights, and two go on bit for bit.

Ends with status 1 if one of them fails. About a minute. On a CPU (--tokens 512) it takes gloo.
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import distributed

from fox_training import sharded
from fox_training.checkpoint import CheckpointFolder, Processes
from fox_training.parallel import Parallel, clip_gradients, plain_accelerate, whole
from modeling_fox import FoxConfig, FoxForCausalLM

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
MESH = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}
ARRANGEMENTS = {
    "ulysses": MESH | {"PARALLELISM_CONFIG_SP_SIZE": "2"},
    "ring": MESH | {"PARALLELISM_CONFIG_CP_SIZE": "2"},
    "DDP": {},
    "FSDP2": FSDP,
    "FSDP2-ring": FSDP | MESH | {"PARALLELISM_CONFIG_CP_SIZE": "2"},
}
STEPS = 10


def build(layers, tolerance, device):
    """The 125M shape with fewer layers, heads that remember 8 to 20,000 tokens."""
    torch.manual_seed(0)
    times = {"fgate_decay_time_min": 8, "fgate_decay_time_max": 20_000}
    config = FoxConfig(
        vocab_size=8192, num_hidden_layers=layers, num_key_value_heads=4, log_pruning_tolerance=tolerance, **times
    )
    config._attn_implementation = "fox_acp"
    with device:
        return FoxForCausalLM(config).train()


def tokens_and_positions(rows, length, packed, device):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 8192, (rows, length), generator=generator)
    positions = torch.arange(length).expand(rows, -1).clone()
    if packed:  # the last document lies in the second half alone, one ends just before it
        for start in (length // 3, length // 2 + 77, length * 3 // 4):
            positions[:, start:] -= positions[:, start : start + 1].clone()
    batch = {"input_ids": tokens, "position_ids": positions, "labels": tokens}
    return {name: value.to(device) for name, value in batch.items()}


def loss_of(model, batch, count, dtype=torch.bfloat16):
    with torch.autocast(count.device.type, torch.bfloat16, enabled=dtype != torch.float32):
        return model(**batch, use_cache=False, num_items_in_batch=count).loss


def gradients(model):
    return {name: p.grad.float() for name, p in model.named_parameters()}


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def arrange(name, model, accelerator):
    """The model spread over both GPUs as an arrangement says."""
    held = {variable: os.environ.pop(variable) for variable in list(os.environ) if variable.startswith(tuple(MESH))}
    os.environ.update(ARRANGEMENTS[name])
    try:
        parallel = Parallel.from_environment(2)
        return parallel, parallel.prepare(model, accelerator, compile=False, checkpointing=False)
    finally:
        for variable in ARRANGEMENTS[name]:
            del os.environ[variable]
        os.environ.update(held)


def check_context(name, args, tolerance, packed, device, accelerator):
    """One row cut in two: the worst ratio of a gradient's error to bf16's own, and the same of the loss in nats."""
    batch = tokens_and_positions(1, args.tokens, packed, device)
    count = torch.tensor(float(args.tokens - 1), device=device)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = build(args.layers, tolerance, device)
        loss = loss_of(model, batch, count, dtype)
        loss.backward()
        found[dtype] = (float(loss.detach()), gradients(model))
        del model
    model = build(args.layers, tolerance, device)
    parallel, _ = arrange(name, model, accelerator)
    loss = loss_of(model, parallel.local(batch), count)
    loss.backward()
    total = loss.detach().clone()
    distributed.all_reduce(total)
    (exact_loss, exact), (own_loss, own) = found[torch.float32], found[torch.bfloat16]
    worst = 0.0
    for key, gradient in gradients(model).items():
        distributed.all_reduce(gradient)
        if float(exact[key].norm()) > 0:
            worst = max(worst, float((gradient - exact[key]).norm() / (own[key] - exact[key]).norm()))
    return worst, float(total) - own_loss, own_loss - exact_loss


def check_steps(name, args, device, accelerator):
    """Losses of ten steps and seconds of a step; `one` is this GPU alone with all rows."""
    model = build(args.layers, -10.0, device)
    parallel = forward = None
    if name == "one":
        parallel, forward = Parallel(), model
    else:
        parallel, forward = arrange(name, model, accelerator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    length = args.tokens // 4
    batch = tokens_and_positions(4, length, True, device)
    rows = 4 // parallel.data_processes
    rank = 0 if name == "one" else parallel.data_rank
    mine = parallel.local({key: value[rank * rows : (rank + 1) * rows] for key, value in batch.items()})
    labels = torch.tensor(4.0 * (length - 1) / parallel.gradient_parts, device=device)
    losses = []
    for step in range(STEPS):
        if step == STEPS // 2:
            wait(device)
            distributed.barrier()
            begin = time.perf_counter()
        loss = loss_of(forward, mine, labels)
        loss.backward()
        clip_gradients(list(model.parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    wait(device)
    seconds = (time.perf_counter() - begin) / (STEPS - STEPS // 2)
    losses = torch.stack(losses)
    if name != "one":
        distributed.all_reduce(losses, op=distributed.ReduceOp.AVG)
    weight = whole(model.lm_head.weight).norm()
    return losses, float(weight), seconds


def check_checkpoint(args, device, accelerator):
    """Whether two GPUs, and this one alone, have what was saved; and how long the loop had to wait for it."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the embedding's gradient
    batch = tokens_and_positions(2, args.tokens // 4, True, device)
    labels = torch.tensor(float(args.tokens // 4 - 1), device=device)
    rank = distributed.get_rank()
    mine = {key: value[rank : rank + 1] for key, value in batch.items()}
    place = [tempfile.mkdtemp() if rank == 0 else None]
    distributed.broadcast_object_list(place, src=0)

    def start():
        model = build(args.layers, None, device)
        parallel, _ = arrange("FSDP2", model, accelerator)
        return parallel, model, torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)

    def step(model, optimizer):
        loss = loss_of(model, mine, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    parallel, model, optimizer = start()
    step(model, optimizer)
    saved = {name: whole(value) for name, value in model.state_dict().items()}
    processes = Processes(rank, distributed.get_world_size(), distributed.barrier, gather_object)
    folder = CheckpointFolder(Path(place[0]), 2, processes)
    tensors = sharded.collect(model, [optimizer])
    wait(device)
    begin = time.perf_counter()
    folder.save(
        1, lambda path: sharded.write_replicated(tensors, path), lambda path: None,
        lambda path: sharded.Writing(tensors, path, parallel.disk_group()), background=True,
    )  # fmt: skip
    waited = time.perf_counter() - begin
    expected = [step(model, optimizer) for _ in range(3)]  # while it is being written
    folder.wait()
    newest = folder.newest(accelerator.print)
    _, again, optimizer = start()
    sharded.read(newest, again, [optimizer])
    same = all(torch.equal(whole(value), saved[name]) for name, value in again.state_dict().items())
    same = same and all(torch.equal(step(again, optimizer), loss) for loss in expected)
    alone = build(args.layers, None, device)
    with torch.no_grad():
        for weight in alone.parameters():
            weight.zero_()
    sharded.read(newest, alone)
    same_alone = all(torch.equal(value, saved[name]) for name, value in alone.state_dict().items())
    sizes = [path.stat().st_size for path in (newest / sharded.PARTS).iterdir()]
    distributed.barrier()
    if rank == 0:
        shutil.rmtree(place[0])
    return same, same_alone, sizes, waited


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536, metavar="T", help="in a row (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    args = parser.parse_args()
    with plain_accelerate():
        accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available())
    device, failed = accelerator.device, []

    def say(text, ok):
        if not ok:
            failed.append(text)
        accelerator.print(f"{'ok    ' if ok else 'FAILED'} {text}", flush=True)

    for name in ("ulysses", "ring"):
        for tolerance, packed in ((None, False), (-10.0, False), (-10.0, True)):
            worst, difference, rounding = check_context(name, args, tolerance, packed, device, accelerator)
            shape = f"{name}, {args.tokens} tokens, {'packed' if packed else 'one document'}, tolerance {tolerance}"
            text = f"{shape}: gradients {worst:.3f} x bf16's own error, loss {difference:+.1e} (bf16 {rounding:+.1e})"
            say(text, worst < 2.0 and abs(difference) < max(1e-4, 2 * abs(rounding)))
    expected, norm, alone = check_steps("one", args, device, accelerator)
    for name in ("DDP", "FSDP2", "FSDP2-ring"):
        losses, weight, seconds = check_steps(name, args, device, accelerator)
        error = float((losses - expected).abs().max())
        text = f"{name}: losses of {STEPS} steps within {error:.1e}, norm of a weight {weight:.4f} and {norm:.4f}"
        say(f"{text}; {alone / seconds:.2f} x the speed of one GPU", error < 1e-2 and abs(weight / norm - 1) < 1e-3)
    two, one, sizes, waited = check_checkpoint(args, device, accelerator)
    text = f"checkpoint in parts of {' and '.join(f'{size / 1e6:.1f}' for size in sizes)} MB, begun in {waited:.2f} s"
    say(f"{text}: two GPUs go on bit for bit {two}, one has the weights {one}", two and one and len(sizes) == 2)
    distributed.destroy_process_group()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
