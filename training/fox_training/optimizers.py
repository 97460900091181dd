"""Which weight is moved by which optimizer, and the running mean of the weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from .recipe import OptimizerRecipe, RecipeError, ScheduleRecipe
from .schedule import learning_rate_factor


def decays(name: str, parameter: nn.Parameter, *, decay_embeddings: bool = True) -> bool:
    """Whether weight decay applies: to weights with two or more dimensions that are no norm.

    As in the paper's runs (arXiv:2503.02130): linear weights, forget-gate and shift projections included, and the
    embedding decay; biases, gate biases and norm weights do not, also where a norm keeps one row per head.
    """
    if parameter.ndim < 2 or "norm" in name:
        return False
    return decay_embeddings or "embed" not in name


def is_hidden_matrix(name: str, parameter: nn.Parameter, num_heads: int) -> bool:
    """Whether Muon may orthogonalise the weight: a matrix between feature spaces inside a block.

    Not the embedding and the output layer, and not the projections to one number per head (forget gate, shift), whose
    rows are separate directions rather than a map.
    """
    return parameter.ndim == 2 and ".layers." in f".{name}" and "norm" not in name and min(parameter.shape) > num_heads


def build_optimizers(model: nn.Module, recipe: OptimizerRecipe) -> list[torch.optim.Optimizer]:
    """AdamW over everything, or Muon or Kron over the hidden matrices and AdamW over the rest.

    Every group carries `peak_lr`, from which `set_learning_rate` computes `lr`.

    Raises:
        RecipeError: If the package of Kron is missing, or the model has no hidden matrices for Muon or Kron.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizers = []
    if recipe.name in ("muon", "kron"):
        num_heads = getattr(model.config, "num_attention_heads", 1)
        hidden = [(n, p) for n, p in named if is_hidden_matrix(n, p, num_heads)]
        taken = {id(p) for _, p in hidden}
        named = [(n, p) for n, p in named if id(p) not in taken]
        if not hidden:
            raise RecipeError(
                f"optimizer.name {recipe.name} is for the matrices of `layers`, of which {type(model).__name__} has "
                "none. Use adamw."
            )
        optimizers.append(_of_matrices([p for _, p in hidden], recipe))
    optimizers.append(_adamw(named, recipe))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def _of_matrices(matrices: list[nn.Parameter], recipe: OptimizerRecipe) -> torch.optim.Optimizer:
    if recipe.name == "muon":
        return torch.optim.Muon(
            matrices, lr=recipe.muon_learning_rate, momentum=recipe.muon_momentum, weight_decay=recipe.weight_decay
        )
    try:
        # One backend everywhere: a checkpoint of a GPU goes on on a CPU.
        return build_optimizer(
            "kron", matrices, recipe.learning_rate, weight_decay=recipe.weight_decay, backend="pytorch_optimizer"
        )
    except ImportError as error:
        raise RecipeError(f"optimizer.name kron: {error}") from error


