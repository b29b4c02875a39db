"""A layer whose experts are spread over ranks: dispatch, experts, combine, and the way back.

Here are the layer and its parts as their callers see them, and what the ranks have to agree on before. What is sent
where is in ep_exchange.pyx, what this rank's experts do with it in ep_experts.pyx, and what passes from one part to
the next in ep_types.py.

With ``ep_chunks`` a rank's tokens are cut into as many runs, which cross one after the other: while one is at the
experts the next is on its way there, and the one before on its way home.
"""

import json
from dataclasses import asdict

from . import ep_exchange, ep_experts
from .checks import check_config
from .comm.communicator import Step
from .config import MAX_EXPERTS, MoEConfig
from .ep_types import ExpertParallelResult
from .errors import CommError, ConfigError
from .moe import MoEGrads

LOSS_SCOPES = ("group", "local")
STEPS = (
    "counts", "dispatch", "combine", "losses",
    "combine backward", "weights backward", "losses backward", "dispatch backward",
)


def expert_range(num_experts, ep_size, ep_rank):
    """The experts of a rank: runs as equal as can be, the longer ones on the first ranks.

    Raises ConfigError for a rank that is not one of ``ep_size``.
    """
    if not 0 <= ep_rank < ep_size:
        raise ConfigError(f"ep_rank={ep_rank} must be at least 0 and less than ep_size={ep_size}")
    size, longer = divmod(num_experts, ep_size)
    first = ep_rank * size + min(ep_rank, longer)
    return range(first, first + size + (ep_rank < longer))


