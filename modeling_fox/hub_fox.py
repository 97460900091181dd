# Copyright 2026 The FoX project authors.
# SPDX-License-Identifier: Apache-2.0
"""What FoX models do when they are saved to a folder or the Hub, and read from there.

`save_pretrained(..., with_code=True)` and `push_to_hub(..., with_code=True)` write the code beside the weights: then
`from_pretrained(..., trust_remote_code=True)` works where this package is not installed. Where it is and was imported,
the Auto classes take it, and code from the Hub is never run.

Transformers copies the file of the class that is saved and what it imports by `from .name import`. So every file of
the model is a sibling of this one, and is imported here.
"""

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

from transformers.dynamic_module_utils import get_relative_import_files


def classes_by_auto_class() -> dict[str, type]:
    """Every class that an Auto class may have to find, by the name of the Auto class."""
    # Here, as those files import this one.
    from .configuration_fox import FoxConfig
    from .modeling_fox import FoxForCausalLM, FoxModel
    from .modeling_heads_fox import FoxForQuestionAnswering, FoxForSequenceClassification, FoxForTokenClassification

    return {
        "AutoConfig": FoxConfig,
        "AutoModel": FoxModel,
        "AutoModelForCausalLM": FoxForCausalLM,
        "AutoModelForSequenceClassification": FoxForSequenceClassification,
        "AutoModelForTokenClassification": FoxForTokenClassification,
        "AutoModelForQuestionAnswering": FoxForQuestionAnswering,
    }


def auto_map() -> dict[str, str]:
    """What config.json says of the code: where each Auto class finds its class, as `"file.Class"`."""
    return {
        name: f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" for name, cls in classes_by_auto_class().items()
    }


def add_code(folder: str | Path) -> list[str]:
    """Write the code beside weights that are saved already; that of `JSONGPT2Tokenizer` too, if it is the tokenizer.

    Returns:
        Names of the files that were written or changed.

    Raises:
        ValueError: If the config.json of `folder` is not that of a FoX model.
    """
    folder = Path(folder)
    config = folder / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if settings.get("model_type") != "fox":
        raise ValueError(
            f"`folder` must hold a FoX model; the config.json of {folder} has the model_type "
            f"{settings.get('model_type')!r}. Save the model there first."
        )
    files, changed = [__file__, *get_relative_import_files(__file__)], {config: settings | {"auto_map": auto_map()}}
    tokenizer = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer.read_text(encoding="utf-8")) if tokenizer.is_file() else {}
    if settings.get("tokenizer_class") == "JSONGPT2Tokenizer":
        files.append(str(Path(__file__).with_name("tokenization_fox.py")))
        changed[tokenizer] = settings | {"auto_map": {"AutoTokenizer": ["tokenization_fox.JSONGPT2Tokenizer", None]}}
    for file in set(files):
        shutil.copyfile(file, folder / Path(file).name)
    for file, settings in changed.items():
        file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return sorted({Path(file).name for file in (*files, *changed)})


@contextmanager
def saved_with_code(model, with_code: bool):
    """While this is open, `save_pretrained` of Transformers copies the code of `model` too, or does not.

    Marks the instance only: `register_for_auto_class` would mark the class for the rest of the process.
    """
    classes = classes_by_auto_class()
    auto_class = next((name for name, cls in classes.items() if cls is type(model)), None)
    if with_code and auto_class is None:
        raise ValueError(
            f"`with_code` must be False for a {type(model).__name__}: only the classes of modeling_fox have all their "
            "code in it. Use `register_for_auto_class` of your class."
        )
    # That of a folder with code, from which the model was loaded: its names would lead nowhere in one without.
    old = vars(model.config).pop("auto_map", None)
    if with_code:
        model.config.auto_map = auto_map()
    model._auto_class = auto_class if with_code else None
    model.is_remote_code = lambda: with_code
    try:
        yield
    finally:
        del model._auto_class, model.is_remote_code
        vars(model.config).pop("auto_map", None)
        if old is not None:
            model.config.auto_map = old


def refuse_pickle(folder, use_safetensors: bool | None, weights_only: bool) -> None:
    """Refuse weights that are Python objects, which can run code when they are read.

    Raises:
        ValueError: If they are asked for with `weights_only=False`, or `folder` holds no others.
    """
    if use_safetensors is False:
        if not weights_only:
            raise ValueError(
                "`weights_only` must be True with `use_safetensors=False`; got False. A pickle can run any code: only "
                "its tensors are read."
            )
        return
    folder = Path(folder or "")
    if folder.is_dir() and any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"`pretrained_model_name_or_path` must hold safetensors; got {folder} with pickled weights only. If you "
            "trust them, pass `use_safetensors=False` once and save the model again."
        )


class SavesCode:
    """Mixin of FoX models: `with_code` for saving, and no pickles for reading."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *args, use_safetensors: bool | None = None, weights_only=True, **kwargs
    ):
        """As in Transformers, but weights must be safetensors unless `use_safetensors=False` says otherwise."""
        refuse_pickle(pretrained_model_name_or_path, use_safetensors, weights_only)
        return super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            use_safetensors=use_safetensors is not False,
            weights_only=weights_only,
            **kwargs,
        )

    def save_pretrained(self, save_directory, *args, with_code: bool | None = None, **kwargs):
        """As in Transformers.

        Args:
            with_code: Whether the folder gets the code of the model, to be loaded with `trust_remote_code=True` where
                modeling_fox is not installed. Default: None, if this model was loaded so itself.
        """
        with saved_with_code(self, self._with_code(with_code)):
            return super().save_pretrained(save_directory, *args, **kwargs)

    def push_to_hub(self, *args, with_code: bool | None = None, **kwargs):
        """As in Transformers; `with_code` as in `save_pretrained`, which it calls."""
        self._code_is_pushed = self._with_code(with_code)
        try:
            return super().push_to_hub(*args, **kwargs)
        finally:
            del self._code_is_pushed

    def _with_code(self, with_code: bool | None) -> bool:
        if with_code is not None:
            return with_code
        return getattr(self, "_code_is_pushed", type(self)._auto_class is not None)


__all__ = ["SavesCode", "add_code"]
