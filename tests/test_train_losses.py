"""The distillation terms against a float64 formula in numpy, the published formulas, and themselves split in parts."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train_student import deep
from torch.nn import functional

from dqkernels.train import formulas
from dqkernels.train.losses import TERMS, KDConfig, counts, means, sums, total
from dqkernels.train.student import LayerMap, layer_map_of, make_student, set_attention_

pytestmark = pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")

# Student 2-1 layers, teacher 3-2: another depth in both stacks. Sizes are all different, so a wrong axis shows.
B, S, T, V, D, H = 4, 5, 3, 11, 6, 2
MAP = LayerMap((0, 2), (1,))
DEPTHS = {"student": (2, 1), "teacher": (3, 2)}
LENGTHS = [(5, 3), (2, 1), (0, 0), (4, 3)]  # source and target tokens; the third example is nothing but padding
ALL = KDConfig(logits=1, hidden=1, attention=1, encoder_last_hidden=1)
CONFIGS = {
    "kl": ALL,
    "kl, T=1": dataclasses.replace(ALL, temperature=1),
    "mse": dataclasses.replace(ALL, logits_loss="mse"),
    "unmasked": dataclasses.replace(ALL, masked=False),
    "unmasked mse": dataclasses.replace(ALL, masked=False, logits_loss="mse"),
    "smoothed": dataclasses.replace(ALL, label_smoothing=0.1),
    "other targets": dataclasses.replace(ALL, encoder_targets=(2, 0), decoder_targets=(0,)),
}
#: The others differ from these in what the first test sees already.
SLOPES = ("kl", "unmasked mse", "smoothed", "other targets")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small gain nothing from a second thread, and on a busy machine they wait for it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def outputs(who: str, scale: float = 1.0, dtype=torch.float32) -> SimpleNamespace:
    """Random outputs as transformers returns them; leaves that require gradients for the student."""

    def leaf(*shape):
        return (scale * torch.randn(*shape)).to(dtype).requires_grad_(who == "student")

    def maps(*shape):
        return torch.rand(*shape).to(dtype).requires_grad_(who == "student")

    encoder, decoder = DEPTHS[who]
    hidden = tuple(leaf(B, S, D) for _ in range(encoder + 1))
    return SimpleNamespace(
        logits=leaf(B, T, V),
        encoder_hidden_states=hidden,
        decoder_hidden_states=tuple(leaf(B, T, D) for _ in range(decoder + 1)),
        encoder_attentions=tuple(maps(B, H, S, S) for _ in range(encoder)),
        decoder_attentions=tuple(maps(B, H, T, T) for _ in range(decoder)),
        cross_attentions=tuple(maps(B, H, T, S) for _ in range(decoder)),
        encoder_last_hidden_state=hidden[-1],
    )


def make_batch() -> dict[str, torch.Tensor]:
    mask, labels = torch.zeros(B, S, dtype=torch.long), torch.full((B, T), -100)
    for i, (source, target) in enumerate(LENGTHS):
        mask[i, :source] = 1
        labels[i, :target] = torch.randint(0, V, (target,))
    return {"attention_mask": mask, "labels": labels}


def each(out: SimpleNamespace):
    """(name, index or None, tensor) of all outputs, the repeated one left out."""
    for name, value in vars(out).items():
        if name == "encoder_last_hidden_state":
            continue
        yield from ([(name, None, value)] if torch.is_tensor(value) else [(name, i, v) for i, v in enumerate(value)])


def mapped(out: SimpleNamespace, change) -> SimpleNamespace:
    """The same outputs, each through `change(name, tensor)`."""
    new = {}
    for name, value in vars(out).items():
        new[name] = change(name, value) if torch.is_tensor(value) else tuple(change(name, v) for v in value)
    new["encoder_last_hidden_state"] = new["encoder_hidden_states"][-1]
    return SimpleNamespace(**new)


def formula(student, teacher, batch, kd: KDConfig) -> tuple[dict[str, float], dict[str, float]]:
    """Sums and counts in float64, one place at a time, as docs and the table in losses.py say it."""

    def arrays(out):
        return mapped(out, lambda _, v: v.detach().to(torch.float64).numpy())

    s, t = arrays(student), arrays(teacher)
    encoder = kd.encoder_targets or MAP.encoder
    decoder = kd.decoder_targets or MAP.decoder
    labels, mask = batch["labels"].numpy(), batch["attention_mask"].numpy()
    value, count = dict.fromkeys(kd.terms, 0.0), dict.fromkeys(kd.terms, 0.0)
    count["encoder_last_hidden"] = float(len(labels))

    def log_softmax(row):
        row = row - row.max()
        return row - np.log(np.exp(row).sum())

    def square(a, b):
        return float(((a - b) ** 2).mean())

    for b in range(len(labels)):
        sources = [i for i in range(mask.shape[1]) if mask[b, i] or not kd.masked]
        targets = [i for i in range(labels.shape[1]) if labels[b, i] != -100 or not kd.masked]
        for i in range(labels.shape[1]):
            if labels[b, i] != -100:
                count["task"] += 1
                log_p = log_softmax(s.logits[b, i])
                e = kd.label_smoothing
                value["task"] -= (1 - e) * log_p[labels[b, i]] + e * log_p.mean()
        for i in targets:
            count["logits"] += 1
            if kd.logits_loss == "mse":
                value["logits"] += square(s.logits[b, i], t.logits[b, i])
            else:
                p, q = (log_softmax(x.logits[b, i] / kd.temperature) for x in (t, s))
                value["logits"] += kd.temperature**2 * float((np.exp(p) * (p - q)).sum())
        for stack, places, layers in (("encoder", sources, encoder), ("decoder", targets, decoder)):
            ours, theirs = (getattr(x, f"{stack}_hidden_states") for x in (s, t))
            for i in places:
                count[f"{stack}_hidden"] += 1
                value[f"{stack}_hidden"] += square(ours[0][b, i], theirs[0][b, i])
                for layer, target in enumerate(layers):
                    value[f"{stack}_hidden"] += square(ours[layer + 1][b, i], theirs[target + 1][b, i])
        for name, rows, columns, layers in (
            ("encoder_attention", sources, sources, encoder),
            ("decoder_attention", targets, targets, decoder),
            ("cross_attention", targets, sources, decoder),
        ):
            ours, theirs = (getattr(x, f"{name}s") for x in (s, t))
            for i in rows:
                for j in columns:
                    count[name] += 1
                    for layer, target in enumerate(layers):
                        value[name] += square(ours[layer][b, :, i, j], theirs[target][b, :, i, j])
        if sources:
            last = [x.encoder_last_hidden_state[b, sources] for x in (s, t)]
            value["encoder_last_hidden"] += 8 * square(*last)
    return value, count


def as_floats(terms: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(value.detach()) for name, value in terms.items()}


@pytest.mark.parametrize("kd", CONFIGS.values(), ids=CONFIGS)
def test_sums_and_counts_are_the_formula(kd):
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    value, count = formula(student, teacher, batch, kd)
    found, number = sums(student, teacher, batch, kd, MAP), counts(batch, kd)
    assert tuple(found) == tuple(number) == kd.terms == tuple(TERMS)
    assert as_floats(number) == count
    assert as_floats(found) == pytest.approx(value, rel=1e-6)
    assert all(v.dtype == torch.float64 and v.dim() == 0 for v in (*found.values(), *number.values()))
    assert min(value.values()) > 0.1  # nothing is compared with nothing


@pytest.mark.parametrize("kd", [CONFIGS[n] for n in SLOPES], ids=SLOPES)
def test_gradients_are_the_slopes_of_the_formula(kd):
    """Along a random direction of each output and term, by central differences in float64."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    found = sums(student, teacher, batch, kd, MAP)
    h, seen = 1e-4, set()
    for name, index, leaf in each(student):
        direction = torch.randn_like(leaf)

        def moved(by, name=name, index=index, direction=direction):
            place = itertools.count()

            def change(this, value):
                value = value.detach().double()
                here = this == name and (index is None or next(place) == index)
                return value + by * direction if here else value

            return formula(mapped(student, change), teacher, batch, kd)[0]

        up, down = moved(h), moved(-h)
        for term, value in found.items():
            slope = (up[term] - down[term]) / (2 * h)
            grad = torch.autograd.grad(value, leaf, retain_graph=True, allow_unused=True)[0]
            ours = 0.0 if grad is None else float((grad.double() * direction.double()).sum())
            assert ours == pytest.approx(slope, rel=1e-5, abs=1e-6), (term, name, index)
            seen |= {term} if slope else set()
    assert seen == set(TERMS)


