"""The trainer: sums that add up over batches, what is logged, evaluation, the teacher's place, refusals."""

from __future__ import annotations

import inspect
import json
import math

import numpy as np
import pytest
import torch
import transformers
from tiny_models import VOCAB
from train_runs import ALL_TERMS, arguments, collate, examples, model, trainer
from transformers import EarlyStoppingCallback, PreTrainedModel, Seq2SeqTrainer

from dqkernels import DQConfig, quantize_
from dqkernels.train import losses, prepare_qat, resumable
from dqkernels.train.losses import KDConfig
from dqkernels.train.trainer import DistillationTrainer

ONE_BATCH = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
FOUR_BATCHES = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
TERMS = {
    "all": ALL_TERMS,
    "task": KDConfig(label_smoothing=0.1),
    "kl": KDConfig(task=0, logits=1),
    "mse": KDConfig(task=0, logits=1, logits_loss="mse"),
    "hidden": KDConfig(task=0, hidden=1),
    "attention": KDConfig(task=0, attention=100),
    "encoder_last_hidden": KDConfig(encoder_last_hidden=1),
}


def weights(made) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in made.model.parameters()]


def farthest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def close(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(math.isclose(a[k], b[k], rel_tol=3e-6, abs_tol=1e-9) for k in a)


# --------------------------------------------------------------------------------------------------- the same sums


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("terms", TERMS)
def test_four_batches_are_one_large_batch(family, terms, tmp_path):
    """Three steps, the last one an epoch's short group: 22 examples in groups of 8."""
    found = {}
    for how in (ONE_BATCH, FOUR_BATCHES):
        made, log = trainer(tmp_path, family, TERMS[terms], max_steps=3, **how)
        before = weights(made)
        made.train()
        assert farthest(before, weights(made)) > 1e-3  # the bound below means something
        found[how["per_device_train_batch_size"]] = (log.steps, weights(made), made.state.log_history[-1]["train_loss"])
    (one, whole, _), (four, parts, _) = found[8], found[2]
    assert list(one) == list(four) == [1, 2, 3]
    for step in one:
        assert close(one[step], four[step]), (step, one[step], four[step])
    assert farthest(whole, parts) < 1e-6  # weights of about 1: fp32 rounding of three steps
    # transformers' own sum of the losses of the batches is the same number.
    assert found[8][2] == pytest.approx(found[2][2], rel=1e-6)
    assert found[8][2] == pytest.approx(np.mean([step["loss"] for step in one.values()]), rel=1e-6)


def plain_losses(tmp_path, **changes) -> list[float]:
    made = Seq2SeqTrainer(
        model=model(),
        args=arguments(tmp_path, max_steps=3, **changes),
        train_dataset=examples(22),
        data_collator=collate,
    )
    made._get_train_sampler = lambda *a: resumable.EpochSampler(torch.utils.data.RandomSampler(made.train_dataset), 5)
    made.train()
    return [line["loss"] for line in made.state.log_history if "loss" in line]


def test_the_defect_of_the_plain_trainer_is_not_ours(tmp_path):
    """It weighs every batch alike, whatever it holds: another loss than that of the large batch, and another step."""
    ours = [s["loss"] for s in _run(tmp_path, KDConfig(), max_steps=3, **FOUR_BATCHES)[1].steps.values()]
    large, split = plain_losses(tmp_path, **ONE_BATCH), plain_losses(tmp_path, **FOUR_BATCHES)
    assert ours == pytest.approx(large, rel=1e-6)
    assert max(abs(a - b) for a, b in zip(large, split, strict=True)) > 1e-3


def _run(folder, kd=ALL_TERMS, **changes):
    made, log = trainer(folder, kd=kd, **changes)
    made.train()
    return made, log


def test_the_loss_is_the_formula(tmp_path):
    """Of a whole step, from the models' outputs, without the trainer."""
    made, log = trainer(tmp_path, per_device_train_batch_size=5, gradient_accumulation_steps=2, max_steps=1)
    kept = {}
    take = made.get_batch_samples

    def spy(*args):
        kept["batches"], counts = take(*args)
        return kept["batches"], counts

    made.get_batch_samples = spy
    made.train()
    student, teacher = model().eval(), model(noise=0.05).eval()
    for m in (student, teacher):
        m.set_attn_implementation("eager")
    totals = {}, {}
    for batch in kept["batches"]:
        inputs = {k: v for k, v in batch.items() if k != "labels"} | {"output_hidden_states": True}
        with torch.no_grad():
            outputs = [m(**inputs, output_attentions=True) for m in (student, teacher)]
        for total, part in zip(
            totals, (losses.sums(*outputs, batch, ALL_TERMS), losses.counts(batch, ALL_TERMS)), strict=True
        ):
            for term, value in part.items():
                total[term] = total.get(term, 0) + value
    sums, counts = totals
    logged = log.steps[1]
    assert {name for name in logged if name.startswith("loss_")} == {f"loss_{term}" for term in sums}
    for term in sums:
        assert logged[f"loss_{term}"] == pytest.approx(float(sums[term] / counts[term]), rel=1e-6), term
    assert logged["loss"] == pytest.approx(float(losses.total(sums, counts, ALL_TERMS)), rel=1e-6)


def test_a_step_without_any_target_does_no_harm(tmp_path):
    data = [{"input_ids": [5, 6, 2], "labels": [-100, -100]}] * 4
    made, log = trainer(tmp_path, data=data, kd=KDConfig(logits=1), max_steps=1)
    before = weights(made)
    made.train()
    assert log.steps[1]["loss"] == 0 and farthest(before, weights(made)) == 0


def test_terms_are_averaged_over_the_logging_window(tmp_path):
    every = _run(tmp_path, max_steps=5)[1].steps
    third = _run(tmp_path, max_steps=5, logging_steps=3, logging_first_step=False)[1].steps
    assert list(third) == [3]
    for name in (n for n in every[1] if n.startswith("loss")):
        assert third[3][name] == pytest.approx(np.mean([every[step][name] for step in (1, 2, 3)]), rel=1e-9), name


def test_lines_of_training_hold_their_weighted_sum(tmp_path):
    for line in _run(tmp_path, max_steps=2)[1].steps.values():
        weighted = sum(ALL_TERMS.weight(n.removeprefix("loss_")) * v for n, v in line.items() if n.startswith("loss_"))
        assert line["loss"] == pytest.approx(weighted, rel=1e-12)


def test_tensorboard_gets_the_terms(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _run(tmp_path, max_steps=2, report_to="tensorboard")
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(file.parent))
    events.Reload()
    assert len(events.Scalars("train/loss_decoder_hidden")) == 2


# ------------------------------------------------------------------------------------------------------ evaluation


def test_eval_loss_does_not_depend_on_the_batches_and_has_no_dropout(tmp_path):
    found = []
    for size, dropout in ((2, 0.0), (7, 0.3)):
        made, _ = trainer(tmp_path, dropout=dropout, eval_dataset=examples(7, 1), per_device_eval_batch_size=size)
        made.model.train()
        found.append({k: v for k, v in made.evaluate().items() if k.startswith("eval_loss")})
    assert close(*found)
    assert set(found[0]) == {"eval_loss", *(f"eval_loss_{term}" for term in ALL_TERMS.terms)}
    # The formula that training uses, over one batch of everything.
    made, log = trainer(tmp_path, data=examples(7, 1), per_device_train_batch_size=7, max_steps=1)
    made.train()
    assert found[0]["eval_loss"] == pytest.approx(log.steps[1]["loss"], rel=1e-6)


def test_evaluating_does_not_change_the_training(tmp_path):
    options = {"dropout": 0.2, "num_train_epochs": 2, "eval_dataset": examples(5, 1)}
    without, log = _run(tmp_path, **options)
    often, log_often = _run(
        tmp_path, **options, eval_strategy="steps", eval_steps=1, predict_with_generate=True, generation_max_length=4
    )
    assert len(log_often.evals) == len(log.steps)
    assert log.steps == log_often.steps and farthest(weights(without), weights(often)) == 0
    assert log.steps != _run(tmp_path, **{**options, "dropout": 0.0})[1].steps  # dropout is on in training


def test_predict_with_generate(tmp_path):
    seen = {}

    def metrics(predictions):
        seen["tokens"], seen["labels"] = predictions.predictions, predictions.label_ids
        return {"rougeL": 1.0}

    data = examples(5, 1)
    made, _ = trainer(
        tmp_path,
        eval_dataset=data,
        compute_metrics=metrics,
        predict_with_generate=True,
        generation_max_length=6,
        generation_num_beams=2,
    )
    found = made.evaluate()
    plain, _ = trainer(tmp_path, eval_dataset=data)
    assert found["eval_rougeL"] == 1.0 and found["eval_loss"] == pytest.approx(plain.evaluate()["eval_loss"])
    for i, example in enumerate(data):
        batch = collate([example])
        tokens = made.model.eval().generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_length=6, num_beams=2
        )[0]
        assert seen["tokens"][i][: len(tokens)].tolist() == tokens.tolist()
        assert [t for t in seen["labels"][i].tolist() if t != -100] == example["labels"]


