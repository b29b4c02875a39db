"""The routed experts of a layer that are spread over ranks, for torch's autograd.

Four functions, so that torch's own operations can stand between them: dispatch, experts, and combine in two halves.
The experts' weights are inputs of the first, whose gradient runs last: theirs are computed while the tokens' are on
their way. What stands between the halves of combine runs beside its exchange, in forward and in backward.
"""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import _StopRecomputationError

from ffmoe_core import ExpertParallel, expert_range
from ffmoe_core.arrays import as_array
from ffmoe_core.comm import Communicator, Step
from ffmoe_core.ep_types import Combining, Dispatched, Sizes, Underway
from ffmoe_core.errors import CommError, ConfigError

from .dense_glu import Spared, gradients
from .losses import InjectLosses
from .shared_expert import BesideExchanges
from .surroundings import autocast_all, refuse_functorch, refuse_tangents

GRAD_REDUCTIONS = ("mean", "sum")

_NOTHING: dict[str, Any] = dict.fromkeys(Dispatched._fields)

_graph_task = torch._C._current_graph_task_id  # the number of the running backward pass

WeightGradients = tuple[Tensor | None, Tensor | None]  # of w_up and w_down


class ShardedOutput(NamedTuple):
    """What ``ShardedExperts`` returns."""

    output: Tensor  # [T, H]
    losses: Tensor  # [3]
    routing: Tensor  # uint8 [n], of this rank's tokens
    balance: Tensor  # uint8 [n], whose end is that of ``routing``, over the tokens that the losses are of