def test_a_term_that_is_off_costs_nothing_and_is_not_there():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    every = sums(student, teacher, batch, ALL, MAP)
    for weight in ("task", "logits", "hidden", "attention", "encoder_last_hidden"):
        kd = KDConfig(**{"task": 0, weight: 2})
        names = tuple(t for t, w in TERMS.items() if w == weight)
        assert kd.terms == names and all(kd.weight(t) == 2 for t in names)
        # Outputs that no active term reads may be missing
        needed = {"task": "logits", "logits": "logits", "hidden": "hidden_states", "attention": "attentions"}
        part = [
            SimpleNamespace(**{k: v for k, v in vars(x).items() if k.endswith(needed.get(weight, "last_hidden_state"))})
            for x in (student, teacher)
        ]
        found = sums(part[0], part[1] if kd.needs_teacher else None, batch, kd, MAP)
        assert as_floats(found) == {t: as_floats(every)[t] for t in names}
        assert float(total(found, counts(batch, kd), kd)) == pytest.approx(
            2 * sum(float(v) for v in means(found, counts(batch, kd)).values())
        )
    assert not KDConfig().needs_teacher and KDConfig(encoder_last_hidden=1).needs_teacher
    assert KDConfig(hidden=1).needs_hidden and not KDConfig(attention=1, logits=1).needs_hidden
    assert KDConfig(attention=1).needs_attention and not KDConfig(hidden=1, logits=1).needs_attention


