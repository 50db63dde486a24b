"""Which backend runs, who decided, and in which words the others are refused."""

import sys
import types

import pytest
import torch

from dqkernels import backends, ops
from dqkernels.backends import BackendError

FAST = types.SimpleNamespace(
    available=lambda device_type: (device_type == "cpu", "takes cpu tensors only"),
    supports=lambda op, group_size=-1, **facts: None if group_size == -1 else f"no group_size={group_size}",
    qgemm=lambda *args, **kwargs: "ran",
)


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    monkeypatch.delenv("DQKERNELS_BACKEND", raising=False)
    backends.refresh()
    yield
    backends.refresh()


@pytest.fixture
def only_fast_and_eager(monkeypatch):
    """A machine whose `cpu` backend has qgemm alone, and nothing else but eager."""
    real = backends._module
    broken = types.SimpleNamespace(available=lambda device_type: (False, "not on this machine"))
    fakes = {"cpu": FAST, "cuda": broken, "triton": broken}
    monkeypatch.setattr(backends, "_module", lambda name: fakes.get(name) or real(name))
    backends.refresh()


def test_eager_has_every_op_and_takes_every_device():
    for op in backends.OPS:
        assert backends.refusal("eager", op, "cpu", {}) is None
    for device_type in ("cpu", "cuda", "mps", "xpu"):
        assert backends.available("eager", device_type)[0]


@pytest.mark.parametrize("name", backends.NAMES)
@pytest.mark.parametrize("device_type", ["cpu", "cuda", "mps"])
def test_every_backend_answers_for_every_device(name, device_type):
    """Absent parts are a reason in words, never an exception."""
    usable, reason = backends.available(name, device_type)
    assert isinstance(usable, bool) and isinstance(reason, str)
    assert usable or reason


def test_auto_takes_the_first_that_can_and_says_why_the_others_cannot(only_fast_and_eager):
    assert backends.choose("qgemm", "cpu") == backends.Choice("cpu", "first choice for this device")
    choice = backends.choose("qgemm", "cpu", group_size=64)
    assert choice == backends.Choice("eager", "cpu: no group_size=64")
    assert backends.choose("qattention", "cpu") == backends.Choice("eager", "cpu: has no qattention")
    assert backends.choose("qgemm", "cuda").reason == "cuda: not on this machine; triton: not on this machine"
    assert backends.choose("qgemm", "mps") == backends.Choice("eager", "first choice for this device")


def test_a_backend_that_does_not_import_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "dqkernels.backends.cpu", None)  # what a failed import leaves
    backends._module.cache_clear()
    backends.refresh()
    usable, reason = backends.available("cpu", "cpu")
    assert not usable and reason.startswith("import failed: ")
    assert backends.choose("qgemm", "cpu").backend == "eager"
    backends._module.cache_clear()


def test_forced_by_argument(only_fast_and_eager):
    assert backends.choose("qgemm", "cpu", "eager") == backends.Choice("eager", "forced by backend='eager'")
    assert backends.choose("qgemm", "cpu", "cpu").backend == "cpu"


def test_forced_by_environment_and_argument_wins(only_fast_and_eager, monkeypatch):
    monkeypatch.setenv("DQKERNELS_BACKEND", "eager")
    assert backends.choose("qgemm", "cpu") == backends.Choice("eager", "forced by DQKERNELS_BACKEND=eager")
    assert backends.choose("qgemm", "cpu", "cpu").reason == "forced by backend='cpu'"
    for nothing in ("", "auto"):
        monkeypatch.setenv("DQKERNELS_BACKEND", nothing)
        assert backends.choose("qgemm", "cpu").backend == "cpu"


def test_the_environment_is_read_at_every_call(only_fast_and_eager, monkeypatch):
    assert backends.choose("qgemm", "cpu").backend == "cpu"
    monkeypatch.setenv("DQKERNELS_BACKEND", "eager")
    assert backends.choose("qgemm", "cpu").backend == "eager"
    monkeypatch.delenv("DQKERNELS_BACKEND")
    assert backends.choose("qgemm", "cpu").backend == "cpu"


@pytest.mark.parametrize("name", ["gpu", "Eager", "native", " eager"])
def test_unknown_names_list_the_valid_ones(name, monkeypatch):
    with pytest.raises(ValueError) as error:
        backends.choose("qgemm", "cpu", name)
    assert str(error.value) == f"backend must be one of ['auto', 'eager', 'triton', 'cuda', 'cpu'], got {name!r}"
    monkeypatch.setenv("DQKERNELS_BACKEND", name)
    with pytest.raises(ValueError) as error:
        backends.choose("qgemm", "cpu")
    assert str(error.value).startswith("DQKERNELS_BACKEND must be one of ['auto', 'eager', 'triton', 'cuda', 'cpu']")
    assert repr(name) in str(error.value)