def test_predictions_are_logits_alone_without_generate(tmp_path):
    made, _ = trainer(tmp_path)
    found = made.predict(examples(5, 1))
    assert found.predictions.shape[0] == 5 and found.predictions.shape[2] == 100
    assert found.metrics["test_loss"] > 0 and "test_loss_task" in found.metrics


def test_best_checkpoint_and_early_stop(tmp_path):
    scores = iter([0.1, 0.5, 0.3, 0.4, 0.2, 0.9])
    made, _ = trainer(
        tmp_path,
        kd=KDConfig(),
        eval_dataset=examples(3, 1),
        compute_metrics=lambda predictions: {"rougeL": next(scores)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=3)],
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=1,
        max_steps=40,
        metric_for_best_model="rougeL",
        greater_is_better=True,
        load_best_model_at_end=True,
    )
    made.train()
    assert made.state.global_step == 10  # three evaluations after the best
    assert made.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-4"]
    best = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "checkpoint-4")
    assert farthest(weights(made), [p.detach() for p in best.parameters()]) == 0


# ------------------------------------------------------------------------------------------------------ the teacher


def test_a_student_keeps_its_cache_setting(tmp_path):
    """Trainer turns config.use_cache off, and what is saved afterwards would generate without a cache elsewhere."""
    made, _ = _run(tmp_path)
    assert made.model.config.use_cache is True
    made.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["use_cache"] is True