class ExpertParallel:
    """One layer whose experts are spread over the ranks of a communicator.

    Parameters
    ----------
    comm : the group. Every rank makes its layers, and calls their methods, in the same order, those without
        tokens among them.
    config : the options of the whole layer; ``num_experts`` is that of the group.
    layer : a name for error messages.
    loss_scope : "group": the losses and the balance are of all ranks' tokens, the same on every rank.
        "local": of this rank's tokens.
    ep_chunks : chunks of about the same length that each rank's tokens are cut into. While one is at the experts,
        the next crosses. ``run_experts`` then sends rows home itself, chunk by chunk, so that ``combine`` accepts only
        what it returned, and ``dispatch_backward`` only what ``run_experts_backward`` returned. Sums are the same; an
        expert's rows stand in another order, chunk by chunk.
    agree_on : further settings, by name, that must be the same on every rank.

    ``experts`` is the range of this rank's experts. Tokens are dropped where they come from: a capacity bounds
    what each rank sends an expert, ``capacity_factor`` by that rank's own T.

    All gradients are those of the sum over ranks of each rank's own objective: those of w_up and w_down are
    complete, those of gate_weight are this rank's part of a sum over ranks. Losses of the group are a part of
    every rank's objective.

    Raises
    ------
    ConfigError : the ranks differ in an option or, in the first call with a dtype, in that of x; the message names
        it with every rank's value. More ranks than experts; an unknown ``loss_scope``; an ``ep_chunks`` that is no
        whole number of at least 1, or with which a rank has more than 1024 pairs of chunk and expert, or of chunk and
        rank. With chunks, ``combine`` and ``dispatch_backward`` of other rows than the experts', or ahead of them.
    CommError : from any method: a rank is missing or has failed; see ``Communicator``. An error on this rank
        becomes a CommError on the others.
    """

    def __init__(self, comm, config, *, layer="", loss_scope="group", ep_chunks=1, agree_on=None):
        if not hasattr(comm, "all_to_all_v"):  # which a proxy of a communicator has, too
            raise ConfigError(
                f"comm is a {type(comm).__name__}; expected a Communicator, such as MpiCommunicator or NcclCommunicator"
            )
        with aborting(comm):
            check_config(config, MoEConfig)
        self.comm = comm
        self.config = config
        self.layer = layer
        self.loss_scope = loss_scope
        self.ep_chunks = ep_chunks
        self.has_losses = config.aux_loss_coeff > 0 or config.z_loss_coeff > 0
        _check_agreement(
            comm,
            Step("configuration", layer),
            {
                **asdict(config),
                "loss_scope": loss_scope,
                "ep_chunks": ep_chunks,
                "timeout": comm.timeout,
                **(agree_on or {}),
            },
        )
        # what is wrong on some ranks only is an error of all by now
        if loss_scope not in LOSS_SCOPES:
            raise ConfigError(
                f"loss_scope={loss_scope!r} is unknown; known: {', '.join(map(repr, LOSS_SCOPES))}"
            )
        if config.num_experts < comm.size:
            raise ConfigError(
                f"num_experts={config.num_experts} is less than ep_size={comm.size}: each rank needs an expert"
            )
        _check_chunks(ep_chunks, config.num_experts, comm.size)
        self.experts = expert_range(config.num_experts, comm.size, comm.rank)
        self._plans = ep_exchange.Plans(config, comm.size, len(self.experts), ep_chunks)
        self._steps = {name: Step(name, layer) for name in STEPS}
        self._rows = set()  # (dtype, width) of x that the ranks have agreed on

    def agree_on_rows(self, dtype, width):
        """The ranks exchange bytes: that all mean the same by them is found out at the first call with such rows."""
        if (dtype, width) not in self._rows:
            _check_agreement(self.comm, Step("rows of x", self.layer), {"dtype": dtype, "width": width})
            self._rows.add((dtype, width))

    # --- the whole layer ---

    def forward(
        self, x, gate_weight, w_up, w_down, *,
        router_input=None, expert_bias=None, valid_mask=None, save_for_backward=True,
    ):
        """The weighted output of the group's experts for this rank's tokens.

        As ``moe_forward``, with this rank's experts only: w_up [experts, 2I, H] and w_down [experts, H, I].
        T may differ from rank to rank and be 0.
        """
        dispatched = self.dispatch(
            x, gate_weight, router_input=router_input, expert_bias=expert_bias, valid_mask=valid_mask
        )
        rows, z = self.run_experts(
            dispatched.received, dispatched, w_up, w_down, save_for_backward=save_for_backward
        )
        output = self.combine(rows, dispatched)
        return ExpertParallelResult(output, dispatched.losses, dispatched, z)

    def backward(
        self, grad_output, result, x, gate_weight, w_up, w_down, *,
        router_input=None, grad_losses=None, w_up_grad=None, w_down_grad=None,
    ):
        """Every gradient of ``forward``. As ``moe_backward``; see the class for what the gradients are of.

        A ``result.z`` of None is recomputed, also after ``save_for_backward=False``. Raises ConfigError where
        grad_losses is None and the losses are the group's.
        """
        dispatched = result.dispatched
        d_rows = self.combine_backward(grad_output, dispatched)
        d_received, d_weights, weight_gradients = self.run_experts_backward(
            d_rows, dispatched.received, result.z, dispatched, w_up, w_down
        )
        dx, d_router, d_gate, (dw_up, dw_down) = self.dispatch_backward(
            d_received, d_weights, dispatched, x, gate_weight,
            router_input=router_input, grad_losses=grad_losses,
            meanwhile=lambda: weight_gradients(w_up_grad, w_down_grad),
        )
        return MoEGrads(dx, d_router, d_gate, dw_up, dw_down)

    # --- dispatch ---

    def dispatch(
        self, x, gate_weight, *, router_input=None, expert_bias=None, valid_mask=None, meanwhile=None
    ):
        """Route this rank's tokens, x [T, W], and send each to the ranks of its experts.

        W is d_model, unless the gate reads ``router_input`` [T, d_model]: then x can have any width. ``meanwhile``
        is called while the host has yet to wait for the counts, to launch what can be computed until the tokens are
        there: with the ``spared`` and ``spared_flop`` of ``glu_up`` that leave this exchange room, and those of
        combine. On a stream of its own: the tokens leave when x's stream has done what was launched on it by then.
        """
        with aborting(self.comm):
            return ep_exchange.dispatch(self, x, gate_weight, router_input, expert_bias, valid_mask, meanwhile)

    def dispatch_backward(
        self, d_received, d_weights, dispatched, x, gate_weight, *,
        router_input=None, grad_losses=None, meanwhile=None,
    ):
        """``(dx, d_router_input, d_gate_weight, result)``; d_router_input may be None.

        ``finish = meanwhile()`` is called while d_received is on its way, and ``result = finish()`` when it is there.
        """
        with aborting(self.comm):
            return ep_exchange.dispatch_backward(
                self, d_received, d_weights, dispatched, x, gate_weight, router_input, grad_losses, meanwhile
            )

    # --- this rank's experts ---

    def run_experts(self, received, dispatched, w_up, w_down, *, save_for_backward=True):
        """``(rows [N, H], z)``: each received token's weighted sum over its experts on this rank."""
        with aborting(self.comm):
            return ep_experts.run_experts(self, received, dispatched, w_up, w_down, save_for_backward)

    def run_experts_backward(self, d_rows, received, z, dispatched, w_up, w_down):
        """``(d_received [N, H], d_weights [N, S], weight_gradients)``.

        ``weight_gradients(w_up_grad=None, w_down_grad=None, scale=1.0)`` computes ``(dw_up, dw_down)``, times
        ``scale``: left to the caller, so that it can be done while d_received is on its way. It launches what is to
        run beside that, and returns a function that launches the rest and returns them. Arrays that it is given are
        added to, and None comes in their place, as in ``moe_backward``.
        """
        with aborting(self.comm):
            return ep_experts.run_experts_backward(self, d_rows, received, z, dispatched, w_up, w_down)

    # --- combine ---

    def combine(self, rows, dispatched):
        """[T, W]: rows [N, W] back where their tokens came from, and summed by token.

        With losses of the group it also sums what they are made of over the ranks, and fills ``dispatched.losses`` and
        ``dispatched.balance``.
        """
        return self.finish_combine(self.start_combine(rows, dispatched), dispatched)

    def start_combine(self, rows, dispatched):
        """Sends rows [N, W] home."""
        with aborting(self.comm):
            return ep_exchange.start_combine(self, rows, dispatched)

    def finish_combine(self, combining, dispatched, *, added=None):
        """[T, W], as ``combine``, plus ``added`` [T, W] of the rows' dtype, such as a shared expert's output."""
        with aborting(self.comm):
            return ep_exchange.finish_combine(self, combining, dispatched, added)

    def combine_backward(self, grad_output, dispatched):
        """[N, W] from grad_output [T, W]."""
        return self.finish_combine_backward(self.start_combine_backward(grad_output, dispatched))

    def start_combine_backward(self, grad_output, dispatched):
        """Sends the gradients [T, W] to where the rows came from."""
        with aborting(self.comm):
            return ep_exchange.start_combine_backward(self, grad_output, dispatched)

    def finish_combine_backward(self, combining):
        """[N, W], as ``combine_backward``."""
        with aborting(self.comm):
            for transfer in combining.transfers:
                transfer.wait()
            return combining.rows


