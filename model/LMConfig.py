"""The configuration of a MiniMind model, its checks, and the three named models."""

from typing import Any

from transformers import PretrainedConfig

MODELS: dict[str, dict[str, Any]] = {
    "minimind-v1-small": {"dim": 512, "n_layers": 8},
    "minimind-v1": {"dim": 768, "n_layers": 16},
    "minimind-v1-moe": {"dim": 512, "n_layers": 8, "use_moe": True},
}


class LMConfig(PretrainedConfig):
    """Fields and defaults of MiniMind v1; edit a default here and every script builds that model.

    ``hidden_dim=None`` means 4 * dim * 2/3 rounded up to ``multiple_of``, the width that gives
    SwiGLU the parameters of a plain 4 * dim layer (GLU Variants, arXiv:2002.05202, section 2).
    ``rope_scaling`` is ``"linear:4"``, ``"yarn:4"`` or the dictionary that transformers uses;
    ``max_seq_len`` is the context after scaling, so a model trained on 512 positions becomes
    ``max_seq_len=2048, rope_scaling="linear:4"``.

    Raises:
        ValueError: a field that no model can be built from; the message says what would do.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {
        "hidden_size": "dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "intermediate_size": "hidden_dim",
        "rms_norm_eps": "norm_eps",
        "attention_dropout": "dropout",
        "num_experts": "n_routed_experts",
    }

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int = 16,
        n_kv_heads: int | None = 8,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 512,
        rope_theta: float = 1e4,
        dropout: float = 0.0,
        flash_attn: bool = True,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int | bool | None = 2,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.01,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        rope_scaling: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.dim = dim
        self.n_layers = n_layers
        self.n_heads = n_heads
        self.n_kv_heads = n_kv_heads
        self.vocab_size = vocab_size
        self.multiple_of = multiple_of
        self.hidden_dim = hidden_dim
        self.norm_eps = norm_eps
        self.max_seq_len = max_seq_len
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.flash_attn = flash_attn
        self.use_moe = use_moe
        self.num_experts_per_tok = num_experts_per_tok
        self.n_routed_experts = n_routed_experts
        self.n_shared_experts = int(n_shared_experts or 0)  # True in v1's released files: one
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = seq_aux
        self.norm_topk_prob = norm_topk_prob
        self.use_cache = kwargs.pop("use_cache", True)
        for name in self.attribute_map.keys() & kwargs.keys():
            setattr(self, name, kwargs.pop(name))  # transformers' name of one of our fields
        if self.use_moe:  # a router is there for whoever finds this name (trl)
            self.output_router_logits = kwargs.pop("output_router_logits", False)
        if self.n_kv_heads is None:
            self.n_kv_heads = self.n_heads
        self.check()
        if self.hidden_dim is None:
            self.hidden_dim = swiglu_width(self.dim, self.multiple_of)
        stored_scaling = kwargs.pop("rope_parameters", None)
        self.rope_scaling = stored_scaling if rope_scaling is None else rope_scaling
        # v1's ids; tied in every model of the family
        for name, value in (("bos_token_id", 1), ("eos_token_id", 2), ("pad_token_id", 0)):
            kwargs.setdefault(name, value)
        kwargs.setdefault("tie_word_embeddings", True)
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    @property
    def router_aux_loss_coef(self) -> float:
        """transformers' name of ``aux_loss_alpha``, which only an MoE has: trl adds a balance loss
        of its own for a model with both names, because it does not run the head that adds ours.
        """
        if not self.use_moe:
            raise AttributeError("router_aux_loss_coef: without use_moe there is no router")
        return self.aux_loss_alpha

    @router_aux_loss_coef.setter
    def router_aux_loss_coef(self, value: float) -> None:
        self.aux_loss_alpha = value

    @property
    def rope_scaling(self) -> dict[str, Any]:
        """What is stored as ``rope_parameters``; takes all that ``__init__`` takes."""
        return self.rope_parameters

    @rope_scaling.setter
    def rope_scaling(self, scaling: str | dict[str, Any] | None) -> None:
        self.rope_parameters = parse_rope_scaling(scaling, self.rope_theta, self.max_seq_len)
        self.rope_theta = self.rope_parameters["rope_theta"]  # a dictionary may bring its own

    def check(self) -> None:
        """Raise ``ValueError`` with the next move for a field that no model can be built from."""
        at_least_one = "dim n_layers n_heads n_kv_heads vocab_size multiple_of max_seq_len".split()
        if self.hidden_dim is not None:
            at_least_one += ["hidden_dim"]
        if self.use_moe:
            at_least_one += ["num_experts_per_tok", "n_routed_experts"]
        for name in at_least_one:
            value = getattr(self, name)
            if type(value) is not int or value < 1:  # True is an int, and no width
                raise ValueError(f"{name}={value!r} is not a positive whole number")
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"{name}={value!r} is not a positive number")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}: "
                "each kv head serves the same number of query heads"
            )
        if self.dim % (2 * self.n_heads):
            nearest = 2 * self.n_heads * max(1, round(self.dim / (2 * self.n_heads)))
            raise ValueError(
                f"dim={self.dim} does not divide into n_heads={self.n_heads} heads of even width "
                f"(rotary positions turn pairs): try dim={nearest}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is not in [0, 1)")
        if self.n_shared_experts < 0:
            raise ValueError(
                f"n_shared_experts={self.n_shared_experts} is negative: use 0 for none"
            )
        if self.use_moe and self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok} is more than n_routed_experts="
                f"{self.n_routed_experts}: a token can choose only experts that exist"
            )
        if self.scoring_func != "softmax":
            raise ValueError(f'scoring_func={self.scoring_func!r} is unknown: use "softmax"')


def swiglu_width(dim: int, multiple_of: int) -> int:
    """Return 4 * dim * 2/3 rounded up to ``multiple_of``."""
    return -(-int(4 * dim * 2 / 3) // multiple_of) * multiple_of


def parse_rope_scaling(
    scaling: str | dict[str, Any] | None, rope_theta: float, max_seq_len: int
) -> dict[str, Any]:
    """Return transformers' ``rope_parameters`` for ``"linear:4"``, ``"yarn:4"``, its own dictionary
    (of those kinds, or of the kind ``"default"``) or None.

    Linear position interpolation is arXiv:2306.15595, section 2.3; YaRN is arXiv:2309.00071,
    section 3.4.

    Raises:
        ValueError: another kind, or a factor below 1.
    """
    if scaling is None:
        return {"rope_type": "default", "rope_theta": rope_theta}
    if isinstance(scaling, dict):
        kind = scaling.get("rope_type", scaling.get("type", "default"))  # "type" before version 5
        parameters = {"rope_theta": rope_theta, **scaling, "rope_type": kind}
        parameters.pop("type", None)
        if kind == "default":
            return parameters
    else:
        kind, _, factor = str(scaling).partition(":")
        parameters = {"rope_theta": rope_theta, "rope_type": kind, "factor": factor}
    try:
        parameters["factor"] = float(parameters["factor"])
    except (KeyError, TypeError, ValueError):
        parameters["factor"] = 0.0  # refused below
    if kind not in ("linear", "yarn") or not 1 <= parameters["factor"] < float("inf"):
        raise ValueError(
            f'rope_scaling={scaling!r} is unknown: use "linear:F" or "yarn:F" with F the factor by '
            "which the context grows, for example linear:4"
        )
    if kind == "yarn":
        trained = max(1, round(max_seq_len / parameters["factor"]))
        parameters.setdefault("original_max_position_embeddings", trained)
    return parameters
