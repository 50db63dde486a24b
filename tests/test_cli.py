"""The command line on a tiny model: exit codes, one-sentence errors, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models
import torch
import transformers
from test_text import make_tiny, make_tokenizer

import dqkernels
from dqkernels.cli import main

ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "80"}


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("COLUMNS", "80")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster than two for a model of this size
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A float model folder."""
    return str(make_tiny(tmp_path_factory.mktemp("tiny") / "bart"))


@pytest.fixture(scope="module")
def packed(tiny, tmp_path_factory):
    """The same, packed by the verb."""
    out = str(tmp_path_factory.mktemp("packed") / "w4")
    assert main(["quantize", tiny, out]) == 0
    return out


def wrong(capsys, *arguments: str, code: int = 2) -> str:
    """Runs what must fail; its one line on stderr."""
    assert main(list(arguments)) == code
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("dqkernels: error: ")]
    assert len(lines) == 1 and captured.out == "" and "Traceback" not in captured.err
    return lines[0].removeprefix("dqkernels: error: ")


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


# ---- help, version, usage -----------------------------------------------------------------

VERBS = [
    "info",
    "demo",
    "quantize",
    "generate",
    "summarize",
    "translate",
    "tune",
    "warmup",
    "export",
    "distill-data",
    "eval",
    "plot",
]
BENCHES = ["linear", "gemm", "kernels", "generate", "cpu", "size", "train", "quality", "compare", "peers"]