# The published formulas


def test_unmasked_is_the_formula_of_the_dq_bart_code():
    """torch's own averages over everything, padding included (paper.md section 1.6), weights of --weighted."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    kd = KDConfig(task=1, logits=0.8, hidden=3, attention=3, encoder_last_hidden=3, logits_loss="mse", masked=False)
    mse = functional.mse_loss
    loss = functional.cross_entropy(student.logits.view(-1, V), batch["labels"].view(-1))
    loss = loss + 0.8 * mse(student.logits, teacher.logits)
    for name, stack in (("encoder", MAP.encoder), ("decoder", MAP.decoder), ("cross", MAP.decoder)):
        for layer, target in enumerate(stack):
            loss = loss + 3 * mse(
                *(getattr(x, f"{name}_attentions")[i] for x, i in ((student, layer), (teacher, target)))
            )
    for stack in ("encoder", "decoder"):
        ours, theirs = (getattr(x, f"{stack}_hidden_states") for x in (student, teacher))
        loss = loss + 3 * mse(ours[0], theirs[0])
        for layer, target in enumerate(getattr(MAP, stack)):
            loss = loss + 3 * mse(ours[layer + 1], theirs[target + 1])
    for one, other in zip(student.encoder_last_hidden_state, teacher.encoder_last_hidden_state, strict=True):
        loss = loss + 3 * mse(one, other) * 8 / B  # that code adds the examples up, and has 8 of them
    ours = total(sums(student, teacher, batch, kd, MAP), counts(batch, kd), kd)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(loss), rel=1e-6)
    grads = [torch.autograd.grad(x, student.encoder_hidden_states[-1], retain_graph=True)[0] for x in (ours, loss)]
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-8)


def test_masked_is_the_formula_of_distilbart():
    """Rows that count are selected first, then torch's batchmean (Shleifer & Rush 2020; their weights)."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    kd = KDConfig(task=0.2, logits=0.8, hidden=3, temperature=2)
    rows = batch["labels"] != -100
    kl = functional.kl_div(
        functional.log_softmax(student.logits[rows] / 2, -1),
        functional.softmax(teacher.logits[rows] / 2, -1),
        reduction="batchmean",
    )
    loss = 0.8 * 4 * kl + 0.2 * functional.cross_entropy(student.logits[rows], batch["labels"][rows])
    for stack, mask in (("encoder", batch["attention_mask"] != 0), ("decoder", rows)):
        ours, theirs = (getattr(x, f"{stack}_hidden_states") for x in (student, teacher))
        pairs = [(0, 0), *((i + 1, j + 1) for i, j in enumerate(getattr(MAP, stack)))]
        loss = loss + 3 * sum(functional.mse_loss(ours[i][mask], theirs[j][mask]) for i, j in pairs)
    found = total(sums(student, teacher, batch, kd, MAP), counts(batch, kd), kd)
    assert float(found) == pytest.approx(float(loss), rel=1e-6)


