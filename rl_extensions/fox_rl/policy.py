"""An agent's memory made of forgetting attention: observations in, action distribution and value out.

In training the model reads whole windows of time, `(B, T, ...)`, in parallel; in the environment `act` reads one
observation a step with a cache whose size stays bounded. Both give the same numbers. An episode that begins inside a
window closes the forget gates, so that nothing is seen across its start.

Letters: B environments, T steps, E hidden size, A actions.
"""

from dataclasses import dataclass

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.distributions import Categorical, Distribution, Independent, Normal
from transformers import AutoConfig, AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from modeling_fox import FoxConfig, FoxModel, FoxPreTrainedModel
from modeling_fox.eviction_fox import FoxEvictingCache

from .networks import ImpalaEncoder, NatureEncoder, TokenReadout

OBSERVATION_TYPES = ("vector", "discrete", "pixels")
ENCODERS = ("impala", "nature")
ACTION_TYPES = ("discrete", "continuous")


@strict
class FoxPolicyConfig(FoxConfig):
    r"""
    Configuration of a [`FoxPolicyModel`]: that of FoX, with other defaults, and what the agent sees and does.

    Args:
        observation_type (`str`, *optional*, defaults to `"vector"`):
            `"vector"` floats `(..., observation_size)`; `"discrete"` integers `(...)` in [0, observation_size);
            `"pixels"` uint8 or float images `(..., observation_size, 84, 84)`.
        observation_size (`int`, *optional*, defaults to 1):
            Numbers, values or channels of one observation.
        encoder (`str`, *optional*, defaults to `"impala"`):
            Of pixels: `"impala"` or `"nature"`, read out by their mean over the image.
        encoder_width (`int`, *optional*, defaults to 1):
            Factor on the channels of that encoder.
        action_type (`str`, *optional*, defaults to `"discrete"`):
            `"discrete"`: one of `action_size` actions; `"continuous"`: a normal vector of that size with a learned
            deviation that does not depend on the observation.
        action_size (`int`, *optional*, defaults to 2):
            A.
        fgate_decay_time_min (`float`, *optional*, defaults to 2.0):
            As in FoX. Decay times spread over the heads learn memory faster than gates of one half.
        fgate_decay_time_max (`float`, *optional*, defaults to 512.0):
            As in FoX; about twice the longest episode.
    """

    model_type = "fox_policy"

    vocab_size: int = 1
    hidden_size: int = 64
    intermediate_size: int | None = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    fgate_decay_time_min: float | int | None = 2.0
    fgate_decay_time_max: float | int | None = 512.0
    observation_type: str = "vector"
    observation_size: int = 1
    encoder: str = "impala"
    encoder_width: int = 1
    action_type: str = "discrete"
    action_size: int = 2

    def validate_architecture(self):
        """Raise a `ValueError` that names the field, its value and the next step if the values cannot be built."""
        super().validate_architecture()
        choices = {"observation_type": OBSERVATION_TYPES, "encoder": ENCODERS, "action_type": ACTION_TYPES}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {allowed}; got {getattr(self, name)!r}.")
        for name in ("observation_size", "encoder_width", "action_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1; got {getattr(self, name)}.")


@dataclass
class FoxPolicyOutput(ModelOutput):
    """What `FoxPolicyModel` returns.

    Attributes:
        logits: `(B, T, A)`: of the actions, or the mean of a continuous action.
        value: `(B, T)`.
        log_std: `(A,)` of a continuous action, else None.
        past_key_values: The cache, if one was used.
    """

    logits: Tensor | None = None
    value: Tensor | None = None
    log_std: Tensor | None = None
    past_key_values: Cache | None = None

    def distribution(self) -> Distribution:
        """Of the action at every step, batch shape `(B, T)`."""
        if self.log_std is None:
            return Categorical(logits=self.logits)
        return Independent(Normal(self.logits, self.log_std.exp().expand_as(self.logits)), 1)


class PolicyHead(nn.Linear):
    """Output of the policy; a class of its own for its initialization."""


class ValueHead(nn.Linear):
    """Output of the value; a class of its own for its initialization."""


class ObservationEncoder(nn.Module):
    """One observation to E numbers, whatever it is."""

    def __init__(self, config: FoxPolicyConfig):
        super().__init__()
        self.observation_type, self.observation_size = config.observation_type, config.observation_size
        if config.observation_type == "discrete":
            self.embed = nn.Embedding(config.observation_size, config.hidden_size)
        elif config.observation_type == "vector":
            self.dense = nn.Linear(config.observation_size, config.hidden_size)
        else:
            classes = {"impala": (ImpalaEncoder, 11), "nature": (NatureEncoder, 7)}
            encoder_class, side = classes[config.encoder]
            self.encoder = encoder_class(config.observation_size, config.encoder_width)
            self.readout = TokenReadout((self.encoder.out_channels, side, side), config.hidden_size, "gap")

    def forward(self, observations: Tensor) -> Tensor:
        """`(B, T, ...)` to `(B, T, E)`."""
        if self.observation_type == "discrete":
            return self.embed(observations)
        if self.observation_type == "vector":
            if observations.shape[-1] != self.observation_size:
                raise ValueError(
                    f"`observations` must be (B, T, {self.observation_size}); got {tuple(observations.shape)}."
                )
            return self.dense(observations)
        encoded = self.encoder(observations.flatten(0, 1))
        return self.readout(encoded).view(*observations.shape[:2], -1)


