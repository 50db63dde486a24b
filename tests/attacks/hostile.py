"""Hostile folders, built by code from one good folder. Each function spoils one thing; `ATTACKS` says what is refused.

A folder arrives as config.json plus one safetensors file: 8 bytes of header length, a JSON header, the data.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

WEIGHTS = "model.safetensors"
FC1 = "model.encoder.layers.0.fc1"


def split(folder: Path) -> tuple[dict, bytes]:
    """Header and data of the weight file."""
    data = (folder / WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(folder: Path, header: dict | bytes, data: bytes, length: int | None = None) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / WEIGHTS
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def header(change):
    """An attack that changes the parsed header (in place, or by returning a new one) and leaves the data."""

    def attack(folder: Path) -> None:
        parsed, data = split(folder)
        join(folder, change(parsed) or parsed, data)

    return attack


def raw_header(change):
    """An attack on the bytes of the header."""

    def attack(folder: Path) -> None:
        parsed, data = split(folder)
        join(folder, change(json.dumps(parsed).encode()), data)

    return attack


def tensor(name: str, **fields):
    """An attack that overwrites fields of one declared tensor."""
    return header(lambda h: h[name].update(fields))


def config(change):
    """An attack on config.json."""

    def attack(folder: Path) -> None:
        path = folder / "config.json"
        parsed = json.loads(path.read_text())
        path.write_text(json.dumps(change(parsed) or parsed))

    return attack


def quantization(**fields):
    return config(lambda c: c["quantization_config"].update(fields))


def rewritten(name: str, dtype: str, shape: list[int], fill: bytes | None = None, size: int | None = None):
    """An attack that replaces one tensor, data included, and keeps the file well-formed."""

    def attack(folder: Path) -> None:
        parsed, data = split(folder)
        metadata = parsed.pop("__metadata__")
        out, parts, at = {"__metadata__": metadata}, [], 0
        for key, entry in sorted(parsed.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            piece = data[begin:end]
            if key == name:
                count = size if size is not None else end - begin
                piece = piece[:count].ljust(count, b"\0") if fill is None else (fill * count)[:count]
                entry = {"dtype": dtype, "shape": shape}
            out[key] = {**entry, "data_offsets": [at, at + len(piece)]}
            parts.append(piece)
            at += len(piece)
        join(folder, out, b"".join(parts))

    return attack


def remove(name: str):
    def attack(folder: Path) -> None:
        parsed, data = split(folder)
        metadata = parsed.pop("__metadata__")
        out, parts, at = {"__metadata__": metadata}, [], 0
        for key, entry in sorted(parsed.items(), key=lambda item: item[1]["data_offsets"]):
            if key == name:
                continue
            begin, end = entry["data_offsets"]
            out[key] = {**entry, "data_offsets": [at, at + end - begin]}
            parts.append(data[begin:end])
            at += end - begin
        join(folder, out, b"".join(parts))

    return attack


def bytes_of(change):
    """An attack on the whole weight file."""

    def attack(folder: Path) -> None:
        path = folder / WEIGHTS
        path.write_bytes(change(path.read_bytes()))

    return attack


def pickle_only(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def link_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    (folder / WEIGHTS).symlink_to("../elsewhere.safetensors")


def link_loop(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to(WEIGHTS)


def pipe(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)


def config_link_to_device(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


def index(**weight_map):
    """An attack that turns the folder into a sharded one with this map."""

    def attack(folder: Path) -> None:
        shard = folder / "model-00001-of-00001.safetensors"
        (folder / WEIGHTS).rename(shard)
        names = [n for n in split_file(shard) if n != "__metadata__"]
        full = {name: shard.name for name in names} | weight_map
        full = {name: file for name, file in full.items() if file is not None}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": full}))

    return attack


def split_file(path: Path) -> dict:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length])


def two_shards_one_tensor(folder: Path) -> None:
    first, second = (folder / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    second.write_bytes((folder / WEIGHTS).read_bytes())
    (folder / WEIGHTS).rename(first)
    names = [n for n in split_file(first) if n != "__metadata__"]
    full = {name: (first if i else second).name for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": full}))


QWEIGHT, SCALE = f"{FC1}.qweight", f"{FC1}.weight_scale"
#: name -> (what spoils the folder, what the error must say). These are refused before any data is read.
ATTACKS = {
    # the frame of the file
    "empty file": (bytes_of(lambda b: b""), "header length is 0"),
    "seven bytes": (bytes_of(lambda b: b[:7]), "header length"),
    "header longer than the file": (bytes_of(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), "header length is 1099"),
    "header length of 64 bits": (bytes_of(lambda b: b"\xff" * 8 + b[8:]), "header length is 18446744073709551615"),
    "header over 4 MiB": (raw_header(lambda r: r + b" " * (4 << 20)), "header length.*at most 4194304"),
    "truncated data": (bytes_of(lambda b: b[:-1]), "bytes after the header"),
    "trailing bytes": (bytes_of(lambda b: b + b"PK\x03\x04"), "bytes after the header"),
    "a pickle by the right name": (bytes_of(lambda b: b"\x80\x02c__builtin__\nexec\n."), "header length"),
    # the header's JSON
    "header is no JSON": (raw_header(lambda r: b"{" + r), "not valid JSON"),
    "header is a list": (raw_header(lambda r: b"[1]"), "JSON is list"),
    "header is no UTF-8": (raw_header(lambda r: r.replace(b"fc1", b"f\xff1", 1)), "not valid JSON"),
    "header nests too deep": (raw_header(lambda r: b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "a name twice": (
        raw_header(lambda r: r[:-1] + b', "lm_head.bias": {}, "lm_head.bias": {}}'),
        "key 'lm_head.bias' stands there twice",
    ),
    "a number of 5000 digits": (
        raw_header(lambda r: r.replace(b'"data_offsets": [0', b'"data_offsets": [' + b"9" * 5000, 1)),
        "not valid JSON|data_offsets",
    ),
    "NaN in the header": (raw_header(lambda r: r.replace(b"[0,", b"[NaN,", 1)), "NaN is no JSON number"),
    # what it declares
    "unknown dtype": (tensor(QWEIGHT, dtype="F8_E4M3"), "dtype is F8_E4M3, wanted one of F64, F32"),
    "dtype is a list": (tensor(QWEIGHT, dtype=["U8"]), "dtype is"),
    "rank 6": (tensor(QWEIGHT, shape=[1, 1, 1, 1, 1, 1]), "shape is.*at most 5 numbers"),
    "codes of rank 4": (tensor(QWEIGHT, shape=[64, 1, 1, 64]), "U8 \\[a multiple of 16, bytes per row\\]"),
    "negative dimension": (tensor(QWEIGHT, shape=[-64, -32]), "shape is.*whole numbers"),
    "a dimension that is true": (tensor(QWEIGHT, shape=[True, 32]), "whole numbers"),
    "a dimension that is a float": (tensor(QWEIGHT, shape=[64.0, 64]), "whole numbers"),
    "product of dimensions wraps in 64 bits": (tensor(QWEIGHT, shape=[1 << 30, 1 << 30, 16]), "data_offsets"),
    "product of dimensions wraps in 32 bits": (tensor(QWEIGHT, shape=[1 << 16, 1 << 16]), "data_offsets"),
    "declared larger than stored": (tensor(QWEIGHT, shape=[1024, 64]), "the size of U8"),
    "offsets beyond the file": (tensor(QWEIGHT, data_offsets=[1 << 40, (1 << 40) + 4096]), "first byte|bytes"),
    "offsets backwards": (tensor(QWEIGHT, data_offsets=[4096, 0]), "data_offsets"),
    "negative offsets": (tensor(QWEIGHT, data_offsets=[-4096, 0]), "data_offsets"),
    "two tensors in one place": (
        header(lambda h: h.__setitem__("alias.bias", dict(h["final_logits_bias"]))),
        "its first byte",
    ),
    "a hole between tensors": (
        header(
            lambda h: (
                [
                    e.__setitem__("data_offsets", [o + 8 for o in e["data_offsets"]])
                    for n, e in h.items()
                    if n != "__metadata__"
                ]
                and None
            )
        ),
        "its first byte",
    ),
    "an extra field": (tensor(QWEIGHT, file="/etc/passwd"), "an object with dtype, shape and data_offsets"),
    "a tensor that is a string": (header(lambda h: h.__setitem__("x.bias", "none")), "tensor 'x.bias'"),
    "metadata is a list": (header(lambda h: h.__setitem__("__metadata__", [])), "format_version"),
    "no format_version": (header(lambda h: h.pop("__metadata__") and None), "format_version in its metadata is None"),
    "format_version from the future": (
        header(lambda h: h["__metadata__"].update(format_version="2")),
        "format_version in its metadata is 2, wanted 1",
    ),
    # packed tensors
    "rows not a multiple of 16": (rewritten(QWEIGHT, "U8", [63, 64], size=63 * 64), "a multiple of 16"),
    "row bytes not a multiple of the block": (rewritten(QWEIGHT, "U8", [64, 63], size=63 * 64), "bytes per row"),
    "codes as floats": (rewritten(QWEIGHT, "F32", [16, 64]), "U8"),
    "codes of rank 1": (rewritten(QWEIGHT, "U8", [4096]), "U8"),
    "codes without rows": (rewritten(QWEIGHT, "U8", [0, 64], size=0), "U8"),
    "codes without a scale": (remove(SCALE), "without its scale"),
    "a scale without codes": (remove(QWEIGHT), "without its codes"),
    "a scale in half precision": (rewritten(SCALE, "F16", [112]), "F32"),
    "a scale of the wrong length": (rewritten(SCALE, "F32", [40], size=160), "F32 \\[1\\] or \\[out_features\\]"),
    # files
    "only a pickle": (pickle_only, "pytorch_model.bin.*pickle files are never read"),
    "no weight file": (lambda f: (f / WEIGHTS).unlink(), "its weight file is nothing"),
    "a link out of the folder": (link_outside, "a link to"),
    "a link to itself": (link_loop, "cannot be read"),
    "a pipe": (pipe, "no regular file"),
    "a folder by the file's name": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "no regular file"),
    "config is a device": (config_link_to_device, "no regular file"),
    "index with a path": (index(**{QWEIGHT: "../model-00001-of-00001.safetensors"}), "a bare name"),
    "index with an absolute path": (index(**{QWEIGHT: "/etc/passwd"}), "a bare name"),
    "index with a pickle": (index(**{QWEIGHT: "pytorch_model-00001-of-00001.bin"}), "a bare name"),
    "index names a missing file": (index(**{QWEIGHT: "model-00002-of-00002.safetensors"}), "cannot be read"),
    "index names a missing tensor": (
        index(**{"ghost.bias": "model-00001-of-00001.safetensors"}),
        "'ghost.bias' is in the index only",
    ),
    "a tensor outside the index": (index(**{QWEIGHT: None}), "in a weight file only"),
    "one tensor in two shards": (two_shards_one_tensor, "in one file only"),
    # config.json
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be read"),
    "config over 4 MiB": (config(lambda c: c.update(x=" " * (4 << 20))), "its size"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "config runs code": (config(lambda c: c.update(auto_map={"AutoModel": "evil.py"})), "'auto_map' is present"),
    "no quantization_config": (
        config(lambda c: c.pop("quantization_config") and None),
        "quantization_config is NoneType",
    ),
    "another quant_method": (quantization(quant_method="gptq"), "quant_method is gptq, wanted dqkernels"),
    "config from the future": (quantization(format_version=2), "format_version is 2.*format_version 1"),
    "config without a version": (
        config(lambda c: c["quantization_config"].pop("format_version") and None),
        "format_version is missing",
    ),
    "an unknown key": (quantization(load_hook="os.system"), "unknown keys.*load_hook"),
    "a bad value": (quantization(weight_bits=3), "weight_bits must be one of"),
    "a group size of the wrong type": (quantization(group_size=[32]), "group_size"),
    "a regular expression that does not compile": (quantization(overrides={"(": {}}), "not a regular expression"),
    "overrides that are no pairs": (quantization(overrides=[["fc1", {}, {}]]), "a list of \\[regex, dict\\]"),
    "a regular expression twice": (quantization(overrides=[["fc1", {}], ["fc1", {}]]), "the regex 'fc1' twice"),
    "an override of the wrong type": (quantization(overrides=[["fc1", 8]]), "must be a dict, got int"),
    "a backend to force": (quantization(backend="cuda"), "unknown keys \\['backend'\\]: they are of a machine"),
    "a billion layers": (config(lambda c: c.update(encoder_layers=10**9)), "encoder_layers is 1000000000"),
    "a vocabulary beyond int32": (config(lambda c: c.update(vocab_size=10**15)), "vocab_size"),
    "no heads": (
        config(lambda c: c.update(decoder_attention_heads=0)),
        "decoder_attention_heads is 0, wanted 1 or more",
    ),
    "a billion positions": (config(lambda c: c.update(max_position_embeddings=10**9)), "max_position_embeddings"),
}
