"""The dense GLU block on the runtime: torch's formula and its gradients, and who gets it."""

import contextlib
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ffmoe_core.config import ACTIVATIONS
from ffmoe_core.errors import DTypeError, ShapeError, UnsupportedError
from ffmoe_torch import MoELayer, dense_glu, shared_expert, side_stream
from ffmoe_torch.dense_glu import NOTHING_SPARED, serves, start_glu
from ffmoe_torch.shared_expert import BesideExchanges, SharedExpert, on_a_side_stream
from ffmoe_torch.side_stream import Beside
from tests import reference
from tests.support import assert_close
from tests.torch.checks import numbers, same

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
H, J = 24, 16


def make(device, dtype, *shape, activation="swiglu"):
    """A block, and x that wants a gradient."""
    expert = SharedExpert(H, J, activation, device=device, dtype=dtype)
    return expert, torch.randn(*shape, H, device=device).to(dtype).requires_grad_()


def on_the_runtime(expert, x):
    return start_glu(x, expert.w_up, expert.w_down, expert.activation)()


def results(call, expert, x):
    """Output and the gradients that there are, by name."""
    expert.zero_grad()
    x.grad = None
    output = call(expert, x)
    output.sin().sum().backward()
    return {"output": output.detach(), "x": x.grad, "w_up": expert.w_up.grad, "w_down": expert.w_down.grad}


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_and_gradients(device, poisoned, dtype, activation):
    expert, x = make(device, dtype, 21, activation=activation)
    grad = torch.randn(21, H, device=device).to(dtype)
    output = on_the_runtime(expert, x)
    output.backward(grad)
    name = str(dtype).removeprefix("torch.")
    want = reference.dense_glu(*map(numbers, (x, expert.w_up, expert.w_down, grad)), activation)
    for got, wanted, what in (
        (output, want.output, "output"),
        (x.grad, want.dx, "gradient of x"),
        (expert.w_up.grad, want.dw_up, "gradient of w_up"),
        (expert.w_down.grad, want.dw_down, "gradient of w_down"),
    ):
        assert got.dtype == dtype
        assert_close(numbers(got), wanted, name, what)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3), (2, 0, 3)])