def test_word_level_distillation_is_cross_entropy_to_the_teacher():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    kd = KDConfig(task=0, logits=1, temperature=1)
    rows = batch["labels"] != -100
    p = functional.softmax(teacher.logits[rows], -1)
    cross_entropy = -(p * functional.log_softmax(student.logits[rows], -1)).sum()
    entropy = -(p * p.log()).sum()
    value = sums(student, teacher, batch, kd)["logits"]
    assert float(value) == pytest.approx(float(cross_entropy - entropy), rel=1e-5)
    grad = torch.autograd.grad(value, student.logits)[0]
    assert torch.allclose(grad[rows], functional.softmax(student.logits[rows], -1) - p, atol=1e-6)
    assert not grad[~rows].any()


def test_label_smoothing_is_torchs():
    student, batch = outputs("student"), make_batch()
    value = sums(student, None, batch, KDConfig(label_smoothing=0.2))["task"]
    theirs = functional.cross_entropy(
        student.logits.view(-1, V), batch["labels"].view(-1), reduction="sum", label_smoothing=0.2
    )
    assert float(value) == pytest.approx(float(theirs), rel=1e-6)


# Parts of a batch


def cut(out: SimpleNamespace, rows: slice, source: int, target: int) -> SimpleNamespace:
    """Some examples, at the widths of a batch of their own."""

    def change(name, value):
        value = value[rows]
        if name == "logits" or name == "decoder_hidden_states":
            return value[:, :target]
        if name == "encoder_hidden_states" or name == "encoder_last_hidden_state":
            return value[:, :source]
        queries = source if name == "encoder_attentions" else target
        return value[:, :, :queries, : target if name == "decoder_attentions" else source]

    return mapped(out, change)


def cut_batch(batch, rows: slice, source: int, target: int):
    return {"attention_mask": batch["attention_mask"][rows, :source], "labels": batch["labels"][rows, :target]}


