"""Translation by command line: mBART with its languages, the best checkpoint by BLEU, and that one packed."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from dqkernels.cli import main
from dqkernels.train import load_trained

pytest.importorskip("sacrebleu")
pytest.importorskip("datasets")

#: Sentences of one language and of the other, of made-up words.
PAIRS = [
    ("the cat sees a small dog", "pisica vede un mic caine"),
    ("a dog sees the cat", "un caine vede pe pisica"),
    ("the small cat runs home now", "pisica cea mica fuge acasa"),
    ("a house stands here alone", "o casa sta aici singura"),
    ("the dog runs here now", "acum caine fuge pe aici"),
    ("now the house sees home", "acum casa cea vede acasa"),
]
LANGUAGES = ("en_XX", "ro_RO")


def tokenizer_of(name: str):
    """A real tokenizer class, with the words above for a vocabulary."""
    words = sorted({word for pair in PAIRS for text in pair for word in text.split()})
    pieces = [(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>")]
    pieces += [("\u2581" + word, -1.0 - i / 100) for i, word in enumerate(words)]
    return getattr(transformers, name)(vocab=pieces, src_lang=LANGUAGES[0], tgt_lang=LANGUAGES[1])


def translator(name: str, folder) -> None:
    """A tiny mBART that has learned the pairs by heart, and its tokenizer."""
    tokenizer = tokenizer_of(name)
    config = transformers.MBartConfig(
        vocab_size=len(tokenizer), d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=32, dropout=0.0,
        scale_embedding=True, pad_token_id=1, bos_token_id=0, eos_token_id=2, decoder_start_token_id=2,
        forced_eos_token_id=2,
    )  # fmt: skip
    model = transformers.MBartForConditionalGeneration(config)
    batch = tokenizer(
        [source for source, _ in PAIRS], text_target=[target for _, target in PAIRS], padding=True, return_tensors="pt"
    )
    batch["labels"][batch["labels"] == tokenizer.pad_token_id] = -100
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.05
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["MBartTokenizer", "MBart50Tokenizer"])
def test_the_best_checkpoint_by_bleu_is_loaded_and_exported(name, tmp_path, capsys):
    """The first step of the warm-up changes nothing, the next ones ruin the model: the last is not the best."""
    teacher, file, out = tmp_path / "teacher", tmp_path / "pairs.jsonl", tmp_path / "out"
    translator(name, teacher)
    rows = [{"translation": {"en": source, "ro": target}} for source, target in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = ("--task", "translation", "--source_lang", LANGUAGES[0], "--target_lang", LANGUAGES[1])
    assert not main([
        "train", "--model_name_or_path", str(teacher), "--train_file", str(file), "--validation_file", str(file), *task,
        "--weight_bits", "8", "--embedding_bits", "8", "--max_source_length", "16", "--max_target_length", "16",
        "--num_beams", "1", "--predict_with_generate", "True", "--metric_for_best_model", "bleu",
        "--load_best_model_at_end", "True", "--eval_strategy", "steps", "--eval_steps", "1", "--save_strategy", "steps",
        "--save_steps", "1", "--max_steps", "3", "--learning_rate", "0.3", "--warmup_steps", "1", "--max_grad_norm",
        "0", "--per_device_train_batch_size", "6", "--per_device_eval_batch_size", "6", "--report_to", "none",
        "--disable_tqdm", "True", "--use_cpu", "True", "--output_dir", str(out), "--json",
    ])  # fmt: skip
    results = json.loads(capsys.readouterr().out)
    state = json.loads((out / "checkpoint-3" / "trainer_state.json").read_text())
    scores = [line["eval_bleu"] for line in state["log_history"] if "eval_bleu" in line]
    assert len(scores) == 3 and scores[0] > 90 and max(scores[1:]) < scores[0] - 20, scores
    assert state["best_metric"] == scores[0] and state["best_model_checkpoint"].endswith("checkpoint-1")
    assert results["eval_bleu"] == scores[0] and "eval_rougeL" not in results and results["steps"] == 3

    # The folder holds the best one, learned steps too.
    kept, last = load_trained(out), load_trained(out / "checkpoint-3")
    best = load_trained(out / "checkpoint-1").state_dict()
    assert best and all(torch.equal(value, best[key]) for key, value in kept.state_dict().items())
    assert any(not torch.equal(value, best[key]) for key, value in last.state_dict().items())

    packed = tmp_path / "packed"
    assert not main(["export", str(out), str(packed), "--dtype", "float32"])
    capsys.readouterr()
    texts = tmp_path / "texts.jsonl"
    assert not main([
        "eval", str(packed), "--test_file", str(file), *task, "--num_beams", "1", "--max_new_tokens", "15",
        "--output_file", str(texts), "--json",
    ])  # fmt: skip
    scored = json.loads(capsys.readouterr().out)
    assert scored["bleu"] == pytest.approx(scores[0], abs=1e-6) and scored["pairs"] == len(PAIRS)
    assert all(word in texts.read_text() for word in ("pisica", "caine", "acasa"))
