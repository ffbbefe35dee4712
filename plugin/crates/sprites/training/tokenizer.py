"""Make a small CLIP tokenizer in which every word of the captions is one token.

    python tokenizer.py --out MODEL/tokenizer

Byte-level BPE in CLIP's layout: the bytes, the bytes that end a word, the merges, two special tokens. The merges are
learned on the word list until each word is a single symbol; any other text falls back on pieces and bytes.
"""
import argparse
import collections
import json
import pathlib

from transformers import CLIPTokenizer

from compose import BACKGROUNDS
from drawings import CLASSES

FIRST, LAST, END = "<|startoftext|>", "<|endoftext|>", "</w>"
# words that prompts may use besides those of the captions; `sks` and the like are for personalization
MORE = """a an the and of on in with against front photo picture image showing background empty green blue night field
wooden brick skyline landscape koala dragon helicopter pineapple toy backpack drum hedgehog zebra tiger sheep goat
sks style painting drawing sketch cartoon small big red yellow white black orange purple pink brown next to under
over left right two three person people animal vehicle food object holding riding wearing sitting standing near
by at is are his her its my your concept asset this that top bottom behind beside""".split()


def words():
    found = set(MORE)
    for group, classes in CLASSES.items():
        found |= {group, *classes}
    for word, (follows, alone) in BACKGROUNDS.items():
        found |= {word, *" ".join(follows + alone).split()}
    return sorted(found)


def byte_letters():
    """CLIP's printable stand-ins for the 256 bytes, in the order of its vocabulary."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + k) for k in range(256 - len(plain))]


def join_pair(symbols, pair):
    out, k = [], 0
    while k < len(symbols):
        if tuple(symbols[k:k + 2]) == pair:
            out.append(pair[0] + pair[1])
            k += 2
        else:
            out.append(symbols[k])
            k += 1
    return out


def learn_merges(vocabulary_words):
    spelled = [[*w[:-1], w[-1] + END] for w in vocabulary_words]
    merges = []
    while True:
        counts = collections.Counter(p for s in spelled for p in zip(s, s[1:]))
        if not counts:
            return merges
        best = min(counts, key=lambda p: (-counts[p], p))
        merges.append(best)
        spelled = [join_pair(s, best) for s in spelled]


def write(out):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    merges, letters = learn_merges(words()), byte_letters()
    tokens = dict.fromkeys([*letters, *(c + END for c in letters), *("".join(m) for m in merges), FIRST, LAST])
    special = {"bos_token": FIRST, "eos_token": LAST, "unk_token": LAST, "pad_token": LAST}
    config = {**special, "add_prefix_space": False, "do_lower_case": True, "errors": "replace", "model_max_length": 77,
              "tokenizer_class": "CLIPTokenizer"}
    text = {
        "vocab.json": json.dumps({t: k for k, t in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges),
        "special_tokens_map.json": json.dumps(special, indent=1),
        "tokenizer_config.json": json.dumps(config, indent=1)}
    for name, body in text.items():
        (out / name).write_text(body, encoding="utf-8")
    CLIPTokenizer.from_pretrained(out).save_pretrained(out)      # adds tokenizer.json
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json"):
        (out / name).write_text(text[name], encoding="utf-8")
    return len(tokens)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--out", required=True)
    print(write(ap.parse_args().out), "tokens")


if __name__ == "__main__":
    main()