@pytest.mark.parametrize("kd", CONFIGS.values(), ids=CONFIGS)
def test_uneven_parts_add_up_to_one_batch(kd):
    """3 + 1 examples, and where padding does not count each part at its own widths; every term, and its gradient."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    order = [1, 2, 0, 3]  # the long ones last: the first part is short and holds the empty example
    student, teacher = (mapped(x, lambda _, v: v[order].detach()) for x in (student, teacher))
    batch = {k: v[order] for k, v in batch.items()}
    student = mapped(student, lambda _, v: v.requires_grad_())
    parts = [(slice(0, 2), 2, 1), (slice(2, 4), 5, 3)] if kd.masked else [(slice(0, 3), S, T), (slice(3, 4), S, T)]

    whole, number = sums(student, teacher, batch, kd, MAP), counts(batch, kd)
    each_sum = [sums(cut(student, *p), cut(teacher, *p), cut_batch(batch, *p), kd, MAP) for p in parts]
    each_count = [counts(cut_batch(batch, *p), kd) for p in parts]
    added = {t: sum(c[t] for c in each_count) for t in kd.terms}
    assert as_floats(added) == as_floats(number)
    for term in kd.terms:
        one = means(whole, number)[term]
        shares = [means(part, added)[term] for part in each_sum]
        assert float(sum(shares)) == pytest.approx(float(one), rel=1e-6), term
        for name, index, leaf in each(student):
            both = [torch.autograd.grad(x, leaf, retain_graph=True, allow_unused=True)[0] for x in (one, sum(shares))]
            if both[0] is not None:
                assert torch.allclose(*both, rtol=1e-5, atol=1e-9), (term, name, index)
    if kd.masked:  # The means of the parts, averaged, are something else: what this is for
        wrong = [float(means(s, c)["decoder_hidden"]) for s, c in zip(each_sum, each_count, strict=True)]
        assert sum(wrong) / 2 != pytest.approx(float(means(whole, number)["decoder_hidden"]), rel=1e-3)
    shares = [total(part, added, kd) for part in each_sum]
    assert float(sum(shares)) == pytest.approx(float(total(whole, number, kd)), rel=1e-6)


@pytest.mark.parametrize("name", ["kl", "mse", "smoothed", "other targets"])
def test_extra_padding_changes_nothing_even_when_it_is_nan(name):
    kd, wide = CONFIGS[name], 4
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()

    def pad(name, value):
        hidden = "hidden" in name
        padding = (0, 0, 0, wide) if name == "logits" or hidden else (0, wide, 0, wide)
        return functional.pad(value.detach(), padding, value=float("nan")).requires_grad_(value.requires_grad)

    wider = {
        "attention_mask": functional.pad(batch["attention_mask"], (0, wide)),
        "labels": functional.pad(batch["labels"], (0, wide), value=-100),
    }
    padded = mapped(student, pad), mapped(teacher, pad)
    found, other = sums(student, teacher, batch, kd, MAP), sums(*padded, wider, kd, MAP)
    assert as_floats(counts(wider, kd)) == as_floats(counts(batch, kd))
    assert as_floats(other) == pytest.approx(as_floats(found), rel=1e-6)
    total(found, counts(batch, kd), kd).backward()
    total(other, counts(wider, kd), kd).backward()
    for (name, _, leaf), (_, _, long) in zip(each(student), each(padded[0]), strict=True):
        if leaf.grad is not None:
            inside = tuple(slice(0, n) for n in leaf.shape)
            assert torch.allclose(long.grad[inside], leaf.grad, rtol=1e-5, atol=1e-9), name
            assert float(long.grad.abs().sum()) == pytest.approx(float(leaf.grad.abs().sum()), rel=1e-5)


def test_padding_counts_when_the_paper_says_so():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    kd = CONFIGS["unmasked mse"]
    assert as_floats(counts(batch, kd)) == {
        "task": 7,
        "logits": B * T,
        "encoder_hidden": B * S,
        "decoder_hidden": B * T,
        "encoder_attention": B * S * S,
        "decoder_attention": B * T * T,
        "cross_attention": B * T * S,
        "encoder_last_hidden": B,
    }
    pairs = {"encoder_attention": 25 + 4 + 16, "decoder_attention": 9 + 1 + 9, "cross_attention": 15 + 2 + 12}
    assert pairs.items() <= as_floats(counts(batch, ALL)).items()
    masked = dataclasses.replace(kd, masked=True)
    assert float(sums(student, teacher, batch, kd, MAP)["logits"]) > float(
        sums(student, teacher, batch, masked, MAP)["logits"]
    )


def test_a_batch_without_a_target_gives_zero_and_no_nan():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    batch = {"attention_mask": torch.zeros(B, S, dtype=torch.long), "labels": torch.full((B, T), -100)}
    loss = total(sums(student, teacher, batch, ALL, MAP), counts(batch, ALL), ALL)
    loss.backward()
    assert float(loss) == 0 and all(not leaf.grad.any() for _, _, leaf in each(student) if leaf.grad is not None)


def test_without_a_mask_every_source_token_counts():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    ones = {**batch, "attention_mask": torch.ones(B, S, dtype=torch.long)}
    for bare in ({"input_ids": torch.ones(B, S)}, {"inputs_embeds": torch.ones(B, S, D), "attention_mask": None}):
        bare["labels"] = batch["labels"]
        assert as_floats(counts(bare, ALL)) == as_floats(counts(ones, ALL))
        found = sums(student, teacher, bare, ALL, MAP)
        assert as_floats(found) == as_floats(sums(student, teacher, ones, ALL, MAP))


# Numbers and memory


def test_16_bit_outputs_are_compared_in_fp32():
    student, teacher = (outputs(who, scale=3, dtype=torch.bfloat16) for who in ("student", "teacher"))
    batch = make_batch()
    for kd in (CONFIGS["kl"], CONFIGS["unmasked mse"]):
        value, _ = formula(student, teacher, batch, kd)
        found = sums(student, teacher, batch, kd, MAP)
        assert as_floats(found) == pytest.approx(value, rel=1e-6)
    total(found, counts(batch, kd), kd).backward()
    assert student.logits.grad.dtype == torch.bfloat16 and student.logits.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 60, 300])
@pytest.mark.parametrize("name", ["kl", "unmasked mse"])
def test_chunks_change_nothing(monkeypatch, name, chunk):
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    kd = CONFIGS[name]
    results = []
    for size in (1 << 22, chunk):
        monkeypatch.setitem(formulas._CHUNK, "cpu", size)
        found = sums(student, teacher, batch, kd, MAP)
        loss = total(found, counts(batch, kd), kd)
        leaves = [leaf for _, _, leaf in each(student)]
        results.append((as_floats(found), torch.autograd.grad(loss, leaves, allow_unused=True)))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-6)
    for one, other in zip(results[0][1], results[1][1], strict=True):
        assert (one is None) == (other is None) and (one is None or torch.allclose(one, other, rtol=1e-5, atol=1e-9))
    assert len(formulas._parts(student.logits.flatten(0, 1))) == {1: 12, 60: 3, 300: 1}[chunk]


def test_nothing_of_the_size_of_logits_or_maps_is_kept_for_the_backward_pass():
    """Only tensors that the models' outputs and the batch hold anyway, and masks (one byte a token)."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    given = {t.untyped_storage().data_ptr() for out in (student, teacher) for _, _, t in each(out)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        total(sums(student, teacher, batch, ALL, MAP), counts(batch, ALL), ALL)
    assert sum(t.untyped_storage().data_ptr() in given for t in kept) >= 10
    rest = [t for t in kept if t.untyped_storage().data_ptr() not in given]
    assert max(t.numel() for t in rest) <= B * S, [t.shape for t in rest]


