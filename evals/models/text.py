"""Rebuild the text that the small models were trained on, from two Debian packages, and train the tokenizer on it.

    python -m evals.models.text DIRECTORY

Needs apt-get and dpkg-deb (Debian or Ubuntu, any user) and `tokenizers`. Both texts are in the public domain: Jane
Austen's six novels (1811 to 1817) and the King James Bible (1611).

    r-cran-janeaustenr 1.0.0-1       data/Rdata.rdb, the novels; the package itself is MIT
    bible-kjv, bible-kjv-text 4.38   the text, compressed, and the `bible` program that reads it; the program is GPL-2+

The last tenth of every novel and the books of Ruth, Esther, Jonah and James are held out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

PACKAGES = {"r-cran-janeaustenr": "1.0.0-1", "bible-kjv": "4.38", "bible-kjv-text": "4.38"}
NOVELS = ("emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility")
HELD_OUT_BOOKS = ("Ruth", "Est", "Jonah", "Jas")
VOCABULARY = 2048
END, PAD, ASK = "<|endoftext|>", "<|pad|>", "<ask>"
KEYS = tuple(f"<key{i:02d}>" for i in range(64))
VALUES = tuple(f"<value{i:02d}>" for i in range(64))


def unpack(directory: Path) -> None:
    """Download the packages by name and version and unpack them into `directory`."""
    subprocess.run(["apt-get", "download", *map("=".join, PACKAGES.items())], check=True, cwd=directory)
    for name in PACKAGES:
        (deb,) = directory.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", str(deb), str(directory)], check=True)


def novels(rdb: bytes) -> dict[str, str]:
    """The novels in an R lazy-load database: each a 4-byte length and a zlib stream of one character vector."""
    found = {}
    start = 0
    for name in NOVELS:
        stream = zlib.decompressobj()
        data = stream.decompress(rdb[start + 4 :])
        start = len(rdb) - len(stream.unused_data)
        lines = _strings(data)
        paragraphs, current = [], []
        for line in [*lines, ""]:
            if line.strip():
                current.append(line.strip())
            elif current:
                paragraphs.append(" ".join(current))
                current = []
        found[name] = "\n\n".join(paragraphs)
    return found


def _strings(data: bytes) -> list[str]:
    """The strings of a character vector in R's XDR serialisation, version 3."""
    offset = 14
    (encoding,) = struct.unpack_from(">i", data, offset)
    offset += 4 + encoding
    kind, count = struct.unpack_from(">ii", data, offset)
    offset += 8
    if kind & 0xFF != 16:
        raise ValueError(f"the database holds an R object of type {kind & 0xFF}, not a character vector (16)")
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, offset)
        offset += 8
        strings.append(data[offset : offset + length].decode())
        offset += length
    return strings


def bible(root: Path) -> tuple[str, str]:
    """The King James Bible, one paragraph a chapter, as (training, held out)."""
    command = ["usr/bin/bible", "-f", "-d", "usr/lib/bible.data", "gen1:1-rev22:21"]  # takes no absolute path
    verses = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in verses.splitlines():
        reference, verse = line.split(" ", 1)
        matched = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+", reference)
        if matched is None:
            raise ValueError(f"not a verse: {line!r}")
        chapters.setdefault((matched[1], matched[2]), []).append(verse.strip())
    if not set(HELD_OUT_BOOKS) <= {book for book, _ in chapters}:
        raise ValueError(f"books are named {sorted({book for book, _ in chapters})}")
    kept, held = [], []
    for (book, _), lines in chapters.items():
        (held if book in HELD_OUT_BOOKS else kept).append(" ".join(lines))
    return "\n\n".join(kept), "\n\n".join(held)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = [ASK, *KEYS, *VALUES]  # ordinary tokens, so that decoding keeps them
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(words),
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((line for text in texts for line in text.split("\n\n")), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words])
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory", type=Path, help="where text, tokens and tokenizer go")
    parser.add_argument("--packages", type=Path, help="a folder with the packages unpacked already")
    arguments = parser.parse_args()
    out: Path = arguments.directory
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.packages or Path(temporary)
        if arguments.packages is None:
            unpack(root)
        books = novels((root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes())
        kept, held = bible(root)

    train, texts = [kept], {"bible": held}
    for name, text in books.items():
        cut = text.index("\n\n", int(0.9 * len(text)))
        train.append(text[:cut])
        texts[name] = text[cut:].strip()
    tokenizer = train_tokenizer(train)
    tokenizer.save(str(out / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    ids = [token for text in train for token in [*tokenizer.encode(text).ids, end]]
    np.array(ids, dtype=np.uint16).tofile(out / "train.u16")
    held_ids = {name: tokenizer.encode(text).ids for name, text in texts.items()}
    np.array([token for ids in held_ids.values() for token in [*ids, end]], dtype=np.uint16).tofile(
        out / "held_out.u16"
    )
    (out / "held_out.json").write_text(json.dumps(texts, indent=0, ensure_ascii=False))
    summary = {
        "packages": PACKAGES,
        "characters": {"train": sum(map(len, train)), "held out": sum(map(len, texts.values()))},
        "tokens": {"train": len(ids), "held out": {name: len(ids) for name, ids in held_ids.items()}},
        "sha256 of train.u16": hashlib.sha256((out / "train.u16").read_bytes()).hexdigest(),
    }
    (out / "text.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