class FoxPolicyModel(FoxPreTrainedModel):
    """Observation encoder, FoX trunk, policy head and value head; loads with `from_pretrained`.

    Args:
        config: A `FoxPolicyConfig`.
    """

    config: FoxPolicyConfig
    main_input_name = "observations"

    def __init__(self, config: FoxPolicyConfig):
        super().__init__(config)
        self.encoder = ObservationEncoder(config)
        self.model = FoxModel(config)
        # The trunk is given embeddings; a table of one unused row would only confuse optimizers and DDP.
        self.model.embed_tokens = None
        self.policy_head = PolicyHead(config.hidden_size, config.action_size)
        self.value_head = ValueHead(config.hidden_size, 1)
        self.log_std = nn.Parameter(torch.zeros(config.action_size)) if config.action_type == "continuous" else None
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, (PolicyHead, ValueHead)):
            # A nearly uniform policy and values of the size of the features, as PPO starts.
            init.orthogonal_(module.weight, 0.01 if isinstance(module, PolicyHead) else 1.0)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, ObservationEncoder):
            for layer in module.children():
                # Observations of size 1 become tokens of size 1, not of the 0.02 of language models.
                if isinstance(layer, nn.Embedding):
                    init.normal_(layer.weight)
                elif isinstance(layer, nn.Linear):
                    init.normal_(layer.weight, std=layer.in_features**-0.5)

    def forward(
        self,
        observations: Tensor,
        is_init: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> FoxPolicyOutput:
        """Read a window of time in parallel, or new steps with a cache.

        Args:
            observations: `(B, T, ...)`, see the config.
            is_init: `(B, T)` bool, True at the first step of an episode, which sees nothing before it; None if no
                episode begins after the first step. Not with a cache: `act` and `cache.start_over` do it there.
            attention_mask: `(B, S)`, 0 for cached steps that are not to be seen.
            past_key_values: Cache of the steps before.
            use_cache: Return the cache.

        Returns:
            `FoxPolicyOutput`.
        """
        position_ids = None
        if is_init is not None:
            if past_key_values is not None:
                raise ValueError("`is_init` must be None with a cache; got both. Use `act`, or `start_over`.")
            if is_init.shape != observations.shape[:2]:
                raise ValueError(
                    f"`is_init` must be {tuple(observations.shape[:2])}, one flag a step; got {tuple(is_init.shape)}."
                )
            step = torch.arange(is_init.shape[1], device=is_init.device).expand_as(is_init)
            position_ids = step - (step * is_init).cummax(dim=1).values
        outputs = self.model(
            inputs_embeds=self.encoder(observations),
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=bool(use_cache),
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        return FoxPolicyOutput(
            logits=self.policy_head(hidden),
            value=self.value_head(hidden).squeeze(-1),
            log_std=self.log_std,
            past_key_values=outputs.past_key_values,
        )

    def new_cache(self, log_tolerance: float = -10.0) -> FoxEvictingCache:
        """Empty rollout cache for the present weights; see `FoxEvictingCache`."""
        return FoxEvictingCache(self.config, log_tolerance, page_size=16)

    @torch.no_grad()
    def act(
        self, observation: Tensor, is_init: Tensor, cache: FoxEvictingCache, deterministic: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step of B environments; the cache is extended, and drops by itself what can never matter again.

        The cache belongs to the policy: keep observations in a replay buffer, never the cache.

        Args:
            observation: `(B, ...)`.
            is_init: `(B,)` bool, True where `observation` is the first of an episode.
            cache: From `new_cache`, the same for all steps between two weight updates.
            deterministic: Take the most likely action, or the mean of a continuous one.

        Returns:
            action `(B,)` int64 or `(B, A)` float, its log probability `(B,)`, value `(B,)`.

        Raises:
            ValueError: If the weights were updated since the cache was filled.
        """
        cache.check_weights()
        if bool(is_init.any()):
            cache.start_over(is_init)
        outputs = self(observation[:, None], past_key_values=cache, use_cache=True)
        distribution = outputs.distribution()
        action = distribution.mode if deterministic else distribution.sample()
        return action[:, 0], distribution.log_prob(action)[:, 0], outputs.value[:, 0]


AutoConfig.register("fox_policy", FoxPolicyConfig, exist_ok=True)
AutoModel.register(FoxPolicyConfig, FoxPolicyModel, exist_ok=True)
