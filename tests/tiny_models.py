"""Random models of every family the plug-in promises, as small as their classes allow. No downloads."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import nn

from dqkernels.data import docstrings

VOCAB = 100  # not a multiple of 16: the packed table has padding rows
_SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 40,  # not a multiple of 128: packed rows have padding codes
    "encoder_layers": 2,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 56,
    "decoder_ffn_dim": 56,
    "max_position_embeddings": 32,
}
_T5 = {"vocab_size": VOCAB, "d_model": 40, "d_kv": 16, "num_heads": 2, "d_ff": 56, "num_layers": 2}
_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def _t5_v1_1():
    """A gated FFN, and an lm_head with values of its own, although its config says tied (as the published ones)."""
    config = transformers.T5Config(**_T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.randn(VOCAB, 40))
    model.all_tied_weights_keys.pop("lm_head.weight")
    return model


def _bert():
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=56,
        max_position_embeddings=32,
    )
    return transformers.BertForMaskedLM(config)


def _bart():
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**_SEQ2SEQ, scale_embedding=True))


def _marian():
    config = transformers.MarianConfig(
        **_SEQ2SEQ, decoder_vocab_size=VOCAB, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0
    )
    return transformers.MarianMTModel(config)


#: name -> (builder, Auto class, modules that read one packed table)
FAMILIES = {
    "bart": (_bart, "AutoModelForSeq2SeqLM", 4),
    "mbart": (
        lambda: transformers.MBartForConditionalGeneration(transformers.MBartConfig(**_SEQ2SEQ)),
        "AutoModelForSeq2SeqLM",
        4,
    ),
    "marian": (_marian, "AutoModelForSeq2SeqLM", 4),
    "pegasus": (
        lambda: transformers.PegasusForConditionalGeneration(transformers.PegasusConfig(**_SEQ2SEQ)),
        "AutoModelForSeq2SeqLM",
        4,
    ),
    "t5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**_T5)), "AutoModelForSeq2SeqLM", 4),
    "t5_v1_1": (_t5_v1_1, "AutoModelForSeq2SeqLM", 3),
    "bert": (_bert, "AutoModelForMaskedLM", 2),
    "llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=False)),
        "AutoModelForCausalLM",
        1,
    ),
    "llama_tied": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**_LLAMA, tie_word_embeddings=True)),
        "AutoModelForCausalLM",
        2,
    ),
}


def make(family: str) -> nn.Module:
    """The model in fp32 and eval mode, the same at every call; biases and norms are random too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[family][0]().eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def auto_class(family: str) -> type:
    return getattr(transformers, FAMILIES[family][1])


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    """Of two short sources, one with padding."""
    ids = torch.tensor([[5, 6, 7, 8, 9, 2], [11, 12, 13, 2, 1, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2])}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :4]
    return model(**inputs).logits


def save_bart(folder: Path, **changes) -> None:
    """A folder with a random BART that costs nothing and the demo's tokenizer; changes: of its config."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(docstrings.__file__).parent / "docstring_teacher")
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    sizes |= {"d_model": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    tokens |= {"decoder_start_token_id": 2, "forced_eos_token_id": 2}
    config = transformers.BartConfig(vocab_size=len(tokenizer), **{**sizes, **tokens, **changes})
    torch.manual_seed(0)
    transformers.BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
