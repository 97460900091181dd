"""Loading a saved model and its tokenizer for the commands, with errors that say what to do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

import modeling_fox  # noqa: F401  registers model_type "fox" with the Auto classes
from fox_training.tokenizers import document_token_id


def resolve(name: str) -> str:
    """Folder or Hub id that `from_pretrained` takes; a run folder stands for the `model/` inside it.

    Raises:
        ValueError: If a local folder is meant and is missing or holds no model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return str(folder)
        if (folder / "model" / "config.json").is_file():
            return str(folder / "model")
        raise ValueError(
            f"MODEL must be a folder with config.json, got {name}, which has none. "
            "Pass the folder that save_pretrained wrote, e.g. runs/NAME/model."
        )
    if folder.exists():
        raise ValueError(f"MODEL must be a folder, got the file {name}. Pass the folder that holds it.")
    if name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).parent.is_dir():
        raise ValueError(f"MODEL must be an existing folder or a Hub id; there is no folder {name}. Is training done?")
    return name


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer saved beside the model.

    Raises:
        ValueError: If there is none, or it has no token to start a document with.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"MODEL must hold a tokenizer; none could be loaded from {name} ({_first_line(error)}). "
            "Save it there with tokenizer.save_pretrained."
        ) from error
    if document_token_id(tokenizer) is None:
        raise ValueError(
            f"the tokenizer of {name} must have a bos_token or an eos_token, got neither. "
            "Documents are scored from that token: set tokenizer.bos_token and save it again."
        )
    return tokenizer


def load_model(
    name: str, *, attention: str | None = None, dtype: str = "auto", device: str | None = None, **overrides
) -> PreTrainedModel:
    """The model in evaluation mode on its device.

    Args:
        name: What `resolve` returned.
        attention: `attn_implementation`; None leaves the choice to the model.
        dtype: "auto" (as saved) or a torch dtype by name.
        device: As torch names it; None takes the first GPU if there is one, else the CPU.
        overrides: Config fields to change, e.g. `log_pruning_tolerance=-10.0`.

    Raises:
        ValueError: If the model cannot be loaded as asked.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter where PyTorch was built without CUDA
        raise ValueError(
            f"--device must be one that PyTorch finds here, got {device} ({_first_line(error)}). Leave it out for the "
            "GPU, or the CPU where there is none."
        ) from error
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    options = {"dtype": dtype} if attention is None else {"dtype": dtype, "attn_implementation": attention}
    try:
        known = AutoConfig.from_pretrained(name)
        unknown = [key for key in overrides if not hasattr(known, key)]
        if unknown:
            raise ValueError(f"the config of model_type {known.model_type!r} has no field {unknown[0]!r}")
        if attention == "fox_acp" and known.model_type != "fox":
            raise ValueError(f"attention fox_acp needs forget gates, which model_type {known.model_type!r} has not")
        model = AutoModelForCausalLM.from_pretrained(name, **options, **overrides)
        return model.to(device).eval()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        if os.environ.get("FOX_TRACEBACK"):
            raise
        raise ValueError(
            f"the model {name} could not be loaded: {_first_line(error)} "
            "(FOX_TRACEBACK=1 shows where that comes from)."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