def _check_chunks(ep_chunks, num_experts, ep_size):
    if isinstance(ep_chunks, bool) or not isinstance(ep_chunks, int) or ep_chunks < 1:
        raise ConfigError(f"ep_chunks={ep_chunks!r} must be a whole number of at least 1")
    groups = max(ep_size, -(-num_experts // ep_size))
    if ep_chunks > 1 and ep_chunks * groups > MAX_EXPERTS:
        raise ConfigError(
            f"ep_chunks={ep_chunks} is too many for num_experts={num_experts} on {ep_size} ranks: at most "
            f"{MAX_EXPERTS // groups}"
        )


class aborting:
    """An error on this rank becomes one on the others, who would wait for it in vain."""

    def __init__(self, comm):
        self.comm = comm

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if error is not None and not isinstance(error, CommError):
            self.comm.abort(f"{kind.__name__}: {error}")


def _check_agreement(comm, step, mine):
    """Every rank says how it is configured: what differs is a ConfigError on all of them."""
    all_said = [json.loads(text) for text in comm.gather(json.dumps(mine, default=str), step)]
    for name in dict.fromkeys(name for said in all_said for name in said):
        values = [said.get(name) for said in all_said]
        if any(value != values[0] for value in values):
            listed = ", ".join(f"rank {rank}: {value!r}" for rank, value in enumerate(values))
            where = f" for {step.layer}" if step.layer else ""
            raise ConfigError(f"the ranks do not agree on {name}{where} ({listed})")
