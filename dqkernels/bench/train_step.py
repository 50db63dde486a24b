"""`benchmarks/bench_train_step.py`: time and memory of one training step, float autograd against straight-through.

On a GPU: encoder layers of BART-large, at the autocast dtypes. On a CPU: the shipped demo model in float32. A step is
forward, backward and AdamW, with the quantization of every weight in it. A candidate is proven before it is timed: the
model that its codes are exported to has to give its own output, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from dqkernels.bench import protocol, record
from dqkernels.bench import rows as shared
from dqkernels.bench.candidates import short
from dqkernels.config import DQConfig
from dqkernels.train.qat import packed_copy, prepare_qat

BASE = "torch autograd"
#: What issue and README promise, against float autograd of the same layers.
GOALS = {"cuda": {"goal_speedup_ratio": 1.2, "goal_activation_ratio": 0.6}, "cpu": {"goal_step_ratio": 1.5}}
_DEMO = Path(__file__).resolve().parent.parent / "data" / "docstring_teacher"
_LARGE = {"d_model": 1024, "encoder_ffn_dim": 4096, "encoder_attention_heads": 16, "max_position_embeddings": 1024}
_MAX_ROUNDS = 50


@dataclass
class Work:
    """What is trained, and one loss of it.

    Attributes:
        name: as printed.
        model: the float model, in float32.
        loss: model -> scalar, in the dtype context that is on.
        output: model -> what proves it, in eval mode.
        tokens: positions that go through the layers.
        facts: for the record.
    """

    name: str
    model: nn.Module
    loss: Callable[[nn.Module], torch.Tensor]
    output: Callable[[nn.Module], torch.Tensor]
    tokens: int
    facts: dict = field(default_factory=dict)


def large_layers(device: torch.device, batch: int = 16, length: int = 512, layers: int = 2, **shape: int) -> Work:
    """Encoder layers of BART-large with random weights: `batch * length` tokens."""
    import transformers
    from transformers.models.bart.modeling_bart import BartEncoder

    sizes = {**_LARGE, **shape}
    config = transformers.BartConfig(vocab_size=64, encoder_layers=layers, dropout=0.0, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartEncoder(config).to(device)
    generator = torch.Generator().manual_seed(1)
    x, wanted = (torch.randn(batch, length, sizes["d_model"], generator=generator).to(device) for _ in range(2))

    def output(model: nn.Module) -> torch.Tensor:
        return model(inputs_embeds=x[:1]).last_hidden_state

    def loss(model: nn.Module) -> torch.Tensor:
        return F.mse_loss(model(inputs_embeds=x).last_hidden_state.float(), wanted)

    facts = {"layers": layers, "batch": batch, "length": length, **sizes}
    return Work("encoder layers of BART-large", model, loss, output, batch * length, facts)


def demo_model(device: torch.device, batch: int = 32, source: int = 96, target: int = 24) -> Work:
    """The shipped demo teacher on random tokens."""
    import transformers

    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(_DEMO, dtype=torch.float32, local_files_only=True)
    generator = torch.Generator().manual_seed(1)
    high = model.config.vocab_size
    ids, wanted = (torch.randint(5, high, (batch, n), generator=generator).to(device) for n in (source, target))

    def output(model: nn.Module) -> torch.Tensor:
        return model(input_ids=ids[:2], decoder_input_ids=wanted[:2]).logits

    def loss(model: nn.Module) -> torch.Tensor:
        logits = model(input_ids=ids, decoder_input_ids=wanted).logits
        return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())

    facts = {"batch": batch, "source_tokens": source, "target_tokens": target}
    return Work("the demo model", model.to(device), loss, output, batch * (source + target), facts)


def run(
    device: str | torch.device | None = None,
    bits: Sequence[int] = (8, 4, 2),
    dtype: str | torch.dtype | Sequence | None = None,
    learned_scale: bool = True,
    work: Work | None = None,
    seconds: float = 60,
    out: str | None = None,
) -> dict:
    """Times the steps and gives the record.

    Args:
        device: default the GPU if there is one.
        bits: weight widths of ours.
        dtype: of autocast: one, or several; float32 is none. Default float16 and bfloat16 on a GPU, float32 on a CPU.
        learned_scale: learn the steps (LSQ), or the fixed rule of each width.
        work: default `large_layers` on a GPU and `demo_model` on a CPU.
        seconds: about what the timing takes; building and proving come on top.
        out: file for the record, or None.

    Raises:
        ValueError: for widths or dtypes that are none of these.
    """
    device = protocol.pick_device(device)
    if not bits or not set(bits) <= {8, 4, 2}:
        raise ValueError(f"bits must be of 8, 4 and 2, got {list(bits)}")
    default = [torch.float16, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    dtypes = shared.dtypes(dtype, default)
    before = protocol.state(device)
    rows: list[dict] = []
    with shared.on(device):
        work = work or (large_layers(device) if device.type == "cuda" else demo_model(device))
        for kind in shared.progress("bench train_step", dtypes, short):
            rows += measure(work, kind, bits, learned_scale, device, seconds / len(dtypes))
    described = protocol.describe(device, seconds, _MAX_ROUNDS, before)
    described["timer"] = "perf_counter, device synchronized" if device.type == "cuda" else "perf_counter"
    described["cold"] = described["host"] = None
    described["warm"] = "one model, one batch, over and over"
    described["data"] = "random, seeded; the weights move with every step"
    described["proof"] = "eval output of the trained model bit-equal to that of its packed copy"
    described["activations"] = "what autograd keeps of one forward pass, parameters left out, each storage once"
    made = record.new(
        "training",
        settings={
            "work": work.name,
            **work.facts,
            "bits": list(bits),
            "dtypes": [short(kind) for kind in dtypes],
            "device": device.type,
            "optimizer": "AdamW, fused",
            "learned_scale": learned_scale,
            "goals": GOALS.get(device.type, {}),
        },
        protocol=described,
        rows=rows,
    )
    if out is not None:
        record.write(made, out)
    return made


def measure(
    work: Work, kind: torch.dtype, bits: Sequence[int], learned_scale: bool, device: torch.device, seconds: float
) -> list[dict]:
    """Rows of one dtype: the float model first, then a row per width; proven, then timed in turn."""
    names = {BASE: None, **{f"dqkernels W{width}A8": width for width in bits}}
    rows, steps = {}, {}
    for name, width in names.items():
        model = copy.deepcopy(work.model).train()
        reason = None
        if width is not None:
            prepare_qat(model, DQConfig(weight_bits=width, embedding_bits=width, attention="float"), learned_scale)
            try:
                reason = proof(model, work)
            except Exception as error:  # noqa: BLE001 - whatever it raises is its refusal, not ours
                reason = shared.raised(error)
        rows[name] = {
            "candidate": name,
            "bits": width,
            "dtype": short(kind),
            "tokens": work.tokens,
            "status": "timed" if reason is None else "refused",
            "reason": None if reason is None else record.scrub(reason),
        }
        if reason is None:
            rows[name]["activation_bytes"] = activation_bytes(model, work.loss, kind, device)
            steps[name] = step_of(model, work.loss, kind, device)
            rows[name]["peak_bytes"] = peak_bytes(steps[name], device)
    samplers = {name: protocol.wall_sampler(step, device).sample for name, step in steps.items()}
    found = protocol.interleave(samplers, seconds=seconds, max_rounds=_MAX_ROUNDS, patience=0.5)
    for name, why in found.skipped.items():
        rows[name].update(status="too slow", reason=why)
    for name, stats in found.stats.items():
        rows[name].update(stats.row("ms"))
        rows[name]["tokens_per_s"] = float(f"{work.tokens / stats.median:.4g}")
        compare(rows[name], rows[BASE], device)
    return list(rows.values())


def compare(row: dict, base: dict, device: torch.device) -> None:
    """Writes the ratios to float autograd into a timed row, the goals beside them, and whether they are met."""
    if base is row or "median_ms" not in base:
        return
    ratios = {
        "speedup_ratio": base["median_ms"] / row["median_ms"],
        "step_ratio": row["median_ms"] / base["median_ms"],
        "activation_ratio": row["activation_bytes"] / base["activation_bytes"],
    }
    if row["peak_bytes"] is not None:
        ratios["peak_ratio"] = row["peak_bytes"] / base["peak_bytes"]
    row.update({name: float(f"{value:.4g}") for name, value in ratios.items()})
    goals = GOALS.get(device.type, {})
    row.update(goals)
    for name, goal in goals.items():
        name = name.removeprefix("goal_")
        row[_met(name)] = row[name] >= goal if name == "speedup_ratio" else row[name] <= goal


def proof(model: nn.Module, work: Work) -> str | None:
    """Why the model is not what would be exported, or None: eval outputs of both, in float32 and without autocast."""
    with torch.no_grad():
        mine = work.output(model.eval())
        theirs = work.output(packed_copy(model, torch.float32))
    model.train()
    if not bool(mine.isfinite().all()):
        return "gives values that are not finite"
    wrong = int((mine != theirs).sum())
    return f"{wrong} of {mine.numel()} outputs differ from the packed copy's" if wrong else None


def _autocast(kind: torch.dtype, device: torch.device):
    return contextlib.nullcontext() if kind == torch.float32 else torch.autocast(device.type, dtype=kind)


def step_of(model: nn.Module, loss: Callable, kind: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Forward, backward, AdamW; float16 with a scaled loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    scale = 2.0**10 if kind == torch.float16 else 1.0

    def step() -> None:
        with _autocast(kind, device):
            value = loss(model)
        (value * scale).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def activation_bytes(model: nn.Module, loss: Callable, kind: torch.dtype, device: torch.device) -> int:
    """What autograd keeps of one forward pass, each storage once; parameters are not counted, their casts are."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}  # the storages, so that no address is taken twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast(kind, device):
        loss(model)
    return sum(storage.nbytes() for storage in kept.values())