def test_outputs_without_gradients_give_sums_without_a_graph():
    """A frozen encoder, and evaluation."""
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    student.encoder_hidden_states = tuple(h.detach() for h in student.encoder_hidden_states)
    found = sums(student, teacher, batch, ALL, MAP)
    assert not found["encoder_hidden"].requires_grad and found["decoder_hidden"].requires_grad
    total(found, counts(batch, ALL), ALL).backward()
    with torch.no_grad():
        assert as_floats(sums(student, teacher, batch, ALL, MAP)) == as_floats(found)


# Models of transformers


@pytest.fixture(scope="module", params=["bart", "mbart", "t5"])
def pair(request):
    """A teacher of 3-3 layers and its student of 2-1, with attention that returns maps."""
    torch.manual_seed(3)
    teacher = deep(request.param, 3, 3, dropout=0.0, dropout_rate=0.0)
    set_attention_(teacher, "eager")
    return make_student(teacher, 2, 1), teacher


def run(student, teacher, batch, kd, layer_map):
    wanted = {"output_hidden_states": True, "output_attentions": True, "use_cache": False}
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask", "decoder_input_ids")}
    with torch.no_grad():
        theirs = teacher(**inputs, **wanted)
    return sums(student(**inputs, **wanted), theirs, batch, kd, layer_map)


def examples(lengths, source: int, target: int) -> dict[str, torch.Tensor]:
    batch = {
        "input_ids": torch.ones(len(lengths), source, dtype=torch.long),
        "attention_mask": torch.zeros(len(lengths), source, dtype=torch.long),
        "decoder_input_ids": torch.ones(len(lengths), target, dtype=torch.long),
        "labels": torch.full((len(lengths), target), -100),
    }
    for i, (s, t) in enumerate(lengths):
        random = torch.Generator().manual_seed(100 * s + t)
        batch["input_ids"][i, :s] = torch.randint(3, 99, (s,), generator=random)
        batch["labels"][i, :t] = torch.randint(3, 99, (t,), generator=random)
        batch["attention_mask"][i, :s] = 1
        batch["decoder_input_ids"][i, 1:t] = batch["labels"][i, : t - 1]
    return batch


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_accumulation_and_padding_through_real_models(pair):
    """Two uneven micro-batches, and one batch padded further, give the loss and the gradients of the plain batch."""
    student, teacher = pair
    kd, layer_map = ALL, layer_map_of(student, teacher, ALL)
    student.train()
    lengths = [(7, 5), (3, 2), (4, 4)]
    plain, wide = examples(lengths, 7, 5), examples(lengths, 12, 9)
    parts = [examples(lengths[:1], 7, 5), examples(lengths[1:], 4, 4)]
    number = counts(plain, kd)

    loss = total(run(student, teacher, plain, kd, layer_map), number, kd)
    loss.backward()
    expected = gradients(student)
    assert float(loss) > 1 and len(expected) > 20 and all(g.isfinite().all() for g in expected.values())
    for batches in ([wide], parts):
        added = {t: sum(counts(b, kd)[t] for b in batches) for t in kd.terms}
        assert {t: float(v) for t, v in added.items()} == {t: float(v) for t, v in number.items()}
        shares = [total(run(student, teacher, b, kd, layer_map), added, kd) for b in batches]
        sum(shares).backward()
        assert float(sum(shares)) == pytest.approx(float(loss), rel=2e-6)
        found = gradients(student)
        assert found.keys() == expected.keys()
        scale = max(float(g.abs().max()) for g in expected.values())
        worst = max(float((found[n] - expected[n]).abs().max()) for n in expected)
        assert worst < 5e-6 * scale, worst  # fp32 rounding of other shapes through three layers; seen: 1.3e-6


