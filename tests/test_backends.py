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