def peak_bytes(step: Callable[[], None], device: torch.device) -> int | None:
    """Most memory of the device during the second step, beyond what was allocated before it; None on a CPU."""
    step()  # the optimizer's state, compiled kernels
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# -------------------------------------------------------------------------------------------- table


def render(result: dict):
    """A rich table of a training record."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        title=f"A training step on {protocol.machine_words(result['environment'])}",
    )
    for name in ("dtype", "candidate", "ms", "x", "activations", "x ", "peak"):
        table.add_column(name, justify="left" if name in ("dtype", "candidate") else "right", no_wrap=True)
    for row in result["rows"]:
        cells = [row["dtype"], row["candidate"].removeprefix("dqkernels ")]
        if row["status"] != "timed":
            table.add_row(*cells, row["status"])
            continue
        cells += [f"{row['median_ms']:,.1f}", shared.ratio(row), _mib(row["activation_bytes"])]
        cells += [f"{row['activation_ratio']:.2f}" if "activation_ratio" in row else "", _mib(row["peak_bytes"])]
        table.add_row(*cells)
    goals = ", ".join(f"{name} {value:g}" for name, value in result["settings"]["goals"].items())
    lines = [
        f"{result['settings']['work']}, {result['rows'][0]['tokens']:,} tokens; median of a whole step.",
        "x: float autograd's time over this one's; of its activations, this share.",
        f"Goals: {goals.replace('goal_', '').replace('_', ' ')}." if goals else "",
        protocol.busy_words(result["protocol"]) or "",
        *(f"{row['candidate']}: {row['reason']}" for row in result["rows"] if row["reason"]),
    ]
    table.caption, table.caption_justify = "\n".join(filter(None, lines)), "left"
    return table


def verdicts(result: dict) -> Iterable[str]:
    """A line for each goal that a row met or missed."""
    for row in result["rows"]:
        for name in ("speedup_ratio", "activation_ratio", "step_ratio"):
            if _met(name) in row:
                word = "met" if row[_met(name)] else "missed"
                goal = row[f"goal_{name}"]
                yield f"{row['candidate']} {row['dtype']}: {name} {row[name]:g}, goal {goal:g}: {word}"


def _met(name: str) -> str:
    """The key that says whether a row meets a goal: `speedup_goal_met`."""
    return name.removesuffix("_ratio") + "_goal_met"


def _mib(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.0f} MiB"
