"""The configuration of a PREFIX_PLUS adapter."""

from __future__ import annotations

import json
import math
import numbers
import os
import re
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import regex
from peft import PeftConfig
from transformers.activations import ACT2FN

from .encoders import ENCODERS
from .registration import PREFIX_PLUS
from .saving.files import update_card_of_saved_config, update_model_card, write_atomically
from .saving.reading import naming_config
from .saving.weights import SavedWeights, check_saved_weights, read_saved_weights


Reparameterization = Literal["none", "log", "linear", "mlp"]
"""The names of the encoders of this package, for type checkers; `encoders.ENCODERS` has those of others too."""

Sharing = Literal["none", "input", "projection", "all"]
Initialization = Literal["random", "zero", "activations"]

SHARINGS: tuple[Sharing, ...] = get_args(Sharing)
INITIALIZATIONS: tuple[bool | Initialization, ...] = (True, False, *get_args(Initialization))

SERVABLE: dict[str, Any] = {
    "gating": False,
    "decoupled": False,
    "position_free": False,
    "layers_to_transform": None,
    "layers_pattern": None,
    "target_modules": None,
    "exclude_modules": None,
    "modules_to_save": None,
}
"""What vLLM's cache can hold: keys and values at fixed positions, in all layers, and nothing else."""

LARGEST = 2**31 - 1
"""The largest length or width: no tensor can have more."""

MOST_ENTRIES = 10_000
"""The most entries of a list, and characters of a regular expression: no model has as many layers or attention modules."""