def test_is_torchs_formula(device, poisoned, shape):
    expert, x = make(device, torch.float64, *shape)
    with torch.no_grad():
        expert.w_up.copy_(expert.w_up.T.contiguous().T)  # in whatever layout
    got, want = results(on_the_runtime, expert, x), results(lambda expert, x: expert(x), expert, x)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_inputs_need_not_be_contiguous(device):
    expert, x = make(device, torch.float32, 6, 4)
    plain = on_the_runtime(expert, x.detach().transpose(0, 1).contiguous())
    assert torch.equal(on_the_runtime(expert, x.detach().transpose(0, 1)), plain)
    w_up, w_down = (weight.detach().T.contiguous().T for weight in (expert.w_up, expert.w_down))
    assert torch.equal(start_glu(x.transpose(0, 1), w_up, w_down, "swiglu")(), plain)
    # the gradient neither
    on_the_runtime(expert, x).sum().backward()
    summed, x.grad = x.grad, None
    on_the_runtime(expert, x).backward(torch.ones(6, 4, H, device=device))
    assert torch.equal(summed, x.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(device, activation):
    def call(x, w_up, w_down):
        return start_glu(x, w_up, w_down, activation)()

    leaves = [
        torch.randn(*shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((5, 4), (6, 4), (4, 3))
    ]
    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=True)


@pytest.mark.parametrize("trained", range(8))
def test_frozen_inputs_get_no_gradient(device, trained):
    expert, x = make(device, torch.float32, 9)
    want = results(on_the_runtime, expert, x)
    for bit, tensor in enumerate((x, expert.w_up, expert.w_down)):
        tensor.requires_grad_(bool(trained & 1 << bit))
    if trained == 0:
        assert not on_the_runtime(expert, x).requires_grad
        return
    got = results(on_the_runtime, expert, x)
    assert torch.equal(got["output"], want["output"])
    for bit, name in enumerate(("x", "w_up", "w_down")):
        assert torch.equal(got[name], want[name]) if trained & 1 << bit else got[name] is None


def test_backward_has_z_and_the_inputs_alone(device):
    expert, x = make(device, torch.float32, 9)
    kept = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        on_the_runtime(expert, x)
    assert [tuple(tensor.shape) for tensor in kept] == [(9, H), (2 * J, H), (9, 2 * J), (H, J)]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_where_no_backward_follows(device, monkeypatch, mode):
    expert, x = make(device, torch.float32, 3, 3)
    want, zs = on_the_runtime(expert, x), []
    up = dense_glu.glu_up

    def watched(*arguments, **options):
        a, z = up(*arguments, **options)
        zs.append(z)
        return a, z

    monkeypatch.setattr(dense_glu, "glu_up", watched)
    with mode():
        assert torch.equal(on_the_runtime(expert, x), want)
    assert zs == [None]


def test_two_runs_give_the_same_bits(device):
    expert, x = make(device, torch.bfloat16, 50)
    first, second = (results(on_the_runtime, expert, x) for _ in range(2))
    assert same([*first.values()], [*second.values()])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_gives_the_same_bits(device, use_reentrant):
    expert, x = make(device, torch.float32, 9)

    def again(expert, x):
        return checkpoint(lambda x: on_the_runtime(expert, x), x, use_reentrant=use_reentrant)

    want, got = results(on_the_runtime, expert, x), results(again, expert, x)
    assert same([*got.values()], [*want.values()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_a_block_of_rounded_parameters(device, dtype):
    expert, x = make(device, torch.float32, 3, 7)
    with torch.autocast(device, dtype=dtype):
        output = on_the_runtime(expert, x)
    output.float().sin().sum().backward()
    rounded, y = make(device, dtype, 3, 7)
    rounded.load_state_dict(expert.state_dict())
    with torch.no_grad():
        y.copy_(x)
    want = on_the_runtime(rounded, y)
    want.float().sin().sum().backward()
    assert torch.equal(output, want)
    for got, wanted in ((x, y), (expert.w_up, rounded.w_up), (expert.w_down, rounded.w_down)):
        assert got.grad.dtype == torch.float32
        assert torch.equal(got.grad, wanted.grad.float())


def test_a_second_derivative_is_refused(device):
    expert, x = make(device, torch.float32, 9)
    output = on_the_runtime(expert, x)
    want = torch.autograd.grad(output.sum(), (x, expert.w_up, expert.w_down), retain_graph=True)
    gradients = torch.autograd.grad(output.sum(), (x, expert.w_up, expert.w_down), create_graph=True)
    assert same(gradients, want)
    for gradient in gradients:
        with pytest.raises(UnsupportedError, match="no second derivative"):
            gradient.sum().backward()


def test_inputs_that_do_not_fit(device):
    expert, x = make(device, torch.float32, 9)
    with pytest.raises(ShapeError, match=r"x has shape \(9, 23\).*d_model=24"):
        on_the_runtime(expert, x[:, 1:])
    with pytest.raises(DTypeError, match="w_up has dtype float32 but x has float64"):
        on_the_runtime(expert, x.double())


# --- who gets it ---


def test_cpus_keep_torchs_operations():
    for dtype in DTYPES:
        expert, x = make("cpu", dtype, 9)
        assert not serves(x, expert.w_up, expert.w_down)


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


SERVED = {
    "plain": (contextlib.nullcontext, [False, False, True, True]),
    "no grad": (torch.no_grad, [False, False, True, True]),
    "inference": (torch.inference_mode, [False, False, True, True]),
    "autocast": (lambda: torch.autocast("cuda", torch.bfloat16), [False, True, True, True]),
    "autocast to float32": (lambda: torch.autocast("cuda", torch.float32), [False] * 4),
    "a dispatch mode": (Dispatch, [False] * 4),
    "a dispatch mode in autocast": (
        lambda: stacked(torch.autocast("cuda", torch.bfloat16), Dispatch()),
        [False] * 4,
    ),
    "forward-mode derivatives": (forward_ad.dual_level, [False] * 4),
}


@contextlib.contextmanager
def stacked(*contexts):
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("state", SERVED)
def test_who_is_served(state):
    mode, wanted = SERVED[state]
    for dtype, served in zip(DTYPES, wanted, strict=True):
        expert, x = make("cuda", dtype, 9)
        with mode():
            assert serves(x, expert.w_up, expert.w_down) == served, dtype


@pytest.mark.gpu
def test_a_compiler_sees_torchs_operations():
    torch._dynamo.reset()
    expert, x = make("cuda", torch.bfloat16, 9)
    compiled = torch.compile(expert, backend="aot_eager", fullgraph=True)
    assert_close(numbers(compiled(x)), numbers(expert(x)), "bfloat16")  # it rounds what is between, too
    torch._dynamo.reset()


def test_the_module_asks_and_is_asked(device, monkeypatch):
    """Whatever computes it, the module's output is the same function of the same parameters."""
    expert, x = make(device, torch.float64, 2, 9)
    want = results(lambda expert, x: expert(x), expert, x)
    asked = []
    monkeypatch.setattr(shared_expert, "serves", lambda *tensors: asked.append(tensors) or True)
    got = results(lambda expert, x: expert(x), expert, x)
    (tensors,) = asked
    assert all(map(torch.Tensor.is_set_to, tensors, (x, expert.w_up, expert.w_down)))
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def at_an_exchange(expert, x):
    """As ``on_a_side_stream``, in the parts of a layer whose experts are spread over ranks."""
    parts = BesideExchanges(expert, x)
    parts.start(NOTHING_SPARED)
    parts.arrive()
    parts.finish()
    return parts.join


WATCHERS = {
    "a forward hook": lambda expert, see: expert.register_forward_hook(lambda *_: see()),
    "a forward pre-hook": lambda expert, see: expert.register_forward_pre_hook(lambda *_: see()),
    "a hook of all modules": lambda expert, see: nn.modules.module.register_module_forward_hook(
        lambda *_: see()
    ),
    "a backward hook": lambda expert, see: expert.register_full_backward_hook(lambda *_: see()),
    "a backward pre-hook": lambda expert, see: expert.register_full_backward_pre_hook(lambda *_: see()),
}


@pytest.mark.parametrize("launch", [on_a_side_stream, at_an_exchange])
@pytest.mark.parametrize("watcher", WATCHERS)
def test_hooks_see_the_call_of_the_module(device, watcher, launch):
    expert, x = make(device, torch.bfloat16, 9)
    seen = []
    hook = WATCHERS[watcher](expert, lambda: seen.append(1))
    try:
        output = launch(expert, x)()
        output.sum().backward()
    finally:
        hook.remove()
    assert seen == [1]
    assert torch.equal(output, launch(expert, x)())
    assert seen == [1]


@pytest.mark.parametrize("launch", [on_a_side_stream, at_an_exchange])
def test_another_module_in_its_place(device, launch):
    x = torch.randn(9, H, device=device)
    linear = nn.Linear(H, H, device=device)
    assert torch.equal(launch(linear, x)(), linear(x))


# --- beside the current stream ---


class Stream:
    """Says when it waits, and what is current."""

    device = torch.device("cpu")

    def __init__(self, name, log):
        self.name = name
        self.log = log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def log(monkeypatch):
    """Of two streams where there are none."""
    log = []
    origin, side = Stream("origin", log), Stream("side", log)

    @contextlib.contextmanager
    def on(stream):
        log.append(f"on {stream.name}")
        yield
        log.append("off")

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: origin)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(side_stream, "side_stream", lambda stream: side)
    return log


ONE_LAUNCH = ["side waits for origin", "on side", "off"]
JOINED = ["origin waits for side"]


@pytest.mark.parametrize("end", [Beside.join, lambda beside: None], ids=["joined", "given up"])
def test_memory_is_kept_until_the_origin_waits(log, end):
    """Where an error came in between, too."""
    beside, x, out = Beside(torch.device("cpu")), torch.ones(3), torch.empty(3)
    kept = [weakref.ref(x), weakref.ref(out)]
    for tensor in kept:
        weakref.finalize(tensor(), log.append, "let go")

    def fail(x, out):
        raise ValueError("no")

    function = partial(fail, out=out)
    with contextlib.suppress(ValueError):
        beside.run(function, x)
    del x, out, function
    assert all(tensor() is not None for tensor in kept)
    end(beside)
    del beside
    assert log == [*ONE_LAUNCH[:2], *JOINED, "let go", "let go"]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("recording", [True, False])
def test_results_are_in_memory_from_before(log, monkeypatch, recording, whole):
    """And the same; what autograd is to keep is handed to it when the current stream may read it."""
    told(monkeypatch, lambda name: log.append(name))
    new = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: log.append("memory") or new(*args))

    def call(expert, x):
        beside = Beside(x.device)
        finish = start_glu(x, expert.w_up, expert.w_down, expert.activation, beside=beside, whole=whole)
        beside.join()
        with saved_tensors_hooks(lambda tensor: log.append("kept") or tensor, lambda tensor: tensor):
            return finish()

    up = ["memory"] * (2 if recording else 1) + [*ONE_LAUNCH[:2], "glu_up", "off"]
    down = ["memory", *ONE_LAUNCH[:2], "glu_down", "off"]
    order = [*up, *down, *JOINED] if whole else [*up, *JOINED, "glu_down"]
    expert, x = make("cpu", torch.float32, 3, 7)
    with torch.set_grad_enabled(recording):
        output = call(expert, x)
        assert log == order + ["kept"] * (2 if recording else 0)
        assert torch.equal(output, on_the_runtime(expert, x))
    if recording:
        got, want = results(call, expert, x), results(on_the_runtime, expert, x)
        assert same([*got.values()], [*want.values()])


def told(monkeypatch, tell):
    """The runtime's functions tell of their calls."""

    def telling(name, function):
        def call(*arguments, **options):
            tell(name)
            return function(*arguments, **options)

        return call

    for name in ("glu_up", "glu_down", "glu_down_backward", "glu_up_backward"):
        monkeypatch.setattr(dense_glu, name, telling(name, getattr(dense_glu, name)))


@pytest.mark.gpu
def test_each_stream_has_another_beside_it():
    side_stream.side_stream.cache_clear()  # torch's streams come round again
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    sides = [side_stream.side_stream(stream) for stream in (first, second)]
    assert sides[0] != sides[1]
    assert sides[0].device == first.device
    with torch.cuda.stream(first):
        assert Beside(first.device).side == sides[0]


@pytest.mark.gpu
@pytest.mark.parametrize("launch", [on_a_side_stream, at_an_exchange])
def test_all_work_beside_a_stream_begins_after_what_that_has(monkeypatch, launch):
    """And backward is on that: its results are memory that nobody else reads."""
    log = []
    told(monkeypatch, lambda name: log.append((name, torch.cuda.current_stream())))
    wait_stream = torch.cuda.Stream.wait_stream

    def waited(stream, other):
        log.append((stream, other))
        wait_stream(stream, other)

    monkeypatch.setattr(torch.cuda.Stream, "wait_stream", waited)
    expert, x = make("cuda", torch.bfloat16, 9)
    caller = torch.cuda.Stream()
    with torch.cuda.stream(caller):
        launch(expert, x)().sum().backward()
    caller.synchronize()
    side = side_stream.side_stream(caller)
    places = {name: at for at, (name, _) in enumerate(log) if isinstance(name, str)}
    on_the_side = {"glu_up"} if launch is at_an_exchange else {"glu_up", "glu_down"}
    for name, at in places.items():
        assert log[at][1] == (side if name in on_the_side else caller), name
        assert name not in on_the_side or log[at - 1] == (side, caller), name
    joined = log.index((caller, side))
    assert max(places[name] for name in on_the_side) < joined < places["glu_down_backward"]


@pytest.mark.gpu
@pytest.mark.parametrize("launch", [on_a_side_stream, at_an_exchange])
@pytest.mark.parametrize("recording", [True, False])
def test_what_outlives_a_call_is_memory_of_the_callers_stream(launch, recording):
    """That is the only one that the allocator waits for before it gives memory back."""
    expert, x = make("cuda", torch.bfloat16, 9)
    caller, kept = torch.cuda.Stream(), []
    caller.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(caller):
        keeping = saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor)
        with torch.set_grad_enabled(recording), keeping:
            output = launch(expert, x)()
        if recording:
            kept = [
                kept[2],
                *torch.autograd.grad(output.sum(), (x, expert.w_up, expert.w_down)),
            ]  # z and others
    for tensor in (output, *kept):
        (stream,) = {
            segment["stream"]
            for segment in torch.cuda.memory_snapshot()
            if 0 <= tensor.data_ptr() - segment["address"] < segment["total_size"]
        }
        assert stream == caller.cuda_stream
    caller.synchronize()