def test_the_same_model_has_nothing_to_learn_from_itself(pair):
    _, teacher = pair
    kd = dataclasses.replace(ALL, logits_loss="mse")
    found = as_floats(run(teacher, teacher, examples([(5, 4), (2, 1)], 6, 4), kd, layer_map_of(teacher, teacher, kd)))
    assert found.pop("task") > 1 and set(found.values()) == {0.0}


def test_sdpa_is_refused_with_its_cure(pair):
    student, teacher = pair
    plain = make_student(student)
    set_attention_(plain, "sdpa")
    with pytest.raises(ValueError, match='student returned no encoder_attentions: .*attn_implementation="eager"'):
        run(plain, teacher, examples([(5, 4)], 6, 4), KDConfig(attention=1), LayerMap((0, 2), (2,)))


# What is refused


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"logits": None}, "the student returned no logits"),
        ({"encoder_hidden_states": None}, "no encoder_hidden_states: run it with output_hidden_states=True"),
        ({"cross_attentions": ()}, 'no cross_attentions: run it with .*attn_implementation="eager"'),
        ({"decoder_attentions": (None,)}, "no decoder_attentions"),
        (
            {"logits": torch.zeros(B, T, V + 1)},
            r"logits: the student's shape is \(4, 3, 12\), the teacher's \(4, 3, 11\)",
        ),
        ({"logits": torch.zeros(B, T + 1, V)}, r"logits are of \[4, 4\] places, labels .* \[4, 3\]"),
        (
            {"encoder_hidden_states": (torch.zeros(B, S, D),) * 2},
            r"encoder map is \[0, 2\], but the student returned 1 layers and the teacher 3 \(layerdrop",
        ),
        ({"encoder_hidden_states": (torch.zeros(B, S, 9),) * 3}, "encoder_hidden_states: the student's shape"),
        ({"encoder_attentions": (torch.zeros(B, 1, S, S),) * 2}, "encoder_attentions: the student's shape"),
        ({"encoder_last_hidden_state": torch.zeros(B, S, 9)}, "encoder_last_hidden_state: the student's shape"),
    ],
)
def test_outputs_that_cannot_be_compared(change, says):
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    vars(student).update(change)
    with pytest.raises(ValueError, match=says):
        sums(student, teacher, batch, ALL, MAP)


def test_batches_that_lack_something():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    with pytest.raises(ValueError, match=r"compare with a teacher, and there is none"):
        sums(student, None, batch, KDConfig(logits=1))
    for call in (lambda b: counts(b, ALL), lambda b: sums(student, teacher, b, ALL, MAP)):
        with pytest.raises(ValueError, match=r"labels of shape \[batch, target length\], got none"):
            call({"attention_mask": batch["attention_mask"]})
        with pytest.raises(ValueError, match=r"got shape \(12,\)"):
            call({**batch, "labels": batch["labels"].view(-1)})
        with pytest.raises(ValueError, match="need attention_mask or input_ids"):
            call({"labels": batch["labels"]})
        with pytest.raises(ValueError, match=r"attention_mask must have the shape .* got \(4, 1, 5\)"):
            call({**batch, "attention_mask": batch["attention_mask"][:, None]})
    for wrong in (batch["attention_mask"][:, :3], batch["attention_mask"][:2]):
        with pytest.raises(ValueError, match="encoder_hidden_states are of"):
            sums(student, teacher, {**batch, "attention_mask": wrong}, ALL, MAP)