class ShardedExperts:
    """A layer's ExpertParallel, and how gradients are to be scaled."""

    def __init__(self, expert_parallel: ExpertParallel, grad_reduction: str) -> None:
        if grad_reduction not in GRAD_REDUCTIONS:
            known = ", ".join(map(repr, GRAD_REDUCTIONS))
            raise ConfigError(f"grad_reduction={grad_reduction!r} is unknown; known: {known}")
        self.expert_parallel = expert_parallel
        # Every other parameter's gradient is averaged over ranks; these come as sums.
        self.weight_scale = 1 / expert_parallel.comm.size if grad_reduction == "mean" else 1.0

    @property
    def comm(self) -> Communicator:
        return self.expert_parallel.comm

    @property
    def name(self) -> str:
        return self.expert_parallel.layer

    @torch.compiler.disable
    def telling(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """``function(*arguments)``, of whose error the other ranks hear, who would wait for this one."""
        try:
            return function(*arguments)
        except (CommError, _StopRecomputationError):  # the second is how checkpointing ends a recomputation
            raise
        except BaseException as error:
            self.comm.abort(f"{type(error).__name__}: {error}")
            raise

    @torch.compiler.disable
    def __call__(
        self,
        tokens: Tensor,
        router_input: Tensor | None,
        gate_weight: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        expert_bias: Tensor | None,
        valid_mask: Tensor | None,
        proj_down: nn.Module | None,
        proj_up: nn.Module | None,
        weight_sums: Mapping[str, Tensor],
        beside: BesideExchanges | None,
        inject: bool,
    ) -> ShardedOutput:
        """The routed experts' output for tokens [T, H], plus that of ``beside``.

        With projections, what crosses is as narrow as they are. ``weight_sums`` as for ``routed_experts``. With
        ``inject`` the output's backward gives the losses theirs.
        """
        wire = tokens
        self.telling(_refuse_transforms, tokens, router_input, gate_weight, w_up, w_down)
        if proj_down is not None:
            wire = self.telling(proj_down, tokens)
            router_input = tokens if router_input is None else router_input
        wire, router_input, gate_weight, w_up, w_down = autocast_all(
            wire, router_input, gate_weight, w_up, w_down
        )
        call = _Call(self, weight_sums, beside)
        received, weights, losses = _Dispatch.apply(
            call, wire, router_input, gate_weight, w_up, w_down, expert_bias, valid_mask
        )
        if proj_up is not None:
            (received,) = autocast_all(self.telling(proj_up, received))
        rows = _Experts.apply(call, received, weights, w_up.detach(), w_down.detach(), received.requires_grad)
        if proj_down is not None:
            (rows,) = autocast_all(self.telling(proj_down, rows))
        # Backward comes to what is between them when the second has started an exchange, and before the first waits.
        returned = _StartCombine.apply(call, rows)
        self.telling(call.finish_beside)
        added = None
        if beside is not None and proj_up is None:
            added = self.telling(_addable, beside.output, returned, len(tokens))
        output = _FinishCombine.apply(call, returned, added)
        dispatched = call.take()
        if proj_up is not None:
            output = self.telling(proj_up, output)
        if beside is not None and added is None:
            output = output + self.telling(beside.join)
        if inject:
            output = InjectLosses.apply(output, losses)
        balance = dispatched.routing if dispatched.balance is None else dispatched.balance.view(torch.uint8)
        return ShardedOutput(output, losses, dispatched.routing, balance)

    def gather(self, **weights: Tensor) -> dict[str, Tensor]:
        """Every rank's experts of each [experts, ...] tensor, on the CPU; one expert crosses at a time."""
        ep, comm = self.expert_parallel, self.comm
        gathered = {
            name: torch.empty(ep.config.num_experts, *own.shape[1:], dtype=own.dtype)
            for name, own in weights.items()
        }
        for owner in range(comm.size):
            for expert in expert_range(ep.config.num_experts, comm.size, owner):
                from_ranks = [int(rank == owner) for rank in range(comm.size)]
                for name, own in weights.items():
                    one = own.new_empty(1, *own.shape[1:])
                    copies = own.new_empty(0, *own.shape[1:])
                    if owner == comm.rank:
                        mine = own.detach()[expert - ep.experts.start]
                        copies = mine.expand(comm.size, *mine.shape).contiguous()
                    (send, space), (recv, _) = as_array(copies), as_array(one)
                    to_ranks = [int(owner == comm.rank)] * comm.size
                    step = Step("gathering of the experts", self.name)
                    comm.all_to_all_v(space, [(send, recv)], to_ranks, from_ranks, step).wait()
                    gathered[name][expert] = one[0].cpu()
        return gathered

    def take_own(self, state_dict: dict[str, Any], prefix: str) -> None:
        """In a state dict with all experts, only this rank's are left."""
        for name in (f"{prefix}w_up", f"{prefix}w_down"):
            experts = state_dict.get(name)
            if experts is not None and len(experts) == self.expert_parallel.config.num_experts:
                own = self.expert_parallel.experts
                # a copy: load_state_dict(assign=True) would keep all experts' memory for the sake of these
                state_dict[name] = experts[own.start : own.stop].clone()


def _addable(output: Any, rows: Tensor, num_tokens: int) -> Tensor | None:
    """A shared expert's output that the sum over a token's ranks can take in, without a pass over memory of its own.

    Not where it is computed later, or is another module's and of another dtype or shape: that is added as torch does.
    """
    if not isinstance(output, Tensor) or output.dtype != rows.dtype:
        return None
    return output.contiguous() if output.shape == (num_tokens, rows.shape[1]) else None


def _refuse_transforms(*tensors: Tensor | None) -> None:
    if torch._C._are_functorch_transforms_active():
        refuse_functorch()
    refuse_tangents(tensors)


class _Call:
    """What the functions of one forward call hand to each other, and so do their gradients."""

    def __init__(
        self, sharded: ShardedExperts, weight_sums: Mapping[str, Tensor], beside: BesideExchanges | None
    ) -> None:
        self._beside = beside
        self._stopped: _StopRecomputationError | None = None  # what its start raised
        self._records = torch.is_grad_enabled()
        self.weight_scale = sharded.weight_scale
        self.weight_sums = weight_sums
        self.expert_parallel = sharded.expert_parallel
        self.dispatched: Dispatched | None = None
        self.sizes: Sizes | None = None
        # with the number of their backward pass: one that ends between experts and dispatch leaves them behind
        self.weight_gradients: tuple[int, Callable[..., Callable[[], WeightGradients]]] | None = None
        self.underway: tuple[int, Underway] | None = None
        self.combining: Combining | None = None  # between its halves, in forward and in backward

    def start(self, multiprocessors: int, flop: float) -> None:
        """Launches what runs beside the dispatch; autograd, which is off inside of a function, records it."""
        if self._beside is not None:
            try:
                with torch.set_grad_enabled(self._records):
                    self._beside.start(Spared(multiprocessors, flop))
            except _StopRecomputationError as stop:
                self._stopped = stop  # no failure, and the other ranks wait for this one's tokens

    def arrive(self) -> None:
        """The tokens are there, or the caller's stream waits for them, and now for what ran beside them."""
        if self._beside is not None:
            self._beside.arrive()
        if self._stopped is not None:
            raise self._stopped

    def finish_beside(self) -> None:
        """Launches what runs while the rows are on their way home."""
        beside, self._beside = self._beside, None
        try:
            if beside is not None:
                beside.finish()
        except (
            _StopRecomputationError
        ):  # no failure, and what is on its way has memory until it is waited for
            for transfer in self.take_combining().transfers:
                transfer.wait()
            raise

    def start_backward(self) -> None:
        """With chunks the functions' gradients hand each other what they have started."""
        if self.expert_parallel.ep_chunks > 1:
            self.underway = _graph_task(), Underway()

    def dispatched_again(self, **parts: Tensor | None) -> Dispatched:
        """In backward: those parts of what was dispatched that a function's gradient reads."""
        graph_task, underway = self.underway or (-1, None)
        if graph_task != _graph_task():
            underway = None
        return Dispatched(**_NOTHING | parts | {"sizes": self.sizes, "underway": underway})

    def take_combining(self) -> Combining:
        combining, self.combining = self.combining, None
        assert combining is not None
        return combining

    def take(self) -> Dispatched:
        """What was dispatched: backward has what it needs in autograd's keeping, which knows when to let go."""
        dispatched, self.dispatched = self.dispatched, None
        assert dispatched is not None
        return dispatched


_Gradients = tuple[Tensor | None, ...]


def _differentiable_once(backward: Callable[..., _Gradients]) -> Callable[..., _Gradients]:
    """A Function's backward from ``backward(ctx, saved, *grads)``, where ``saved`` are its saved tensors.

    Torch's once_differentiable takes gradients for constants wherever those that come are: what is missing from a
    second derivative would go unnoticed.
    """

    @wraps(backward)
    def refusing(ctx: Any, *grads: Tensor) -> _Gradients:
        def function(*tensors: Tensor) -> _Gradients:
            return backward(ctx, tensors[len(grads) :], *tensors[: len(grads)])

        return gradients(function, *grads, *ctx.saved_tensors)

    return refusing


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        x: Tensor,
        router_input: Tensor | None,
        gate_weight: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        expert_bias: Tensor | None,
        valid_mask: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = x.contiguous()
        call.dispatched = dispatched = call.expert_parallel.dispatch(
            x,
            gate_weight,
            router_input=router_input,
            expert_bias=expert_bias,
            valid_mask=valid_mask,
            meanwhile=call.start,
        )
        call.arrive()
        call.sizes = dispatched.sizes
        ctx.call = call
        ctx.save_for_backward(
            x,
            router_input,
            gate_weight,
            dispatched.logits,
            dispatched.routing,
            dispatched.sending,
            dispatched.pair_slots,
        )
        # Not saved as the others: combine is yet to fill it, and hooks for saved tensors may copy them at once.
        ctx.balance = dispatched.balance
        return dispatched.received, dispatched.weights, dispatched.losses

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> _Gradients:
        x, router_input, gate_weight, logits, routing, sending, pair_slots = saved
        call: _Call = ctx.call
        dispatched = call.dispatched_again(
            logits=logits, routing=routing, balance=ctx.balance, sending=sending, pair_slots=pair_slots
        )
        (graph_task, weight_gradients), call.weight_gradients = call.weight_gradients or (-1, None), None
        meanwhile = None
        if weight_gradients is not None and graph_task == _graph_task() and any(ctx.needs_input_grad[4:6]):
            meanwhile = partial(weight_gradients, **call.weight_sums, scale=call.weight_scale)
        d_received, d_weights, d_losses = (grad.contiguous() for grad in grads)
        dx, d_router, d_gate, weights = call.expert_parallel.dispatch_backward(
            d_received,
            d_weights,
            dispatched,
            x,
            gate_weight,
            router_input=router_input,
            grad_losses=d_losses,
            meanwhile=meanwhile,
        )
        dw_up, dw_down = weights or (None, None)
        return None, dx, d_router, d_gate, dw_up, dw_down, None, None


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        received: Tensor,
        weights: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        keep: bool,
    ) -> Tensor:
        assert call.dispatched is not None
        rows, z = call.expert_parallel.run_experts(
            received, call.dispatched, w_up, w_down, save_for_backward=keep
        )
        ctx.call = call
        ctx.save_for_backward(received, z, w_up, w_down, call.dispatched.receiving)
        return rows

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> _Gradients:
        received, z, w_up, w_down, receiving = saved
        call: _Call = ctx.call
        dispatched = call.dispatched_again(receiving=receiving)
        d_received, d_weights, weight_gradients = call.expert_parallel.run_experts_backward(
            grads[0].contiguous(), received, z, dispatched, w_up, w_down
        )
        call.weight_gradients = _graph_task(), weight_gradients
        return None, d_received, d_weights, None, None, None