@pytest.mark.gpu
def test_hooks_see_what_is_kept_when_it_is_there():
    """They run on the caller's stream."""
    expert, x = make("cuda", torch.bfloat16, 4096)
    results(lambda expert, x: on_a_side_stream(expert, x)(), expert, x)  # compiles
    kept = []
    with torch.cuda.stream(side_stream.side_stream(torch.cuda.current_stream())):
        torch.cuda._sleep(100_000_000)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor.clone()) or tensor, lambda tensor: tensor):
        on_a_side_stream(expert, x)()
    _, want = dense_glu.glu_up(x, expert.w_up)
    assert torch.equal(kept[2], want)


class Gated(SharedExpert):
    def forward(self, x):
        return 0.5 * super().forward(x)


@pytest.mark.parametrize("launch", [on_a_side_stream, at_an_exchange])
@pytest.mark.parametrize("by", ["class", "instance"])
def test_a_forward_of_ones_own_is_called(device, monkeypatch, launch, by):
    monkeypatch.setattr(shared_expert, "serves", lambda *tensors: True)
    x = torch.randn(9, H, device=device).to(torch.bfloat16)
    kind = Gated if by == "class" else SharedExpert
    expert = kind(H, J, "swiglu", device=device, dtype=torch.bfloat16)
    if by == "instance":
        expert.forward = lambda x: 0.5 * SharedExpert.forward(expert, x)
    assert not shared_expert._is_ours(expert)
    assert shared_expert._is_ours(SharedExpert(H, J))
    assert torch.equal(launch(expert, x)(), expert(x))
    assert torch.equal(2 * expert(x), SharedExpert.forward(expert, x))