def test_the_teacher_is_only_asked(tmp_path):
    made, _ = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, dropout=0.3)
    teacher = made.teacher.to(torch.bfloat16).train()
    before = [parameter.clone() for parameter in teacher.parameters()]
    modes, grads = [], []
    forward = teacher.forward

    def spy(*args, **kwargs):
        modes.append(teacher.training), grads.append(torch.is_grad_enabled())
        return forward(*args, **kwargs)

    teacher.forward = spy
    made.train()
    assert modes and not any(modes) and not any(grads)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in teacher.parameters())
    trained = {id(p) for group in made.optimizer.param_groups for p in group["params"]}
    assert not trained & {id(p) for p in teacher.parameters()}
    size = (tmp_path / "checkpoint-1" / "model.safetensors").stat().st_size
    assert size < 1.2 * 4 * sum(p.numel() for p in made.model.parameters())


def test_no_teacher_runs_where_no_term_needs_one(tmp_path):
    teacher = model(noise=0.05)
    teacher.forward = None
    made = DistillationTrainer(
        model=model(),
        teacher=teacher,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=examples(4),
        data_collator=collate,
    )
    made.train()
    assert made.teacher is None


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_attention_maps_switch_both_models_to_eager_meanwhile(family, tmp_path):
    def implementations():
        parts = [p for m in (made.model, made.teacher) for p in m.modules() if isinstance(p, PreTrainedModel)]
        assert len(parts) >= 6
        return {part.config._attn_implementation for part in parts}

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            found.append(implementations())

        on_prediction_step = on_step_end

    found: list[set[str]] = []
    for kd, meanwhile in ((KDConfig(logits=1), "sdpa"), (ALL_TERMS, "eager")):
        made, _ = trainer(tmp_path, family, kd=kd, max_steps=1, eval_dataset=examples(3), callbacks=[Watch()])
        assert implementations() == {"sdpa"}
        found.clear()
        made.train()
        assert found == [{meanwhile}] and implementations() == {"sdpa"}
        made.evaluate()
        assert found == [{meanwhile}] * 2 and implementations() == {"sdpa"}
        assert made.compute_loss(made.model, collate(examples(2))).isfinite() and implementations() == {"sdpa"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("prepare", [lambda m: m, lambda m: prepare_qat(m, DQConfig(weight_bits=2, embedding_bits=2))])
def test_a_student_in_16_bits_is_trained_in_float32(dtype, prepare, tmp_path, caplog):
    """As the one that was float32 from the start, but for what 16 bits had rounded."""
    small = {"kd": KDConfig(logits=1, hidden=1), "learning_rate": 1e-4, "optim": "adamw_torch", "max_steps": 2}
    rounded = [p.float() for p in model().to(dtype).parameters()]
    made, log = trainer(tmp_path, prepare=lambda m: prepare(m.to(dtype)), **small)
    assert f"the student has {str(dtype)[6:]} parameters and is made float32" in caplog.text
    made.train()
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    # Added in 16 bits, most of such steps would be lost.
    moved = [
        float((p.detach() != q).float().mean())
        for (name, p), q in zip(made.model.named_parameters(), rounded, strict=True)
        if "fc" in name
    ]
    assert len(moved) >= 4 and min(moved) > 0.9, moved
    wide, wide_log = trainer(tmp_path, prepare=lambda m: prepare(m.to(dtype).float()), **small)
    wide.train()
    assert log.steps == wide_log.steps and "is made float32" not in caplog.text.partition("is made float32")[2]


def test_layers_are_not_dropped_where_they_are_compared(tmp_path, caplog):
    def dropping(student):
        student.model.encoder.layerdrop = student.model.decoder.layerdrop = 0.9
        return student

    made, log = trainer(tmp_path, kd=KDConfig(hidden=1), max_steps=3, prepare=dropping)
    made.train()
    assert len(log.steps) == 3 and "layerdrop of the student is now 0" in caplog.text
    made, _ = trainer(tmp_path, kd=KDConfig(logits=1), max_steps=1, prepare=dropping)
    assert made.model.model.encoder.layerdrop == 0.9


def test_families_without_a_rule_for_decoder_inputs(tmp_path):
    """M2M100 and NLLB, with a collator that leaves decoder_input_ids out."""
    config = transformers.M2M100Config(
        vocab_size=VOCAB, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=1, decoder_start_token_id=2,
    )  # fmt: skip
    made = make_trainer(tmp_path, model=transformers.M2M100ForConditionalGeneration(config))
    labels = collate(examples(3))["labels"]
    given = made._with_decoder_inputs({"labels": labels})["decoder_input_ids"]
    assert given[:, 0].eq(2).all()
    assert torch.equal(given[:, 1:], labels[:, :-1].masked_fill(labels[:, :-1] == -100, 1))
    made.train()
    assert math.isfinite(made.state.log_history[-1]["train_loss"])


def test_a_model_that_cannot_give_maps_is_named(tmp_path, monkeypatch):
    def refuse(self, name):
        raise ValueError("no such attention")

    monkeypatch.setattr(transformers.BartForConditionalGeneration, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match=r"attention maps of the student \(BartFor.*'sdpa'\).*no such attention"):
        trainer(tmp_path)
    monkeypatch.setattr(transformers.BartForConditionalGeneration, "set_attn_implementation", lambda *a: None)
    with pytest.raises(ValueError, match="load it with attn_implementation='eager'"):
        trainer(tmp_path)


# --------------------------------------------------------------------------------------------------------- refusals


def make_trainer(tmp_path, **changes):
    options = {
        "model": model(),
        "teacher": model(noise=0.05),
        "kd": KDConfig(logits=1),
        "args": arguments(tmp_path),
        "train_dataset": examples(4),
        "data_collator": collate,
    }
    return DistillationTrainer(**{**options, **changes})


def other_vocabulary():
    found = model()
    found.resize_token_embeddings(90)
    return found


REFUSED = {
    "empty": (lambda p: {"train_dataset": []}, "train_dataset is empty"),
    "empty eval": (lambda p: {"eval_dataset": {"en": examples(1), "ro": []}}, r"eval_dataset\['ro'\] is empty"),
    "columns": (
        lambda p: {"train_dataset": [{"text": "a", "labels": [1]}]},
        "train_dataset has no column input_ids: it has text, labels",
    ),
    "both columns": (
        lambda p: {"train_dataset": [{"source": "a", "target": "b"}]},
        "no column input_ids and no column labels: it has source, target",
    ),
    "no teacher": (lambda p: {"teacher": None}, r"task,logits \(KL at T=2\) compares with a teacher: pass teacher="),
    "vocabulary": (lambda p: {"teacher": other_vocabulary()}, "vocabulary"),
    "packed": (
        lambda p: {"model": quantize_(model(), DQConfig())},
        "a packed model cannot be trained: train the float",
    ),
    "smoothing": (lambda p: {"args": arguments(p, label_smoothing_factor=0.1)}, r"KDConfig\(label_smoothing"),
    "hub": (lambda p: {"args": arguments(p, push_to_hub=True)}, "push_to_hub=True writes training_args.bin"),
    "loss function": (lambda p: {"compute_loss_func": print}, "compute_loss_func is not for this trainer"),
    "arguments": (
        lambda p: {"args": transformers.TrainingArguments(str(p))},
        "args must be .*Seq2SeqTrainingArguments",
    ),
    "decoder only": (
        lambda p: {"model": transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1))},
        "model must be an encoder-decoder of transformers, got GPT2LMHeadModel",
    ),
    "changes": (lambda p: {"resume_changes": "maybe"}, "resume_changes must be 'refuse' or 'warn', got 'maybe'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refusals_say_what_is_wrong(what, tmp_path):
    changes, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **changes(tmp_path))