class _StartCombine(torch.autograd.Function):
    """Rows to where they land, which is for the second half to read."""

    @staticmethod
    def forward(ctx: Any, call: _Call, rows: Tensor) -> Tensor:
        assert call.dispatched is not None
        ctx.call = call
        call.combining = call.expert_parallel.start_combine(rows.contiguous(), call.dispatched)
        returned: Tensor = call.combining.packed
        return returned

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> _Gradients:
        call: _Call = ctx.call
        d_rows = call.expert_parallel.finish_combine_backward(call.take_combining())
        underway = call.dispatched_again().underway
        if underway is not None and torch.is_anomaly_check_nan_enabled():
            # autograd looks for NaN among the rows at once
            for transfer in underway.take_arriving():
                transfer.wait()
        return None, d_rows


class _FinishCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, returned: Tensor, added: Tensor | None) -> Tensor:
        assert call.dispatched is not None
        ctx.call = call
        ctx.save_for_backward(call.dispatched.sending)
        return call.expert_parallel.finish_combine(call.take_combining(), call.dispatched, added=added)

    @staticmethod
    @_differentiable_once
    def backward(ctx: Any, saved: tuple[Any, ...], *grads: Tensor) -> _Gradients:
        d_added = grads[0] if ctx.needs_input_grad[2] else None
        if not ctx.needs_input_grad[1]:
            return None, None, d_added
        # Of a backward that is asked for what was added alone, nobody would wait for the exchange.
        first_half = ctx.next_functions[0][0]
        if first_half is None or not torch._C._will_engine_execute_node(first_half):
            return None, None, d_added
        call: _Call = ctx.call
        call.start_backward()
        (sending,) = saved
        dispatched = call.dispatched_again(sending=sending)
        call.combining = call.expert_parallel.start_combine_backward(grads[0].contiguous(), dispatched)
        return None, call.combining.packed, d_added