def test_an_unknown_environment_reaches_the_user_through_an_op(monkeypatch):
    monkeypatch.setenv("DQKERNELS_BACKEND", "tensorrt")
    with pytest.raises(ValueError, match="DQKERNELS_BACKEND must be one of"):
        ops.quantize_activation(torch.randn(2, 3), "per_token")


def test_a_forced_backend_that_lacks_an_op_names_it_and_the_alternatives(only_fast_and_eager, monkeypatch):
    with pytest.raises(BackendError) as error:
        backends.choose("qattention", "cpu", "cpu")
    assert str(error.value) == (
        "backend='cpu' cannot run qattention on cpu: has no qattention. Backends that can: eager"
    )
    monkeypatch.setenv("DQKERNELS_BACKEND", "cpu")
    with pytest.raises(BackendError) as error:
        backends.choose("qgemm", "cpu", group_size=32)
    assert str(error.value) == (
        "DQKERNELS_BACKEND=cpu cannot run qgemm on cpu: no group_size=32. Backends that can: eager"
    )


def test_a_forced_backend_of_this_machine_that_lacks_an_op():
    """The same through an op, with whatever backends are built here."""
    q = torch.randn(1, 1, 2, 4)
    with pytest.raises(BackendError, match=r"backend='cuda' cannot run qattention on cpu: .*can: eager"):
        ops.qattention(q, q, q, None, None, False, 1.0, backend="cuda")


def test_strict_refuses_the_slow_path_unless_asked_for(only_fast_and_eager, monkeypatch):
    assert backends.choose("qgemm", "cpu", strict=True).backend == "cpu"
    with pytest.raises(BackendError) as error:
        backends.choose("qgemm", "cpu", strict=True, group_size=64)
    assert str(error.value) == (
        "strict=True refuses the eager path of qgemm on cpu: cpu: no group_size=64. "
        "Use strict=False, or ask for it with backend='eager'"
    )
    with pytest.raises(BackendError, match="no faster backend exists for this device"):
        backends.choose("qgemm", "mps", strict=True)
    assert backends.choose("qgemm", "mps", "eager", strict=True).backend == "eager"
    monkeypatch.setenv("DQKERNELS_BACKEND", "eager")
    assert backends.choose("qgemm", "mps", strict=True).backend == "eager"


def test_an_op_runs_on_the_backend_that_was_chosen(only_fast_and_eager, monkeypatch):
    """`choose` is not only asked, it is followed."""
    called = []

    def quantize_activation(*args):
        called.append(args)
        return torch.zeros(2, 3, dtype=torch.int8), torch.ones(2), torch.zeros(0, dtype=torch.int32)

    monkeypatch.setattr(FAST, "quantize_activation", quantize_activation, raising=False)
    ops.quantize_activation(torch.randn(2, 3), "per_token")
    assert len(called) == 1
    ops.quantize_activation(torch.randn(2, 3), "per_token", backend="eager")
    assert len(called) == 1


def test_availability_is_probed_once(monkeypatch):
    asked = []
    probe = types.SimpleNamespace(
        available=lambda device_type: (asked.append(device_type), (False, "no"))[1], supports=lambda op, **f: None
    )
    real = backends._module
    monkeypatch.setattr(backends, "_module", lambda name: probe if name == "cpu" else real(name))
    backends.refresh()
    for _ in range(3):
        backends.choose("qgemm", "cpu")
        backends.choose("qattention", "cpu")
    assert asked == ["cpu"]


# ------------------------------------------------------------------------------ CUDA tensors: cuda, then Triton


@pytest.fixture
def on_cuda(monkeypatch):
    """A machine with the real `cuda` and `triton` modules, both usable or as `usable` says; nothing runs."""
    usable = {"cuda": True, "triton": True}
    real = backends._module

    def module(name):
        if name not in usable:
            return real(name)
        answer = (usable[name], "here" if usable[name] else "not on this machine")
        found = types.SimpleNamespace(**{key: value for key, value in vars(real(name)).items() if key[0] != "_"})
        found.available = lambda device_type: answer if device_type == "cuda" else (False, "takes cuda tensors")
        return found

    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backends, "_module", module)
    backends.refresh()
    return usable


FORMATS = [(bits, group) for bits in (2, 4, 8) for group in (-1, 32, 64, 128) if bits != 8 or group == -1]


def choices(rows, bits=4, group_size=-1, **more):
    gemm, quantizer = ops.choose_qlinear("cuda", bits, group_size, "per_token", many_rows=rows > ops.FEW_ROWS, **more)
    return gemm.backend, None if quantizer is None else quantizer.backend


