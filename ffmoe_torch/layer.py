"""MoELayer: the parameters and options of a mixture-of-experts layer. The arithmetic is elsewhere."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ffmoe_core import ExpertParallel, MoEConfig, routing_layout
from ffmoe_core.comm import Step, all_reduced
from ffmoe_core.comm.base import DEFAULT_TIMEOUT
from ffmoe_core.config import check_float
from ffmoe_core.errors import (
    ConfigError,
    DeviceError,
    DTypeError,
    LayoutError,
    ShapeError,
    UnsupportedError,
)

from .communicator import communicator_for
from .functional import as_token_mask, as_tokens, check_tensor
from .losses import InjectLosses, losses_by_name
from .operators import options_of, routed_experts
from .sharded import ShardedExperts
from .shared_expert import BesideExchanges, SharedExpert, on_a_side_stream
from .stats import MoEStats, tokens_per_expert

AUX_MODES = ("return", "inject")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MoELayer(nn.Module):
    """A mixture-of-experts feed-forward layer: ``output, losses = layer(x)``.

    Parameters
    ----------
    d_model : width H of input and output.
    ffn_dim : gate and up rows of an expert stacked, 2*I; even.
    num_experts : routed experts E, 1 to 1024.
    top_k : experts a token K, 1 to E.
    activation : "swiglu", "geglu" (tanh approximation) or "relu_squared" (relu(gate)^2 * up).
    gating : "softmax" or "sigmoid".
    num_shared_experts : S experts that every token visits: one GLU block of intermediate width S*I, run
        beside the routed ones on a GPU, in forward (in training in 16 bits).
    latent_dim : width L of a bottleneck, which is what crosses between ranks; the experts see
        ``proj_up(proj_down(x))``, of width H, and their output passes the same two projections. The gate reads
        x itself. None is off.
    capacity_factor : an expert takes at most ceil(capacity_factor*T*K/E) rows of a call; None is dropless.
    max_tokens_per_expert : a hard bound on an expert's rows; None is no bound.
    allow_dropped_tokens : False turns an overflow of either bound into a CapacityError (which waits for the
        device to know).
    aux_loss_coeff, z_loss_coeff : coefficients of the load-balance loss and the router z-loss.
    recompute_activations : keep nothing inside the experts for backward, compute it again there. Same
        bits, less memory, more time.
    norm_topk_prob : False keeps the selected scores as they are, True makes them sum to 1.
    routed_scaling_factor : multiplies the routed weights.
    num_expert_groups, topk_groups : only experts of the best ``topk_groups`` groups can be selected.
    expert_bias : adds a buffer ``expert_bias`` [E] to the scores when selecting (not when weighing), for
        ``update_expert_bias``. It is float32 whatever the layer's dtype.
    drop_policy : an overfull expert keeps its first rows ("position") or its heaviest ("probs").
    jitter : in training the gate reads x times a uniform number from 1-jitter to 1+jitter, element by
        element, from torch's generator.
    aux_mode : "return": the losses are to be added to the training loss. "inject": their gradient is added
        in the output's backward, as if they had been, and those returned are for logging. It is that of the
        losses as they are: what multiplies the training loss (GradScaler, a mean over accumulated batches)
        has no part in it.
    main_grad : backward adds the gradients of ``w_up`` and ``w_down``, unrounded, to the tensors that their
        attribute ``main_grad`` holds in forward (float32, or float64 for a float64 layer; the parameter's
        shape), as Megatron's fused gradient accumulation does. Their ``.grad`` stays None. Every backward
        through the layer adds, also one that is asked for other gradients only. Where one device holds all
        experts, plain eager calls only: UnsupportedError under torch.compile, autocast and dispatch modes.
        Where they are sharded, scaled as ``grad_reduction`` says.
    device, dtype : of the parameters. dtype is float32, float64, bfloat16 or float16.

    Sizes and options are those the layer was made with; ``jitter`` and ``main_grad`` may be set later.

    Parameters are ``gate.weight`` [E, H], ``w_up`` [E, 2I, H] (gate rows first), ``w_down`` [E, H, I],
    ``shared_expert.*``, ``proj_down.weight`` [L, H] and ``proj_up.weight`` [H, L]. ``gate`` holds the router's weight
    and is never called: hooks on it do not run, and a bias would be ignored.

    Raises
    ------
    ConfigError : an option is out of range or unknown; the message names it and what would work.
    """

    # Routing and losses of the last forward call, for stats(). In a list, as setting a module's attribute costs
    # more host time than launching a kernel.
    _last: list[tuple[Tensor, Tensor]]
    _sharded: ShardedExperts | None  # where other ranks hold experts, too
    expert_bias: Tensor | None
    expert_counts: Tensor | None
    proj_down: nn.Linear | None
    proj_up: nn.Linear | None

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int,
        activation: str = "swiglu",
        gating: str = "softmax",
        num_shared_experts: int = 0,
        latent_dim: int | None = None,
        capacity_factor: float | None = None,
        max_tokens_per_expert: int | None = None,
        allow_dropped_tokens: bool = True,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        recompute_activations: bool = False,
        *,
        norm_topk_prob: bool = True,
        routed_scaling_factor: float = 1.0,
        num_expert_groups: int | None = None,
        topk_groups: int | None = None,
        expert_bias: bool = False,
        drop_policy: str = "position",
        jitter: float = 0.0,
        aux_mode: str = "return",
        main_grad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        config = MoEConfig(
            d_model=d_model,
            ffn_dim=ffn_dim,
            num_experts=num_experts,
            top_k=top_k,
            activation=activation,
            gating=gating,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=routed_scaling_factor,
            num_expert_groups=num_expert_groups,
            topk_groups=topk_groups,
            capacity_factor=capacity_factor,
            max_tokens_per_expert=max_tokens_per_expert,
            allow_dropped_tokens=allow_dropped_tokens,
            drop_policy=drop_policy,
            aux_loss_coeff=aux_loss_coeff,
            z_loss_coeff=z_loss_coeff,
            recompute_activations=recompute_activations,
        )
        _check_width("num_shared_experts", num_shared_experts, 0)
        if latent_dim is not None:
            _check_width("latent_dim", latent_dim, 1)
        if not isinstance(jitter, int | float) or not 0 <= jitter < 1:
            raise ConfigError(f"jitter={jitter!r} must be a number from 0 to below 1")
        if aux_mode not in AUX_MODES:
            raise ConfigError(f"aux_mode={aux_mode!r} is unknown; known: {', '.join(map(repr, AUX_MODES))}")
        for name, flag in (("expert_bias", expert_bias), ("main_grad", main_grad)):
            if not isinstance(flag, bool):
                raise ConfigError(f"{name}={flag!r} must be True or False")
        if dtype is not None and dtype not in DTYPES:
            raise DTypeError(f"dtype={dtype} is not supported; supported: {', '.join(map(str, DTYPES))}")

        self.config = config
        self.num_shared_experts = num_shared_experts
        self.latent_dim = latent_dim
        self.jitter = jitter
        self.aux_mode = aux_mode
        self.main_grad = main_grad
        self._options = options_of(config)
        self._has_losses = aux_loss_coeff > 0 or z_loss_coeff > 0
        self._last = []
        self._sharded = None

        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        intermediate = config.intermediate
        self.gate = nn.Linear(d_model, num_experts, bias=False, **factory)
        self.w_up = nn.Parameter(torch.empty(num_experts, ffn_dim, d_model, **factory))
        self.w_down = nn.Parameter(torch.empty(num_experts, d_model, intermediate, **factory))
        self.shared_expert = (
            SharedExpert(d_model, num_shared_experts * intermediate, activation, **factory)
            if num_shared_experts
            else None
        )
        self.proj_down = self.proj_up = None
        if latent_dim is not None:
            self.proj_down = nn.Linear(d_model, latent_dim, bias=False, **factory)
            self.proj_up = nn.Linear(latent_dim, d_model, bias=False, **factory)
        bias = torch.empty(num_experts, dtype=torch.float32, device=device) if expert_bias else None
        counts = torch.empty(num_experts, dtype=torch.int64, device=device) if expert_bias else None
        self.register_buffer("expert_bias", bias)
        # Not persistent: they are emptied every step, and what a checkpoint would lose is part of one step.
        self.register_buffer("expert_counts", counts, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Kaiming-uniform with a=sqrt(5), each expert's matrices by themselves; the gate's times 0.01.

        Where experts are sharded, and ranks' generators in the same state, what a layer in one process would get: each
        rank draws all experts, and keeps its own.
        """
        nn.init.kaiming_uniform_(self.gate.weight, a=math.sqrt(5))
        own = range(self.num_experts) if self._sharded is None else self._sharded.expert_parallel.experts
        with torch.no_grad():
            self.gate.weight.mul_(0.01)
            for weights in (self.w_up, self.w_down):
                for expert in range(self.num_experts):
                    drawn = weights[expert - own.start] if expert in own else torch.empty_like(weights[0])
                    nn.init.kaiming_uniform_(drawn, a=math.sqrt(5))
        for module in (self.shared_expert, self.proj_down, self.proj_up):
            if module is not None:
                module.reset_parameters()
        for buffer in (self.expert_bias, self.expert_counts):
            if buffer is not None:
                buffer.zero_()

    @property
    def d_model(self) -> int:
        """H, the width of a token."""
        return self.config.d_model

    @property
    def ffn_dim(self) -> int:
        """2*I: gate and up rows of an expert stacked."""
        return self.config.ffn_dim

    @property
    def num_experts(self) -> int:
        """E, of all ranks."""
        return self.config.num_experts

    @property
    def top_k(self) -> int:
        """K experts a token."""
        return self.config.top_k

    @property
    def expert_params(self) -> tuple[nn.Parameter, nn.Parameter]:
        """``(w_up, w_down)``: the parameters that belong to single experts."""
        return self.w_up, self.w_down

    def forward(self, x: Tensor, valid_mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """``(output, losses)`` for x [*, H] of the parameters' dtype (under autocast any floating dtype).

        ``valid_mask`` [*] bool: False marks a token to ignore. The routed experts
        add zero to its output, and it has no part in losses and statistics; shared experts treat all tokens
        alike.

        ``output`` is [*, H]. ``losses`` holds "aux_loss" where ``aux_loss_coeff > 0`` and "z_loss" where
        ``z_loss_coeff > 0``: 0-d float32 tensors (float64 for a float64 layer), times the coefficient, with
        gradient unless ``aux_mode="inject"``.

        Raises ShapeError, DTypeError and DeviceError for input that does not fit, CapacityError as
        ``allow_dropped_tokens`` says, NonFiniteError in checked mode (``FFMOE_CHECK=1``), OutOfMemoryError
        (the layer stays usable). With ``main_grad=True``: ConfigError, DTypeError, ShapeError, DeviceError and
        LayoutError for a ``main_grad`` that is missing or does not fit.
        """
        w_up, w_down = _parameter(self, "w_up"), _parameter(self, "w_down")
        if self._sharded is None:
            tokens, mask, weight_sums = self._arguments(x, valid_mask, w_up, w_down)
        else:
            tokens, mask, weight_sums = self._sharded.telling(self._arguments, x, valid_mask, w_up, w_down)
        expert, shared, beside = self.shared_expert, None, None
        if expert is not None and self._sharded is None:
            shared = on_a_side_stream(expert, tokens)
        elif expert is not None:
            beside = BesideExchanges(expert, tokens)
        router_input = None
        if self.jitter and self.training:
            noise = torch.empty_like(tokens).uniform_(1 - self.jitter, 1 + self.jitter)
            router_input = tokens * noise
        config = self.config
        inject = self._has_losses and self.aux_mode == "inject"
        buffers = self._buffers
        gate_weight = _parameter(self._modules["gate"], "weight")
        if self._sharded is None:
            routed = self._through_latent(tokens)
            if router_input is None and routed is not tokens:
                router_input = tokens
            output, losses, routing = routed_experts(
                routed,
                router_input,
                gate_weight,
                w_up,
                w_down,
                buffers["expert_bias"],
                mask,
                self._options,
                config,
                config.recompute_activations,
                weight_sums,
            )
            output, balance = self._through_latent(output), routing
        else:
            output, losses, routing, balance = self._sharded(
                tokens,
                router_input,
                gate_weight,
                w_up,
                w_down,
                buffers["expert_bias"],
                mask,
                self.proj_down,
                self.proj_up,
                weight_sums,
                beside,
                inject,
            )
        statistics = losses.detach() if losses.requires_grad else losses
        if torch.compiler.is_compiling():
            # inductor's backward fails on a graph that returns a tensor both with and without gradient
            statistics = statistics.clone()
        self._last[:] = [(balance, statistics)]
        if buffers["expert_counts"] is not None and self.training:
            buffers["expert_counts"] += tokens_per_expert(routing, self.num_experts)

        if shared is not None:
            output = output + shared()
        if inject:
            if self._sharded is None:
                output = InjectLosses.apply(output, losses)
            losses = losses.detach()
        if x.dim() != 2:
            output = output.view(x.shape)
        if not self._has_losses:
            return output, {}
        return output, losses_by_name(losses, config.aux_loss_coeff, config.z_loss_coeff)

    def _arguments(
        self, x: Tensor, valid_mask: Tensor | None, w_up: Tensor, w_down: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Tokens [T, H], mask [T] and the weights' sums of a call, if they are fit for it."""
        tokens = as_tokens(x, "x", self.d_model)
        mask = None if valid_mask is None else as_token_mask(valid_mask, x)
        if tokens.dtype != w_up.dtype or tokens.device != w_up.device:
            _check_fits(tokens, w_up)
        adding = self.main_grad and torch.is_grad_enabled()
        return tokens, mask, _main_grads(w_up=w_up, w_down=w_down) if adding else {}

    def _through_latent(self, x: Tensor) -> Tensor:
        """x [T, H] through the narrow projections, where the layer has them."""
        if self.proj_down is None or self.proj_up is None:
            return x
        latent: Tensor = self.proj_up(self.proj_down(x))
        return latent

    def shard_experts(
        self,
        ep_group: Any = None,
        ep_backend: str = "auto",
        ep_timeout: float = DEFAULT_TIMEOUT,
        *,
        ep_chunks: int = 1,
        loss_scope: str = "group",
        grad_reduction: str = "mean",
        name: str = "MoELayer",
    ) -> None:
        """Spread the experts over the ranks of a group: keep this rank's, and let go of the others.

        To be called on every rank, after ``to(device)`` and before an optimizer's first step. From then on ``w_up``
        and ``w_down`` hold the experts ``expert_range(num_experts, ep_size, ep_rank)``, and every rank must call
        forward and backward of its layers in the same order, with no tokens if it has none. A capacity bounds
        what each rank sends to an expert. ``torch.compile`` breaks its graph at the exchanges.

        Parameters
        ----------
        ep_group : a ProcessGroup, an mpi4py communicator, a ``Communicator`` of ffmoe_core, or None: all ranks.
        ep_backend : "nccl" (GPUs; over a ProcessGroup's store or MPI), "mpi" (CPUs, mpi4py), "torch" (the
            ProcessGroup's own collectives) or "auto".
        ep_timeout : seconds an exchange waits for other ranks before it raises CommError.
        ep_chunks : into so many runs this rank's tokens are cut, of which one crosses while another is at the experts.
            More hide more of the exchanges, and make each product smaller. Not with ``latent_dim``.
        loss_scope : "group": losses and ``stats()`` are of all ranks' tokens. "local": of this rank's.
        grad_reduction : "mean": the experts' gradients are scaled for dense gradients that are averaged over the
            ranks (DDP, FSDP): both are then the gradient of the mean of all ranks' losses. "sum": they are those
            of the sum, for dense gradients that are added up.
        name : what errors call the layer.

        Raises
        ------
        ConfigError : the ranks' layers differ in an option or dtype, which the message names; an unknown option
            here; an ``ep_chunks`` that is no whole number of at least 1, too many or beside ``latent_dim``; more
            ranks than experts; a layer that is sharded already.
        DeviceError : "nccl" for a layer on a CPU.
        MissingDependencyError : the transport needs mpi4py or CuPy.
        CommError : not all ranks came within the timeout.
        """
        if self._sharded is not None:
            raise ConfigError(f"{name} is sharded already")
        comm = communicator_for(ep_group, ep_backend, ep_timeout, self.w_up.device)
        options = {
            "num_shared_experts": self.num_shared_experts,
            "latent_dim": self.latent_dim,
            "expert_bias": self.expert_bias is not None,
            "jitter": self.jitter,
            "aux_mode": self.aux_mode,
            "main_grad": self.main_grad,
            "dtype": self.w_up.dtype,
            "device": self.w_up.device.type,
            "grad_reduction": grad_reduction,
        }
        expert_parallel = ExpertParallel(
            comm, self.config, layer=name, loss_scope=loss_scope, ep_chunks=ep_chunks, agree_on=options
        )
        if ep_chunks > 1 and self.latent_dim is not None:
            raise ConfigError(
                f"ep_chunks={ep_chunks} with latent_dim={self.latent_dim}: the projections take all tokens at once; "
                "use ep_chunks=1"
            )
        self._sharded = ShardedExperts(expert_parallel, grad_reduction)
        own = slice(expert_parallel.experts.start, expert_parallel.experts.stop)
        for weights in ("w_up", "w_down"):
            parameter = getattr(self, weights)
            # the same object: an optimizer that has it already goes on with it
            parameter.data = parameter.detach()[own].clone()
            parameter.grad = None

    def stats(self) -> MoEStats:
        """Statistics of the last forward call; of a call without tokens where there was none.

        Of all ranks' tokens where the experts are sharded with ``loss_scope="group"``.

        Does not wait for the device; reading an attribute of the result does.
        """
        if not self._last:
            empty = torch.zeros(routing_layout(0, self.top_k, self.num_experts).nbytes, dtype=torch.uint8)
            return MoEStats(empty, torch.zeros(3), self.num_experts)
        return MoEStats(*self._last[0], self.num_experts)

    @torch.no_grad()
    def update_expert_bias(self, rate: float) -> None:
        """Move each expert's bias by ``rate`` towards balance, and count from zero again.

        ``expert_bias += rate * sign(mean - count)`` with the tokens that training calls routed to each expert
        since the last update (DeepSeek-V3's balancing without a loss). To be called between an optimizer
        step and the next forward. Activation checkpointing may count every token twice, which changes no
        sign. Does not wait for the device.

        Raises ConfigError for a layer made without ``expert_bias=True``, and a rate that is not a finite number.
        """
        if self.expert_bias is None or self.expert_counts is None:
            raise ConfigError("update_expert_bias needs a layer made with expert_bias=True")
        counts = self.expert_counts
        if self._sharded is None:
            check_float("rate", rate)
        else:
            self._sharded.telling(check_float, "rate", rate)
            counts.copy_(all_reduced(self._sharded.comm, counts, Step("expert bias", self._sharded.name)))
        # in integers, as the sign of a rounded mean minus a count could be wrong
        signs = torch.sign(counts.sum() - self.num_experts * counts)
        self.expert_bias.add_(signs.to(torch.float32), alpha=rate)
        counts.zero_()

    def extra_repr(self) -> str:
        named = {
            "d_model": self.d_model,
            "ffn_dim": self.ffn_dim,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
        }
        return ", ".join(f"{name}={value!r}" for name, value in (named | self._options_set()).items())

    def _options_set(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        config, default = self.config, MoEConfig(d_model=1, ffn_dim=2, num_experts=1, top_k=1)
        names = [
            name for name in config.__dataclass_fields__ if getattr(config, name) != getattr(default, name)
        ]
        options = {name: getattr(config, name) for name in names if not hasattr(self, name)}
        if self.num_shared_experts:
            options["num_shared_experts"] = self.num_shared_experts
        if self.latent_dim is not None:
            options["latent_dim"] = self.latent_dim
        if self.expert_bias is not None:
            options["expert_bias"] = True
        if self.jitter:
            options["jitter"] = self.jitter
        if self.main_grad:
            options["main_grad"] = True
        if self.aux_mode != "return":
            options["aux_mode"] = self.aux_mode
        return options

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoELayer":
        before = self.expert_bias
        super()._apply(fn, recurse)
        after = self.expert_bias
        if before is not None and after is not None and after.dtype != torch.float32:
            # .to(bfloat16) and .half() mean the weights; a bias in steps of 0.001 would be rounded away
            self.expert_bias = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        if self._sharded is not None:
            self._sharded.take_own(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)
        if self.expert_bias is None or self.expert_counts is None or f"{prefix}expert_bias" not in state_dict:
            return
        if self.expert_bias.dtype != torch.float32:  # with assign=True it is the state dict's
            self.expert_bias = self.expert_bias.float()
        # these are of the bias before; and no state dict brings them from the meta device to where the bias is
        if self.expert_counts.device != self.expert_bias.device:
            self.expert_counts = torch.empty_like(self.expert_counts, device=self.expert_bias.device)
        self.expert_counts.zero_()

    def __getstate__(self) -> dict[str, Any]:
        if self._sharded is not None:
            raise UnsupportedError(
                "a layer with sharded experts cannot be pickled or copied; save its state_dict"
            )
        return super().__getstate__() | {"_last": []}


def _parameter(module: Any, name: str) -> Tensor:
    """``getattr(module, name)``, sooner: a module finds its parameters only after all else has failed."""
    found = module._parameters.get(name)
    return getattr(module, name) if found is None else found


def _check_fits(x: Tensor, weight: Tensor) -> None:
    """Whether the layer can take x, which differs from its weights in dtype or device."""
    if weight.is_meta and not x.is_meta:
        raise DeviceError(
            "the layer is on the meta device, without memory; give it some with to_empty and reset_parameters, or "
            "with load_state_dict(assign=True)"
        )
    if x.device != weight.device:
        raise DeviceError(f"x is on {x.device} but the layer is on {weight.device}; move one of them")
    castable = x.is_floating_point() and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not (castable and torch.is_autocast_enabled(x.device.type)):
        raise DTypeError(f"x has dtype {x.dtype} but the layer has {weight.dtype}; they must agree")


def _main_grads(**weights: Tensor) -> dict[str, Tensor]:
    """The ``main_grad`` of each weight that has a gradient, by moe_backward's name for it."""
    sums = {}
    for name, weight in weights.items():
        if not weight.requires_grad:
            continue
        buffer = getattr(weight, "main_grad", None)
        wanted = torch.float64 if weight.dtype == torch.float64 else torch.float32
        if buffer is not None:
            check_tensor(buffer, f"{name}.main_grad")
        else:
            raise ConfigError(
                f"{name} has no main_grad; with main_grad=True, give {name}.main_grad a {wanted} tensor of shape "
                f"{tuple(weight.shape)} before the first forward"
            )
        if buffer.dtype != wanted:
            raise DTypeError(f"{name}.main_grad has dtype {buffer.dtype}; expected {wanted}")
        if buffer.shape != weight.shape:
            raise ShapeError(
                f"{name}.main_grad has shape {tuple(buffer.shape)}; expected that of {name}, {tuple(weight.shape)}"
            )
        if buffer.device != weight.device:
            raise DeviceError(f"{name}.main_grad is on {buffer.device} but {name} is on {weight.device}")
        if not buffer.is_contiguous():
            raise LayoutError(f"{name}.main_grad is not contiguous; it is added to in place")
        sums[f"{name}_grad"] = buffer
    return sums


def _check_width(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"{name}={value!r} must be an int of at least {low}")