def test_help_is_quick_complete_and_fits_80_columns():
    code = (
        "import sys; from dqkernels.cli import main; code = main(['--help']); "
        "print('torch' in sys.modules, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.strip() == "False", "help must not import torch"
    assert "\x1b" not in done.stdout, "no colour in a pipe"
    for verb in [*VERBS, "bench"]:
        assert f"\n  {verb} " in done.stdout
    for later in ("distill", "doctor"):
        assert f"\n  {later} " not in done.stdout, "only verbs that work are listed"


@pytest.mark.parametrize("verb", [[v] for v in VERBS] + [["bench"], *(["bench", b] for b in BENCHES)])
def test_help_of_each_verb_teaches(verb, capsys):
    assert main([*verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples:" in out and "dqkernels " + " ".join(verb) in out
    assert max(map(len, out.splitlines())) <= 110


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"dqkernels {dqkernels.__version__}\n"


def test_no_verb_is_wrong_usage(capsys):
    assert main([]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "Commands:" in captured.err


def test_unknown_words(capsys):
    assert "quantise" in wrong(capsys, "quantise", "a", "b")
    assert "--weight_bitz" in wrong(capsys, "quantize", "a", "b", "--weight_bitz", "4")
    assert "--batch_size" in wrong(capsys, "generate", "a", "--text", "b", "--batch_size", "many")
    assert "MODEL" in wrong(capsys, "generate")


# ---- info ---------------------------------------------------------------------------------


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and max(map(len, out.splitlines())) <= 80
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["cpu"]["eager"]["usable"] is True


@pytest.mark.parametrize("verb", [["info"], ["quantize", "a", "b"], ["generate", "a", "--text", "b"], ["demo"]])
def test_a_wrong_environment_is_wrong_usage_of_every_verb(verb, capsys, monkeypatch):
    monkeypatch.setenv("DQKERNELS_BACKEND", "bogus")
    error = wrong(capsys, *verb)
    assert error == "DQKERNELS_BACKEND must be one of auto, eager, triton, cuda, cpu, got 'bogus'"
    monkeypatch.setenv("DQKERNELS_BACKEND", "eager")
    monkeypatch.setenv("DQKERNELS_CPU", "avx1024")
    assert wrong(capsys, *verb).startswith("DQKERNELS_CPU must be one of scalar, avx2, avx_vnni")
    assert main(["--help"]) == main(["--version"]) == 0


# ---- quantize -----------------------------------------------------------------------------


def test_quantize_writes_a_folder_that_runs(tiny, packed, capsys):
    files = {path.name for path in Path(packed).iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= files
    assert "import dqkernels" in Path(packed, "README.md").read_text()
    stored = json.loads(Path(packed, "config.json").read_text())["quantization_config"]
    assert (stored["weight_bits"], stored["embedding_bits"]) == (4, 8)
    assert main(["generate", packed, "--text", "hello"]) == 0
    assert records(capsys.readouterr().out)[0]["index"] == 0


def test_quantize_says_what_it_did(tiny, tmp_path, capsys):
    out = str(tmp_path / "w2")
    assert main(["quantize", tiny, out, "--weight-bits", "2", "--embedding_bits=4", "--dtype", "float16"]) == 0
    text = capsys.readouterr().out
    assert "times smaller" in text and "import dqkernels" in text and out in text
    assert max(len(line) for line in text.splitlines() if out not in line) <= 80
    assert main(["quantize", tiny, out, "--json", "--overwrite"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bits"] == "4-8-8"
    assert result["file_bytes"] == Path(out, "model.safetensors").stat().st_size
    assert result["ratio"] == pytest.approx(result["fp32_bytes"] / result["file_bytes"], abs=1e-3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w2"], "no leftovers"


def test_dashes_are_underscores_but_values_are_left_alone(tiny, tmp_path, capsys):
    assert main(["quantize", tiny, str(tmp_path / "a-b"), "--preset", "dq-bart-2-2-8"]) == 0
    assert Path(tmp_path, "a-b", "config.json").is_file()
    capsys.readouterr()
    assert main(["generate", tiny, "--text", "--max-new-tokens", "--max-new-tokens", "3"]) == 0
    assert records(capsys.readouterr().out)[0]["input"] == "--max-new-tokens"


def test_quantize_static(tiny, tmp_path, capsys):
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"body": "hello world"}\n{"body": "a b c"}\n')
    command = ["quantize", tiny, str(tmp_path / "static"), "--act_granularity", "static"]
    assert main([*command, "--calibration_file", str(texts), "--text_column", "body"]) == 0
    assert "times smaller" in capsys.readouterr().out
    assert "needs --calibration_file" in wrong(capsys, *command, "--overwrite")
    error = wrong(capsys, *command, "--overwrite", "--calibration_file", str(texts))
    assert "line 1 has no column 'text'; it has 'body'" in error
    error = wrong(capsys, "quantize", tiny, str(tmp_path / "x"), "--calibration_file", str(texts))
    assert "measures nothing" in error


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Float model folders without a tokenizer, by class."""
    folder = tmp_path_factory.mktemp("bare")
    made = {family: tiny_models.make(family) for family in ("bart", "bert", "llama")}
    made["classifier"] = transformers.BertForSequenceClassification(made["bert"].config)
    made["headless"] = made["bart"].model
    for name, model in made.items():
        model.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    ("name", "written", "auto"),
    [
        ("bart", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
        ("bert", "BertForMaskedLM", "AutoModelForMaskedLM"),
        ("llama", "LlamaForCausalLM", "AutoModelForCausalLM"),
        ("classifier", "BertForSequenceClassification", "AutoModelForSequenceClassification"),
        # As facebook/bart-large: its head is the embedding, and a user wants to generate.
        ("headless", "BartForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ],
)
def test_quantize_takes_any_architecture_and_needs_no_tokenizer(name, written, auto, bare, tmp_path, capsys, caplog):
    out = str(tmp_path / name)
    assert main(["quantize", str(bare / name), out, "--dtype", "float32"]) == 0
    assert f"{auto}.from_pretrained({out!r})" in capsys.readouterr().out
    assert "has no tokenizer" in caplog.text
    assert json.loads(Path(out, "config.json").read_text())["architectures"] == [written]
    card = Path(out, "README.md").read_text()
    assert f"from transformers import {auto}\n" in card and f"model = {auto}.from_pretrained(" in card
    loaded = getattr(transformers, auto).from_pretrained(out)
    assert type(loaded).__name__ == written
    # The head came along: the packed folder computes what packing the model in memory computes.
    source = type(loaded).from_pretrained(bare / name).eval()
    dqkernels.quantize_(source, dqkernels.DQConfig())
    assert torch.equal(tiny_models.logits(loaded), tiny_models.logits(source))


def test_quantize_static_of_models_that_write_no_text(bare, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("hello world\na b c\n")
    command = ["--act_granularity", "static", "--calibration_file", str(tmp_path / "texts.txt")]
    for name in ("bert", "llama"):
        folder, model = tmp_path / name, tiny_models.make(name)
        assert "has no tokenizer" in wrong(capsys, "quantize", str(bare / name), str(tmp_path / "no"), *command)
        tokenizer = make_tokenizer(limit=16)
        if name == "llama":  # such models often come without a padding token
            tokenizer.pad_token = None
        tokenizer.save_pretrained(folder)
        model.config.vocab_size = len(tokenizer)
        type(model)(model.config).save_pretrained(folder)
        out = str(tmp_path / f"{name}-static")
        assert main(["quantize", str(folder), out, *command]) == 0
        assert "times smaller" in capsys.readouterr().out and Path(out, "tokenizer.json").is_file()


def test_quantize_refuses_a_class_that_nobody_knows(bare, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(bare / "bert", folder)
    config = json.loads((folder / "config.json").read_text())
    for names in (["MyOwnModel"], None, ["BertForMaskedLM", "BertModel"], ["os"]):
        (folder / "config.json").write_text(json.dumps({**config, "architectures": names}))
        error = wrong(capsys, "quantize", str(folder), str(tmp_path / "out"))
        assert error.startswith("MODEL must name one model class of transformers under architectures")


@pytest.mark.parametrize("verb", ["generate", "summarize", "translate"])
def test_texts_need_an_encoder_decoder_and_a_tokenizer(verb, bare, capsys):
    assert "must be an encoder-decoder" in wrong(capsys, verb, str(bare / "bert"), "--text", "a")
    assert "has no tokenizer: copy" in wrong(capsys, verb, str(bare / "bart"), "--text", "a")


def test_a_weight_that_is_not_finite_is_wrong_input(tmp_path, capsys):
    model = tiny_models.make("bart")
    with torch.no_grad():
        model.model.decoder.layers[0].fc2.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    error = wrong(capsys, "quantize", str(tmp_path / "nan"), str(tmp_path / "out"))
    assert error == "model.decoder.layers.0.fc2: weight has NaN or Inf values and cannot be quantized"
    assert not (tmp_path / "out").exists()


def test_the_printed_ratio_counts_a_tied_table_once(bare, tmp_path, capsys):
    fp32 = {}
    for head in ("quantized", "float"):
        assert main(["quantize", str(bare / "bart"), str(tmp_path / head), "--head", head, "--json"]) == 0
        fp32[head] = json.loads(capsys.readouterr().out)["fp32_bytes"]
    assert fp32["float"] == fp32["quantized"] == 4 * sum(p.numel() for p in tiny_models.make("bart").parameters())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--weight_bits", "3"], "--weight_bits must be one of [2, 4, 8], got 3"),
        (["--embedding-bits", "5"], "--embedding_bits must be one of [2, 4, 8, 16], got 5"),
        (["--weight_quantizer", "best"], "--weight_quantizer must be one of"),
        (["--group_size", "7"], "--group_size must be one of [-1, 32, 64, 128], got 7"),
        (["--weight_bits", "8", "--group_size", "64"], "is for 2 and 4 bits, and nothing here has so few"),
        (["--act_clip", "-1"], "--act_clip must be None or a finite number above 0, got -1.0"),
        (["--dtype", "int8"], "--dtype must be one of"),
        (["--device", "tpu"], "--device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["--preset", "dq-bart-9"], "preset must look like 'dq-bart-2-2-8'"),
        (["--preset", "dq-bart-2-2-8", "--weight_bits", "4"], "leave out --weight_bits"),
    ],
)
def test_quantize_refuses(tiny, tmp_path, capsys, arguments, sentence):
    assert sentence in wrong(capsys, "quantize", tiny, str(tmp_path / "out"), *arguments)
    assert not list(tmp_path.iterdir())


def test_quantize_refuses_models_and_places(tiny, packed, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert "hub" in wrong(capsys, "quantize", "nobody/nothing", out)
    assert "neither" in wrong(capsys, "quantize", "/no/such/folder", out)
    assert "has no config.json" in wrong(capsys, "quantize", str(tmp_path), out)
    assert "quantized already" in wrong(capsys, "quantize", packed, out)
    assert "--overwrite" in wrong(capsys, "quantize", tiny, packed)
    assert "must lie in a folder that exists" in wrong(capsys, "quantize", tiny, str(tmp_path / "no" / "out"))
    (tmp_path / "letter").write_text("dear")
    assert "something else" in wrong(capsys, "quantize", tiny, str(tmp_path / "letter"))
    assert "only model folders are replaced" in wrong(capsys, "quantize", tiny, str(tmp_path), "--overwrite")
    assert [p.name for p in tmp_path.iterdir()] == ["letter"]


def test_a_failure_while_saving_leaves_nothing(tiny, tmp_path, capsys, monkeypatch):
    import dqkernels.serialize

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dqkernels.serialize, "write_model_card", full)
    assert "No space left" in wrong(capsys, "quantize", tiny, str(tmp_path / "out"), code=1)
    assert not list(tmp_path.iterdir())


# ---- generate, summarize, translate -------------------------------------------------------


def test_lines_in_json_lines_out_in_order(packed, tmp_path, capsys):
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    lines = ["hello " * n + str(n) for n in (5, 1, 9, 2)] + ["", "last"]
    source.write_text("\n".join(lines) + "\n")
    command = ["generate", packed, "--input", str(source), "--batch_size", "2", "--max_new_tokens", "5"]
    assert main(command) == 0
    streamed = capsys.readouterr().out
    found = records(streamed)
    assert [r["index"] for r in found] == list(range(6)) and [r["input"] for r in found] == lines
    assert set(found[0]) == {"index", "input", "output"} and found[4]["output"] == ""
    assert main([*command, "--output", str(out)]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "wrote 6 outputs" in captured.err
    assert out.read_text() == streamed
    assert "--overwrite" in wrong(capsys, *command, "--output", str(out))
    assert main([*command, "--output", str(out), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["count"] == 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_stdin(packed):
    done = subprocess.run(
        [sys.executable, "-m", "dqkernels", "generate", packed, "--input", "-", "--max_new_tokens", "4"],
        input="hello\nw\u00f6rld\n".encode(),
        env=ENVIRONMENT,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert [r["input"] for r in records(done.stdout.decode())] == ["hello", "w\u00f6rld"]


def test_empty_input(packed, tmp_path, capsys):
    (tmp_path / "in.txt").write_text("")
    assert main(["generate", packed, "--input", str(tmp_path / "in.txt")]) == 0
    captured = capsys.readouterr()
    assert captured.out == "" and "empty" in captured.err
    assert main(["generate", packed, "--input", str(tmp_path / "in.txt"), "--output", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out").read_text() == ""


def test_json_lines_with_a_missing_column_name_the_line(packed, tmp_path, capsys):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "a"}\n{"body": "b"}\n')
    command = ["generate", packed, "--input", str(source), "--output", str(tmp_path / "out")]
    assert "in.jsonl line 2 has no column 'text'; it has 'body'" in wrong(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_generate_refuses(packed, tmp_path, capsys):
    assert "give either --input or --text" in wrong(capsys, "generate", packed)
    assert "not both" in wrong(capsys, "generate", packed, "--text", "a", "--input", "-")
    assert "'nothing.txt' is not there" in wrong(capsys, "generate", packed, "--input", "nothing.txt")
    text = ["generate", packed, "--text", "a"]
    assert "--batch_size must be at least 1, got 0" in wrong(capsys, *text, "--batch_size", "0")
    assert "--num_beams must be at least 1, got 0" in wrong(capsys, *text, "--num_beams", "0")
    assert "--max_source_length must be at most 128" in wrong(capsys, *text, "--max_source_length", "999")
    assert "folder that exists" in wrong(capsys, *text, "--output", str(tmp_path / "no" / "out"))
    assert "--output must be a file" in wrong(capsys, *text, "--output", str(tmp_path))


def test_a_packed_file_that_was_tampered_with(packed, tmp_path, capsys):
    folder = tmp_path / "bad"
    shutil.copytree(packed, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    assert "format_version" in wrong(capsys, "generate", str(folder), "--text", "a")


def test_summarize_takes_the_models_parameters(tmp_path, capsys):
    params = {"summarization": {"prefix": "sum: ", "num_beams": 2, "max_length": 6}}
    folder = str(make_tiny(tmp_path / "bart", task_specific_params=params))
    from dqkernels import text

    seen = {}
    original = text._run

    def spy(model, tokenizer, rows, options):
        seen.update(options, source=tokenizer.decode(rows[0], skip_special_tokens=True))
        return original(model, tokenizer, rows, options)

    text._run = spy
    try:
        assert main(["summarize", folder, "--text", "hello"]) == 0
        assert seen["source"] == "sum: hello" and seen["num_beams"] == 2 and seen["max_length"] == 6
        assert main(["summarize", folder, "--text", "hello", "--source_prefix", "", "--num_beams", "1"]) == 0
        assert seen["source"] == "hello" and seen["num_beams"] == 1
    finally:
        text._run = original
    assert len(records(capsys.readouterr().out)) == 2


def test_translate(packed, capsys):
    assert main(["translate", packed, "--text", "hello", "--max_new_tokens", "4"]) == 0
    assert records(capsys.readouterr().out)[0]["input"] == "hello"
    error = wrong(capsys, "translate", packed, "--text", "hello", "--target_lang", "ro_RO")
    assert "--target_lang are for models with language codes and this one has none" in error


def test_an_error_halfway_leaves_nothing(packed, tmp_path, capsys, monkeypatch):
    from dqkernels import text

    source, calls = tmp_path / "in.txt", []
    source.write_text("a\nb\nc\nd\n")

    def fail_later(model, tokenizer, rows, options):
        calls.append(rows)
        if len(calls) == 3:
            raise RuntimeError("the machine is on fire")
        return ["x"] * len(rows)

    monkeypatch.setattr(text, "_run", fail_later)
    command = ["generate", packed, "--input", str(source), "--output", str(tmp_path / "out"), "--batch_size", "1"]
    assert "RuntimeError: the machine is on fire" in wrong(capsys, *command, code=1)
    assert [p.name for p in tmp_path.iterdir()] == ["in.txt"]
    calls.clear()
    assert main([*command, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_one_line(packed, capsys, monkeypatch, tmp_path):
    from dqkernels import text

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "_run", interrupt)
    assert main(["generate", packed, "--text", "a", "--output", str(tmp_path / "out")]) == 130
    assert "dqkernels: interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGKILL])
def test_a_kill_leaves_no_output_that_looks_whole(tiny, tmp_path, kill):
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("hello world a b c\n" * 20000)
    out.write_text("old\n")
    command = [sys.executable, "-m", "dqkernels", "generate", tiny, "--input", str(source), "--output", str(out)]
    process = subprocess.Popen(
        [*command, "--overwrite", "--batch_size", "1"], env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(1200):
            if any(".partial-" in p.name for p in tmp_path.iterdir()):
                break
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(0.3)
        process.send_signal(kill)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == (143 if kill == signal.SIGTERM else -signal.SIGKILL)
    assert out.read_text() == "old\n"
    left = sorted(p.name for p in tmp_path.iterdir() if p not in (source, out))
    if kill == signal.SIGTERM:
        assert left == []
    else:
        assert len(left) == 1 and left[0].startswith(".out.jsonl.partial-")


def test_a_reader_that_leaves_early_is_no_traceback(tiny, tmp_path):
    source = tmp_path / "in.txt"
    source.write_text("hello\n" * 300)
    command = [sys.executable, "-m", "dqkernels", "generate", tiny, "--input", str(source), "--batch_size", "64"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(timeout=120) in (0, 1) and "Traceback" not in errors and "Exception" not in errors


# ---- bench --------------------------------------------------------------------------------


def test_bench_size(tmp_path, capsys):
    out = tmp_path / "size.json"
    command = ["bench", "size", "--shape", "tiny", "--bits", "2-2", "--out", str(out)]
    assert main(command) == 0
    assert "tiny" in capsys.readouterr().out
    assert json.loads(out.read_text())["kind"] == "size"
    assert "--overwrite" in wrong(capsys, *command)
    said = wrong(capsys, "bench", "size", "--shape", "tiny", "--layers", "2-9")
    assert "--layers must be at most the teacher's 2-2, got 2-9" in said


def test_bench_linear_and_generate(capsys):
    linear = ["bench", "linear", "--shapes", "2x32x32", "--bits", "4", "--dtype", "float32", "--seconds", "0.2"]
    assert main([*linear, "--backends", "eager", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "linear"
    generate = ["bench", "generate", "tiny", "--bits", "4", "--source_tokens", "8", "--new_tokens", "2"]
    assert main([*generate, "--candidates", "torch,ours", "--seconds", "0.2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "generate"


def test_bench_peers(capsys):
    assert main(["bench", "peers", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu" and {row["peer"] for row in found["peers"]} >= {"ctranslate2", "torchao", "gemlite"}
    assert main(["bench", "peers"]) == 0
    assert "pip install --no-deps" in capsys.readouterr().out
    assert "--device" in wrong(capsys, "bench", "peers", "--device", "magic")


def test_bench_refuses(capsys):
    assert "--shapes must be NxNxN" in wrong(capsys, "bench", "linear", "--shapes", "1x64")
    assert "--bits must be 2, 4 or 8" in wrong(capsys, "bench", "linear", "--bits", "4,3")
    assert "--backends must be of" in wrong(capsys, "bench", "linear", "--backends", "magic")
    assert "--seconds must be above 0" in wrong(capsys, "bench", "linear", "--seconds", "0")
    assert "--shape must be one of" in wrong(capsys, "bench", "size", "--shape", "huge")
    assert "--bits must be pairs" in wrong(capsys, "bench", "size", "--bits", "3-2")
    assert "--embedding_bits" in wrong(capsys, "bench", "generate", "tiny", "--embedding_bits", "3")
    assert "nowhere" in wrong(capsys, "bench", "generate", "nowhere")


def test_demo_refuses(tmp_path, capsys):
    assert "--pairs must be at least 1, got 0" in wrong(capsys, "demo", "--pairs", "0")
    (tmp_path / "file").write_text("")
    error = wrong(capsys, "demo", "--out", str(tmp_path / "file"))
    assert "out must be a folder" in error
