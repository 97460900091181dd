"""Pruning under the Trainer of Transformers (and TRL, which trains with the same one)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from .config import SparsityConfig
from .masks import MaskedPruner

FILE_NAME = "sparsity.safetensors"


class PruningCallback(TrainerCallback):
    """Prunes the model that a Trainer trains: `Trainer(..., callbacks=[PruningCallback(config)])`.

    Every checkpoint gets a file sparsity.safetensors with the masks, from which `resume_from_checkpoint` goes on.
    Logs `sparsity`.

    Args:
        config: See `SparsityConfig`.
        resume_from: Folder with sparsity.safetensors, needed only if the Trainer resumes from a checkpoint that is
            not `output_dir/checkpoint-STEP`.

    Attributes:
        pruner: The `MaskedPruner`, from the start of training on.
    """

    def __init__(self, config: SparsityConfig, resume_from: str | Path | None = None):
        self.config, self.resume_from = config, resume_from
        self.pruner: MaskedPruner | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model=None, optimizer=None, **kwargs) -> None:
        """Build the pruner, load its masks if the training goes on, and attach it to the optimizer.

        Raises:
            ValueError: If training resumes and the checkpoint has no masks.
        """
        if self.pruner is not None:
            self.pruner.detach()
        self.pruner = MaskedPruner(model, self.config, state.max_steps)
        if state.global_step > 0:
            folder = Path(self.resume_from or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / FILE_NAME).is_file():
                raise ValueError(
                    f"resume_from must be the checkpoint folder that holds {FILE_NAME}; nothing is in {folder}. Pass "
                    "PruningCallback(config, resume_from=FOLDER)."
                )
            self.pruner.load_state_dict(load_file(folder / FILE_NAME))
        self.pruner.attach(optimizer)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs) -> None:
        """Write the masks beside the checkpoint."""
        masks = self.pruner.state_dict()
        if state.is_world_process_zero:
            save_file(masks, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE_NAME)

    def on_log(self, args: Any, state: Any, control: Any, logs=None, **kwargs) -> None:
        """Add the sparsity to what is logged and to `state.log_history`."""
        if logs is not None and self.pruner is not None:
            logs["sparsity"] = self.pruner.sparsity()
            if state.log_history:
                state.log_history[-1]["sparsity"] = logs["sparsity"]

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs) -> None:
        """Let go of the optimizer."""
        self.pruner.detach()