@pytest.mark.parametrize(("bits", "group_size"), FORMATS)
def test_few_rows_go_to_cuda_and_many_to_triton(on_cuda, bits, group_size):
    for strict in (False, True):
        for rows in (1, 16, 17, 64):
            assert choices(rows, bits, group_size, strict=strict) == ("cuda", None)
        for rows in (65, 4096):
            assert choices(rows, bits, group_size, strict=strict)[0] == "triton"
    many = backends.choose("qgemm", "cuda", bits=bits, group_size=group_size, many_rows=True)
    assert many.reason == "cuda: it is made for up to 64 rows"
    assert backends.choose("qgemm", "cuda", bits=bits, group_size=group_size).reason == "first choice for this device"


def test_without_triton_cuda_takes_any_number_of_rows(on_cuda):
    """In slices; and strict has nothing against it, for the alternative is the slow path."""
    on_cuda["triton"] = False
    backends.refresh()
    for strict in (False, True):
        for rows in (64, 65, 4096):
            assert choices(rows, strict=strict) == ("cuda", None)
    choice = backends.choose("qgemm", "cuda", bits=4, group_size=-1, many_rows=True, strict=True)
    assert choice.reason == "no faster one here, though it is made for up to 64 rows"


def test_without_cuda_triton_takes_few_rows_too(on_cuda):
    on_cuda["cuda"] = False
    backends.refresh()
    assert {choices(rows)[0] for rows in (1, 64, 65)} == {"triton"}
    on_cuda["triton"] = False
    backends.refresh()
    assert choices(1)[0] == "eager"
    with pytest.raises(BackendError, match="strict=True refuses the eager path"):
        choices(1, strict=True)


def test_cuda_by_name_takes_any_number_of_rows(on_cuda, monkeypatch):
    for rows in (1, 64, 65, 4096):
        assert choices(rows, backend="cuda") == ("cuda", None)
    assert choices(1, backend="triton")[0] == "triton"
    monkeypatch.setenv("DQKERNELS_BACKEND", "cuda")
    assert choices(4096) == ("cuda", None)


def test_cuda_refuses_a_group_size_it_has_not(on_cuda):
    with pytest.raises(BackendError, match="has no qgemm with group_size=48 at 4 bits"):
        backends.choose("qgemm", "cuda", "cuda", bits=4, group_size=48)
    with pytest.raises(BackendError, match="has no qgemm with group_size=32 at 8 bits"):
        backends.choose("qgemm", "cuda", "cuda", bits=8, group_size=32)


def test_decode_attention_is_tritons_until_somebody_measured_it(on_cuda, monkeypatch):
    """No GPU has run the CUDA kernel: `auto` takes Triton and says why, by name it is there."""
    facts = {"mode": "per_token", "head_dim": 64, "by_key": True}
    for strict in (False, True):
        choice = backends.choose("qattention_decode", "cuda", strict=strict, **facts)
        why = "cuda: no measurement says that its decode attention is faster"
        assert choice == backends.Choice("triton", why)
    assert backends.choose("qattention_decode", "cuda", "cuda", **facts).backend == "cuda"
    assert backends.choose("qattention", "cuda", mode="per_token", head_dim=64).backend == "triton"
    monkeypatch.setenv("DQKERNELS_BACKEND", "cuda")
    assert backends.choose("qattention_decode", "cuda", **facts).backend == "cuda"
    with pytest.raises(BackendError, match="has no qattention_decode of head_dim=66, only multiples of 4 up to 128"):
        backends.choose("qattention_decode", "cuda", **facts | {"head_dim": 66})


def test_without_triton_decode_attention_is_cudas(on_cuda):
    """The alternative is the slow path; what the kernel has not is eager's."""
    on_cuda["triton"] = False
    backends.refresh()
    choice = backends.choose("qattention_decode", "cuda", strict=True, head_dim=64)
    assert choice.backend == "cuda" and choice.reason.startswith("no faster one here, though no measurement")
    assert backends.choose("qattention_decode", "cuda", head_dim=256).backend == "eager"


def test_a_layer_names_both_kernels(on_cuda, monkeypatch):
    """`kernel()` of a layer on CUDA: few rows, many, and one name where they are the same."""
    import dqkernels
    from dqkernels.nn import QLinear

    layer = QLinear.from_linear(torch.nn.Linear(32, 16), dqkernels.DQConfig(weight_bits=4))
    real = ops.choose_qlinear
    monkeypatch.setattr(ops, "choose_qlinear", lambda device, *facts: real("cuda", *facts))
    made_for = "first choice for this device; cuda: it is made for up to 64 rows"
    assert layer.kernel() == f"cuda to 64 rows, triton above ({made_for})"
    layer.backend = "cuda"
    assert layer.kernel() == "cuda (forced by backend='cuda')"
    layer.backend = "auto"
    on_cuda["triton"] = False
    backends.refresh()
    told = "cuda (first choice for this device; above 64 rows no faster one here, though it is made for up to 64 rows)"
    assert layer.kernel() == told