def test_a_map_must_be_known():
    student, teacher, batch = outputs("student"), outputs("teacher"), make_batch()
    for layer_map in (None, LayerMap((0, 1), None)):
        with pytest.raises(ValueError, match="no layer map for the .*coder: student . layers, teacher"):
            sums(student, teacher, batch, ALL, layer_map)
    assert sums(student, student, batch, KDConfig(hidden=1))["encoder_hidden"] == 0  # one to one
    kd = dataclasses.replace(ALL, encoder_targets="supervised", decoder_targets="supervised")
    explicit = dataclasses.replace(ALL, encoder_targets=(1, 2), decoder_targets=(1,))
    found = [as_floats(sums(student, teacher, batch, k, None)) for k in (kd, explicit)]
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"logits": -1}, "logits must be a finite weight of 0 or more, got -1"),
        ({"hidden": float("nan")}, "hidden must be a finite weight of 0 or more, got nan"),
        ({"attention": "3"}, "attention must be a finite weight .* got '3'"),
        ({"task": True}, "task must be .* got True"),
        ({"task": 0}, r"every weight is 0, .* \['task', 'logits', 'hidden', 'attention', 'encoder_last_hidden'\]"),
        ({"logits_loss": "l2"}, r"logits_loss must be one of \['kl', 'mse'\], got 'l2'"),
        ({"temperature": 0}, "temperature must be a finite number above 0, got 0"),
        ({"label_smoothing": 1.0}, "label_smoothing must be from 0 to below 1, got 1.0"),
        ({"masked": 1}, "masked must be true or false, got 1"),
        (
            {"encoder_targets": "first"},
            "encoder_targets must be a list of teacher layers, 'supervised' or None, got 'first'",
        ),
        ({"decoder_targets": []}, "decoder_targets must be a list"),
        ({"decoder_targets": 3}, "decoder_targets must be a list of teacher layers, .* got 3"),
        ({"decoder_targets": [0, -1]}, r"decoder_targets must hold layer numbers counted from 0, got \[0, -1\]"),
    ],
)
def test_refused_settings(arguments, says):
    with pytest.raises(ValueError, match=says):
        KDConfig(**arguments)


def test_parse():
    assert KDConfig.parse("logits,hidden,attention=3") == KDConfig(task=1, logits=1, hidden=1, attention=3)
    assert KDConfig.parse(" task = 0 , logits ", temperature=1) == KDConfig(task=0, logits=1, temperature=1)
    assert KDConfig.parse("task") == KDConfig()
    assert KDConfig.parse("encoder_last_hidden=.5", masked=False) == KDConfig(encoder_last_hidden=0.5, masked=False)
    for text, says in (
        ("logit", "--kd knows the terms task, logits, hidden, attention, encoder_last_hidden, got 'logit'"),
        ("", "got ''"),
        ("logits,", "got '' in 'logits,'"),
        ("logits,logits=2", "--kd names logits twice: 'logits,logits=2'"),
        ("hidden=much", "--kd gives hidden the weight 'much', which is no number: 'hidden=much'"),
        ("hidden=", "--kd gives hidden the weight '', which is no number"),
        ("hidden=-1", "hidden must be a finite weight of 0 or more, got -1.0"),
        ("hidden=inf", "hidden must be a finite weight of 0 or more, got inf"),
    ):
        with pytest.raises(ValueError, match=says):
            KDConfig.parse(text)


def test_a_config_is_one_line_and_plain_json():
    kd = KDConfig.parse("logits=0.8,hidden,attention=3", logits_loss="mse", masked=False, encoder_targets=[0, 2])
    assert str(kd) == "task,logits=0.8,hidden,attention=3 (MSE of logits, padding counted)"
    assert KDConfig(**json.loads(json.dumps(dataclasses.asdict(kd)))) == kd
    for text in ("task", "task=0,logits=2", "task=0.5,hidden", "task,logits,attention=3"):
        written = str(KDConfig.parse(text))
        assert written.partition(" (")[0] == text and KDConfig.parse(text) == KDConfig.parse(written.partition(" (")[0])
    assert str(KDConfig(logits=1)) == "task,logits (KL at T=2)"