def test_the_teacher_cannot_be_the_student(tmp_path):
    one = model()
    with pytest.raises(ValueError, match="the same object"):
        make_trainer(tmp_path, model=one, teacher=one)


def test_a_packed_teacher_teaches(tmp_path):
    made = make_trainer(
        tmp_path, teacher=quantize_(model(noise=0.05), DQConfig(weight_bits=8)), args=arguments(tmp_path, max_steps=1)
    )
    assert math.isfinite(made.train().training_loss)


@pytest.mark.parametrize("kind", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_what_would_write_pickles_is_refused(kind, tmp_path, monkeypatch):
    create = Seq2SeqTrainer.create_accelerator_and_postprocess

    def pretend(self):
        create(self)
        setattr(self, kind, True)

    monkeypatch.setattr(Seq2SeqTrainer, "create_accelerator_and_postprocess", pretend)
    with pytest.raises(ValueError, match="optimizer checkpoints of that kind are pickles"):
        make_trainer(tmp_path)


def test_the_hooks_exist_and_are_called_as_they_are_here():
    for name in resumable.HOOKS:
        assert callable(getattr(Seq2SeqTrainer, name)), name
    for kind in (resumable.ResumableTrainer, DistillationTrainer):
        for name, method in vars(kind).items():
            theirs = getattr(Seq2SeqTrainer, name, None)
            if theirs is None or name == "__init__" or not inspect.isfunction(method):
                continue
            assert not name.startswith("_") or name in resumable.HOOKS or name.startswith("__"), name
            ours = inspect.signature(method).parameters
            if any(p.kind == p.VAR_POSITIONAL for p in ours.values()):
                continue
            assert list(ours) == list(inspect.signature(theirs).parameters), name


def test_a_missing_hook_is_no_silent_fallback(tmp_path, monkeypatch):
    monkeypatch.setattr(resumable, "HOOKS", (*resumable.HOOKS, "_save_everything"))
    with pytest.raises(RuntimeError, match="this release of transformers has no Trainer._save_everything"):
        make_trainer(tmp_path)


def test_the_order_of_the_data_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = resumable.EpochSampler(torch.utils.data.RandomSampler(range(50)), seed)
        sampler.set_epoch(epoch)
        torch.rand(int(torch.randint(9, ())))  # the global state has no say
        return list(sampler)

    assert order(0, 1) == order(0, 1) and sorted(order(0, 1)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


def test_grouping_by_length_has_an_order_of_its_own_too(tmp_path):
    first, second = (_run(tmp_path, max_steps=6, train_sampling_strategy="group_by_length")[1].steps for _ in range(2))
    assert first == second


@pytest.fixture(autouse=True)
def _one_thread():
    """These models are too small for two: waiting for each other takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