@dataclass
class PrefixPlusConfig(PeftConfig):
    """
    Configuration of [`PrefixPlusModel`]: learned keys and values, a prefix, in the attention of chosen modules.

    Per attention module, with `L_p = num_virtual_tokens`, the prefix (P_K, P_V) takes one of three forms:

        decoupled (the default)  out = softmax(s · Q Kᵀ + mask) V + silu(6 tanh(s/6 · Q P_Kᵀ)) P_V
        joint                    out = softmax(s · Q [P_K ; K]ᵀ + mask) [P_V ; V]
        gated                    out = softmax(s · Q Kᵀ + mask) V + tanh(gate) softmax(s · Q P_Kᵀ) P_V

    It is learned directly or produced from a small learned input P' of shape (L_p, `encoder_dim`). See Li & Liang, *Prefix-Tuning*
    (arXiv 2101.00190), for the joint form; Wang et al., *PrefixMemory-Tuning* (arXiv 2506.13674), for the decoupled one; Zhang et al.,
    *LLaMA-Adapter* (arXiv 2303.16199), for the gate.

    Args:
        num_virtual_tokens (`int`, defaults to 20):
            L_p, the number of prefix positions in every chosen attention module.
        reparameterization (`str`, *optional*):
            `"none"`: the prefix itself is learned. `"log"`: steps move it the less, the further it is from its start, so that
            rates matter less. `"linear"`: P' W_up. `"mlp"`: W_2 act(W_1 P' + b_1) + b_2. `None` means `"log"` if
            `decoupled` with `init_weights=True`, `"none"` otherwise.
        sharing (`str`, defaults to `"projection"`):
            What the layers share: `"none"`, `"input"` (P' and the MLP's first layer), `"projection"` (the projection
            network) or `"all"`. Modules with another key/value shape have a projection of their own. Ignored for
            `reparameterization="none"` and `"log"`.
        encoder_dim (`int`, defaults to 64):
            The width of P'.
        encoder_hidden_size (`int`, *optional*):
            The hidden width of the MLP; `None` means `encoder_dim`. Only with `reparameterization="mlp"`.
        encoder_activation (`str`, defaults to `"tanh"`):
            The MLP's activation, a name in `transformers.activations.ACT2FN`.
        encoder_dropout (`float`, defaults to 0.0):
            Dropout on the produced prefix, in training only.
        layers_to_transform (`int` or `list[int]`, *optional*):
            The layers to prefix; `None` means all. Negative numbers count from the last layer.
        layers_pattern (`str` or `list[str]`, *optional*):
            The name of the module list that `layers_to_transform` counts in, if it is not the outermost one.
        target_modules (`str` or `list[str]`, *optional*):
            The attention modules to prefix, as name suffixes or one regular expression. `None` finds them: all
            attention modules that a text input reaches.
        exclude_modules (`str` or `list[str]`, *optional*):
            Attention modules to leave out, as name suffixes or one regular expression.
        encoder_prefix (`bool`, defaults to `True`):
            In encoder-decoder models, prefix the encoder's self-attention.
        cross_prefix (`bool`, defaults to `True`):
            In encoder-decoder models, prefix the decoder's cross-attention.
        prefix_scaling (`float`, *optional*):
            Factor on the encoder's output. `None` means one factor for keys and one for values, measured in each
            attention module: 16 and 16 (4 and 4 if `decoupled`) times the power of two nearest to the standard
            deviation of its own keys, or values; for `"linear"` and `"mlp"` a quarter of that (an eighth if `decoupled`);
            after a start from given keys and values half. A prefix then trains well at learning rates that suit LoRA;
            use lower ones for longer training.
        gating (`bool`, defaults to `False`):
            Add the prefix's own attention, scaled by tanh of a gate per head that starts at zero, to the untouched
            attention of the base model (LLaMA-Adapter, arXiv 2303.16199). At the start this is exactly the base model.
            A gate is 25 times its parameter, so it opens at the learning rate that suits keys and values.
        decoupled (`bool`, *optional*):
            `True`: add the prefix outside the softmax, so that it takes no attention away from the real tokens. Its
            values start at zero, so training starts from exactly the base model. `False`: the joint form, in which the
            prefix shares the softmax of the real tokens, as in PREFIX_TUNING. Conversions, starts from a text and
            other serving engines need this form. `None` means `True` unless `gating` or `init_weights="zero"` asks for
            another form.
        position_free (`bool`, *optional*):
            Where positions rotate queries and keys (RoPE): whether the prefix meets queries before their rotation, so
            that its scores do not depend on a query's position. `False` puts the prefix at fixed positions before the
            text, like PREFIX_TUNING and like a text's own keys and values. `None` means `True` if every chosen
            attention module has no such rotation, or one that can be undone. The resolved value is in
            `model.resolved_config(adapter_name)`, and is saved. In the joint form `True` learned better on a small
            model, and about as well on SmolLM2-135M's table-to-text.
        init_weights (`bool` or `str`, defaults to `True`):
            `True`: a quiet start, at the base model or close to it: random keys (in the joint form, ones that the
            attention module's own queries pay little attention to) and values of zero; with a gate, random values and
            a closed gate. `False` or `"random"`: random keys and values with the standard deviation of the module's
            own, in every form, and an open gate. `"activations"`: the base model's own keys and values of tokens
            spread over its vocabulary (if `decoupled`, keys only). `"zero"`: keys and values of zero. The start does
            not depend on `prefix_scaling`.
        modules_to_save (`list[str]`, *optional*):
            Further modules to train and save in full, for instance a classification head.

    Raises:
        TypeError: If a field has the wrong type.
        ValueError: If a field has a value out of its range, or two fields contradict each other.

    Example:

    ```py
    >>> from peft_prefix_plus import PrefixPlusConfig

    >>> config = PrefixPlusConfig(task_type="CAUSAL_LM", reparameterization="mlp", layers_to_transform=[-2, -1])
    >>> config.peft_type.value, config.is_prompt_learning
    ('PREFIX_PLUS', False)

    ```
    """

    num_virtual_tokens: int = field(default=20, metadata={"help": "Number of prefix positions per attention module."})
    reparameterization: Reparameterization | None = field(
        default=None,
        metadata={
            "help": "How the prefix is produced: 'none', 'log', 'linear' or 'mlp'. None means 'log' for a quiet start of the "
            "decoupled form, 'none' for all others."
        },
    )
    sharing: Sharing = field(
        default="projection",
        metadata={
            "help": "What the layers share: 'none', 'input', 'projection' or 'all'. Ignored for 'none' and 'log'."
        },
    )
    encoder_dim: int = field(default=64, metadata={"help": "Width of the learned input of the reparameterization."})
    encoder_hidden_size: int | None = field(
        default=None, metadata={"help": "Hidden width of the MLP reparameterization; None means encoder_dim."}
    )
    encoder_activation: str = field(default="tanh", metadata={"help": "Activation of the MLP reparameterization."})
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout on the produced prefix, in training only."})
    layers_to_transform: list[int] | int | None = field(
        default=None,
        metadata={"help": "Layers to prefix; None means all, negative numbers count from the last layer."},
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the module list that layers_to_transform counts in."}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Attention modules to prefix (name suffixes or a regex); None finds them."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Attention modules to leave out (name suffixes or a regex)."}
    )
    encoder_prefix: bool = field(
        default=True, metadata={"help": "Encoder-decoder models: prefix the encoder's self-attention."}
    )
    cross_prefix: bool = field(
        default=True, metadata={"help": "Encoder-decoder models: prefix the decoder's cross-attention."}
    )
    prefix_scaling: float | None = field(
        default=None,
        metadata={"help": "Factor on what the encoder puts out; None measures it in each attention module."},
    )
    gating: bool = field(
        default=False,
        metadata={"help": "A gate per head on the prefix, closed at the start: the base model at first."},
    )
    decoupled: bool | None = field(
        default=None,
        metadata={
            "help": "Add the prefix outside the softmax: it takes no attention away, and starts as the base model. False: the prefix "
            "shares the softmax. None means True, unless gating or init_weights='zero' asks for another form."
        },
    )
    position_free: bool | None = field(
        default=None,
        metadata={
            "help": "The prefix meets queries without their rotary position; None means True wherever possible."
        },
    )
    init_weights: bool | Initialization = field(
        default=True,
        metadata={
            "help": "True: a quiet start beside the base model. False or 'random': random keys and values, with an open "
            "gate. 'activations': the base model's own keys and values. 'zero': zeros."
        },
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full."}
    )

    # Whether the weights that belong to this configuration are about to be loaded (not a field: it is not saved).
    awaits_weights = False

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = PREFIX_PLUS
        self._check_types()
        if self.decoupled is None:
            self.decoupled = not self.gating and self.init_weights != "zero"
        if self.reparameterization is None:
            self.reparameterization = "log" if self.decoupled and self.init_weights is True else "none"
        self._check_values()
        self._check_contradictions()

    def _check_types(self) -> None:
        for name in ("layers_to_transform", "target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set, range)) and len(value) > MOST_ENTRIES:
                raise ValueError(f"`{name}` must have at most {MOST_ENTRIES} entries, got {len(value)}.")
        for name in ("num_virtual_tokens", "encoder_dim", "encoder_hidden_size"):
            value = getattr(self, name)
            if name == "encoder_hidden_size" and value is None:
                continue
            if not _is_integer(value):
                raise TypeError(f"`{name}` must be an int, got {value!r} of type {type(value).__name__}.")
            setattr(self, name, int(value))  # numpy's numbers cannot be saved as JSON
        for name in ("encoder_dropout", "prefix_scaling"):
            value = getattr(self, name)
            if name == "prefix_scaling" and value is None:
                continue
            if not _is_real(value):
                raise TypeError(f"`{name}` must be a float, got {value!r} of type {type(value).__name__}.")
            try:
                setattr(self, name, float(value))
            except OverflowError as error:
                raise ValueError(f"`{name}` must be a float, got a number too large to be one.") from error
        for name in ("reparameterization", "sharing", "encoder_activation"):
            value = getattr(self, name)
            if name == "reparameterization" and value is None:
                continue
            if not isinstance(value, str):
                raise TypeError(f"`{name}` must be a string, got {value!r} of type {type(value).__name__}.")
        for name in ("encoder_prefix", "cross_prefix", "gating", "decoupled", "position_free"):
            value, expected = getattr(self, name), "True or False"
            if name in ("decoupled", "position_free"):
                if value is None:
                    continue
                expected = "True, False or None"
            if not isinstance(value, bool):
                raise TypeError(f"`{name}` must be {expected}, got {value!r} of type {type(value).__name__}.")
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            is_names = isinstance(value, (list, tuple, set)) and all(isinstance(item, str) for item in value)
            is_pattern = isinstance(value, str) and name != "modules_to_save"
            if not (value is None or is_names or is_pattern):
                expected = "a list of names" if name == "modules_to_save" else "a string or a list of strings"
                raise TypeError(f"`{name}` must be {expected} or None, got {value!r}.")
            if is_names:
                setattr(self, name, list(value))
        layers = self.layers_to_transform
        if isinstance(layers, (tuple, set, range)):
            layers = self.layers_to_transform = sorted(layers) if isinstance(layers, set) else list(layers)
        is_list = isinstance(layers, list) and all(_is_integer(item) for item in layers)
        if not (layers is None or _is_integer(layers) or is_list):
            raise TypeError(f"`layers_to_transform` must be an int, a list of ints or None, got {layers!r}.")
        if layers is not None:
            self.layers_to_transform = [int(layer) for layer in layers] if isinstance(layers, list) else int(layers)

    def _check_values(self) -> None:
        for name in ("num_virtual_tokens", "encoder_dim", "encoder_hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
            if value is not None and value > LARGEST:
                raise ValueError(f"`{name}` must be at most {LARGEST}, got a larger number.")
        for name, allowed in (("reparameterization", ENCODERS), ("sharing", SHARINGS)):
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, allowed))}, got {value!r}.")
        if self.encoder_activation not in ACT2FN:
            raise ValueError(
                f"`encoder_activation` must be a name in transformers' ACT2FN, got {self.encoder_activation!r}. "
                f"Allowed: {', '.join(sorted(ACT2FN))}."
            )
        if not 0.0 <= self.encoder_dropout < 1.0:
            raise ValueError(f"`encoder_dropout` must be in [0, 1), got {self.encoder_dropout}.")
        if self.prefix_scaling is not None and not (math.isfinite(self.prefix_scaling) and self.prefix_scaling > 0):
            raise ValueError(f"`prefix_scaling` must be a positive, finite number, got {self.prefix_scaling}.")
        is_known = isinstance(self.init_weights, (bool, str)) and self.init_weights in INITIALIZATIONS
        if not is_known:  # 1 == True, but is no initialization
            raise ValueError(
                f"`init_weights` must be one of {', '.join(map(repr, INITIALIZATIONS))}, got {self.init_weights!r}."
            )
        for name in ("layers_to_transform", "target_modules"):
            if getattr(self, name) == []:
                raise ValueError(f"`{name}` is an empty list, which selects nothing. Use None to select everything.")
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            patterns = (value or []) if name == "layers_pattern" else []
            for pattern in [value] if isinstance(value, str) else patterns:
                try:
                    if len(pattern) > MOST_ENTRIES:
                        raise ValueError(f"it has {len(pattern)} characters, more than {MOST_ENTRIES}")
                    re.compile(pattern)  # PEFT's dialect
                    regex.compile(numbered_layer(pattern) if name == "layers_pattern" else pattern)  # see `targets`
                except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
                    raise ValueError(
                        f"`{name}` is {shortened(repr(pattern))}, no valid regular expression: {error}."
                    ) from error

    def _check_contradictions(self) -> None:
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` is set but `layers_to_transform` is not; set both or neither.")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError(
                "`layers_to_transform` cannot be used when `target_modules` is a string: a regular expression names "
                "the layers itself. Give `target_modules` as a list of suffixes, or put the layers into the pattern."
            )
        if self.encoder_hidden_size is not None and not ENCODERS[str(self.reparameterization)].has_hidden_layer:
            raise ValueError(
                f"`encoder_hidden_size` is {self.encoder_hidden_size}, but `reparameterization` is "
                f"{self.reparameterization!r} and has no hidden layer. Use reparameterization='mlp' or leave it None."
            )
        if self.gating and self.decoupled:
            raise ValueError(
                "`gating` and `decoupled` are both True: a prefix has a gated softmax of its own or none. Choose one."
            )
        if self.reparameterization == "log" and (self.gating or self.init_weights not in (True, "zero")):
            given = "`gating` is True" if self.gating else f"`init_weights` is {self.init_weights!r}"
            raise ValueError(
                f"`reparameterization` is 'log', whose values start at zero, and {given}, for which they start elsewhere. Use "
                "reparameterization='none'."
            )
        if self.decoupled and self.init_weights == "zero":
            raise ValueError(
                "`decoupled=True` with `init_weights='zero'` never learns: keys of zero pass no gradient to the values, "
                "and values of zero none to the keys. Use init_weights=True, which starts the values alone at zero."
            )
        if self.gating and self.init_weights == "zero":
            raise ValueError(
                "`gating=True` with `init_weights='zero'` never learns: a closed gate passes no gradient to the "
                "prefix and a prefix of zeros none to the gate. Use init_weights=True."
            )

    @classmethod
    def servable(cls, **fields: Any) -> PrefixPlusConfig:
        """
        Make a configuration that vLLM can serve from its cache: a joint prefix at fixed positions, in all layers.

        Args:
            fields: The other fields, as in [`PrefixPlusConfig`].

        Raises:
            ValueError: If a field contradicts this.

        Example:

        ```py
        >>> from peft_prefix_plus import PrefixPlusConfig

        >>> config = PrefixPlusConfig.servable(task_type="CAUSAL_LM", num_virtual_tokens=32)
        >>> config.decoupled, config.position_free
        (False, False)

        ```
        """
        for name, value in SERVABLE.items():
            if name in fields and fields[name] != value:
                raise ValueError(
                    f"`{name}` is {shortened(repr(fields[name]))}, and vLLM can serve an adapter only with {name}={value}. Leave it "
                    "out, or use PrefixPlusConfig(...), whose adapters transformers serves."
                )
        return cls(**{**fields, **SERVABLE})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PrefixPlusConfig:
        """
        Load the configuration of a saved adapter.

        Args:
            pretrained_model_name_or_path (`str`): A directory or a repository on the Hub.
            subfolder (`str`, *optional*): A folder in it.
            kwargs: As in [`PeftConfig.from_pretrained`].

        Raises:
            ValueError: If there is no configuration, it is broken, or the weights beside it were saved with another one.
        """
        return cls._with_weights(pretrained_model_name_or_path, subfolder, **kwargs)[0]

    @classmethod
    def _with_weights(
        cls, source: str, subfolder: str | None = None, **kwargs: Any
    ) -> tuple[PrefixPlusConfig, SavedWeights | None]:
        """Load a configuration as `from_pretrained` does, and return with it what the file of the weights says of them."""
        with naming_config(source, subfolder):
            config = super().from_pretrained(source, subfolder=subfolder, **kwargs)
        hub_kwargs, *_ = cls._split_kwargs(kwargs)  # type: ignore[no-untyped-call]
        weights = read_saved_weights(source, subfolder, **hub_kwargs)
        if weights is not None and isinstance(config, PrefixPlusConfig):
            check_saved_weights(weights, config.to_dict())
        config.awaits_weights = True
        return config, weights

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """
        Save `adapter_config.json` in a directory. If the directory has a model card, add to it how to load the
        adapter.

        Args:
            save_directory (`str`): The directory, made if it does not exist.
            kwargs: `auto_mapping_dict`, as in [`PeftConfig.save_pretrained`].
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"`save_directory` must be a directory, got the file {save_directory!r}.")
        os.makedirs(save_directory, exist_ok=True)
        fields = self.to_dict()
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if auto_mapping is not None:
            fields["auto_mapping"] = auto_mapping
        write_atomically(
            os.path.join(save_directory, "adapter_config.json"), json.dumps(fields, indent=2, sort_keys=True)
        )
        update_card_of_saved_config(save_directory)

    def _upload_modified_files(self, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        # called by `push_to_hub` last of all, when transformers has put its template of a card beside the configuration
        update_model_card(working_dir, repo_id, any_library=True)
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def numbered_layer(layers_pattern: str) -> str:
    """
    The regular expression for the start of a name in a numbered layer, whose stack `layers_pattern` names. Its first group is
    the stack's name, its last the layer's index.
    """
    return rf"((?:|.*?\.)(?:{layers_pattern}))\.(\d+)\."


def shortened(text: str, limit: int = 100) -> str:
    """Return a text for an error, without its middle if it is long."""
    return text if len(text) <= limit else f"{text[: limit // 2]} … {text[-limit // 2 :]}"


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)