def _adamw(named: list[tuple[str, nn.Parameter]], recipe: OptimizerRecipe) -> torch.optim.AdamW:
    keep = recipe.decay_embeddings
    groups = [
        {
            "params": [p for n, p in named if decays(n, p, decay_embeddings=keep)],
            "weight_decay": recipe.weight_decay,
        },
        {"params": [p for n, p in named if not decays(n, p, decay_embeddings=keep)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.epsilon,
        # One kernel for all weights; exists for CPU and CUDA.
        fused=all(p.device.type in ("cpu", "cuda") for _, p in named),
    )


def set_learning_rate(optimizers: list[torch.optim.Optimizer], step: int, schedule: ScheduleRecipe) -> float:
    """Set `lr` of every group for optimizer step `step` (from 0); returns the share of the peak."""
    factor = learning_rate_factor(
        step,
        steps=schedule.steps,
        warmup_steps=schedule.warmup_steps,
        kind=schedule.kind,
        final_fraction=schedule.final_fraction,
        decay_fraction=schedule.decay_fraction,
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return factor


class WeightAverage:
    """Exponential running mean of the weights: `mean <- d mean + (1 - d) weight` after each step.

    `d = min(decay, (1 + step) / (10 + step))`, so that the first steps do not hold on to the random start.

    Args:
        model: The model whose parameters are averaged; on the same device, in fp32.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self._names = [name for name, _ in model.named_parameters()]
        self._weights = [p for _, p in model.named_parameters()]
        self._means = [p.detach().clone() for p in self._weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._means, [w.detach() for w in self._weights], 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean weights inside the block and its own again behind it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, mean in zip(self._weights, self._means, strict=True):
            held = weight.clone()
            weight.copy_(mean)
            mean.copy_(held)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The means by parameter name."""
        return dict(zip(self._names, self._means, strict=True))

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Restore what `state_dict` returned."""
        for name, mean in zip(self._names, self._means, strict=True):
            mean.copy_(state[name])


OPTIMIZERS = ("adamw", "radam", "muon", "kron")


def optimizer_spec(
    name: str,
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    backend: str = "auto",
    device: str | torch.device = "cpu",
    **options: Any,
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Class and keyword arguments of an optimizer by name, as `Trainer(optimizer_cls_and_kwargs=...)` takes them.

    One learning rate for all of them, that of AdamW: Muon's steps are scaled to the size of AdamW's
    (`match_rms_adamw`, arXiv:2502.16982), and Kron gets a third, the rule of its authors that arXiv:2506.15544 used;
    sweep it all the same. `lr` among the options is taken as it is.

    Args:
        name: adamw, radam, muon (matrices only) or kron (PSGD with Kronecker-factored preconditioner, 4 to 30 times
            the time of a step of Adam on a CPU).
        learning_rate: Of AdamW.
        weight_decay: Decoupled, per step times the learning rate.
        backend: kron only: heavyball (made for GPUs, compiles its steps), pytorch_optimizer, or auto: heavyball on a
            GPU if it is installed, else pytorch_optimizer.
        device: Of the weights; adamw is fused where PyTorch can, kron chooses its backend by it.
        options: More arguments of the class, e.g. `betas`, `momentum`.

    Raises:
        ValueError: For an unknown name or backend.
        ImportError: Naming the package that is missing.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"name must be one of {', '.join(OPTIMIZERS)}; got {name!r}.")
    if backend not in ("auto", "heavyball", "pytorch_optimizer"):
        raise ValueError(f"backend must be auto, heavyball or pytorch_optimizer; got {backend!r}.")
    device_type = torch.device(device).type
    common = {"lr": learning_rate, "weight_decay": weight_decay}
    if name == "adamw":
        return torch.optim.AdamW, common | {"fused": device_type in ("cpu", "cuda")} | options
    if name == "radam":
        return torch.optim.RAdam, common | {"decoupled_weight_decay": True} | options
    if name == "muon":
        return torch.optim.Muon, common | {"adjust_lr_fn": "match_rms_adamw"} | options
    return _kron_class(backend, device_type), common | {"lr": learning_rate / 3} | options


def build_optimizer(
    name: str, params: Iterable[Any], learning_rate: float, *, weight_decay: float = 0.0, **options: Any
) -> torch.optim.Optimizer:
    """An optimizer over `params` by name; see `optimizer_spec`.

    Args:
        name: adamw, radam, muon or kron.
        params: Parameters, or groups as PyTorch takes them.
        learning_rate: Of AdamW, whichever the optimizer is.
        weight_decay: Decoupled.
        options: `backend` of kron, and arguments of the class.

    Raises:
        ValueError: For an unknown name, or muon over something that is no matrix.
    """
    params = list(params)
    tensors = [p for group in params for p in (group["params"] if isinstance(group, dict) else [group])]
    wrong = next((tuple(p.shape) for p in tensors if p.ndim != 2), None)
    if name == "muon" and wrong is not None:
        raise ValueError(f"params of muon must be matrices; got shape {wrong}. Give the rest to an adamw of its own.")
    device = tensors[0].device if tensors else "cpu"
    cls, arguments = optimizer_spec(name, learning_rate, weight_decay=weight_decay, device=device, **options)
    return cls(params, **arguments)


def _kron_class(backend: str, device_type: str) -> type[torch.optim.Optimizer]:
    if backend == "auto":
        on_gpu = device_type == "cuda" and importlib.util.find_spec("heavyball") is not None
        backend = "heavyball" if on_gpu else "pytorch_optimizer"
    try:
        if backend == "heavyball":
            from heavyball import PSGDKron

            return PSGDKron
        from pytorch_optimizer import Kron

        return Kron
    except ImportError as error:
        raise ImportError(
            f"name kron needs the package {backend}: pip install 'fox-transformers[kron]' (heavyball: "
            "pip install heavyball)."
        ) from error