@pytest.mark.gpu
def test_a_recomputation_that_stops_early_beside_the_others():
    """Where a shared expert alone is trained it does, before anyone has waited for it."""
    layer = MoELayer(H, 2 * J, 4, 2, num_shared_experts=32, device="cuda", dtype=torch.bfloat16)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("shared" in name)
    shared, x = (
        list(layer.shared_expert.parameters()),
        torch.randn(4096, H, device="cuda", dtype=torch.bfloat16),
    )
    want = torch.autograd.grad(layer(x)[0].square().sum(), shared)
    for _ in range(10):
        output, _ = checkpoint(layer, x, use_reentrant=False)
        assert same(torch.autograd.grad(output.square().sum(), shared), want)


@pytest.mark.gpu
def test_gradients_beside_the_others_add_up():
    """Into .grad, on the caller's stream, which is late: theirs is memory that the next product could take."""
    layer = MoELayer(64, 128, 4, 2, num_shared_experts=32, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(1024, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    shared = list(layer.shared_expert.parameters())
    want = torch.autograd.grad(layer(x)[0].sum(), shared)
    for _ in range(10):
        for parameter in shared:
            parameter.grad = torch.zeros_like(parameter)
        output = layer(x)[0].sum()
        torch.cuda._sleep(10_000_000)
        output.backward()
        assert same([parameter.grad for parameter in shared], want)


@pytest.mark.gpu
@pytest.mark.parametrize("given_up", [False, True])
def test_memory_stays_until_the_other_stream_has_done_with_it(given_up):
    """That of x, which nobody else may hold any more; then it is free for others at once, who come after that."""
    tokens, width = 65536, 264
    x, weight = (
        torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
        for shape in ((tokens, width), (2 * width, width))
    )
    with torch.no_grad():
        want = start_glu(x, weight, weight[:width], "swiglu")()  # compiles
    beside = Beside(x.device)
    torch.cuda.synchronize()
    with torch.cuda.stream(beside.side):
        torch.cuda._sleep(500_000_000)
    with torch.no_grad():
        finish = start_glu(x, weight, weight[:width], "swiglu", beside=beside)
    place = x.data_ptr()
    del x

    def place_is_free(tries):
        # there is room for so much memory at few places
        new = [weight.new_full((tokens, width), float("nan")) for _ in range(tries)]
        return place in [tensor.data_ptr() for tensor in new]

    assert not place_is_free(4)
    if not given_up:
        beside.join()
    del beside
    assert place_is_free(8)
    assert torch.equal(finish(), want)
