"""Records what transformers' CLIPTokenizer makes of awkward prompts, into tests/fixtures/parity/tokenizer.json.

Two vocabularies: the bundled checkpoint's (tokenizer.json) and that of sd2-small (vocab.json and
merges.txt, "!" as padding), each with the placeholders <v1>, <Cat-2> and sks7.
"""
import argparse
import json
import pathlib

import transformers
from tokenizers import AddedToken
from transformers import CLIPTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "tests/fixtures/parity"
PLACEHOLDERS = ["<v1>", "<Cat-2>", "sks7"]
PROMPTS = [
    "", " ", "a", "A Photo Of A DOG", "a photo of <v1> and <Cat-2>", "<v1><v1> <v1>,<Cat-2>!", "a<v1>b <V1> <cat-2> < v1 >",
    "sks7 asks7 sks7s SKS7 sks7.", "it's they're I'll we've I'm he'd don't", "rock'n'roll 'sup ''quoted''", "IT'S THEY'RE",
    "  leading, trailing   and \t tabs \n newlines \u00a0 no-break\u2003em ", "1234567890 3.14 1,000 4x4 v2", "½ ² Ⅷ ٣ ９",
    "naïve café Ångström ÄÖÜ ß ẞ İstanbul ŒUVRE", "e\u0301 n\u0303 A\u030a (combining)", "ﬁne ﬂow ½", "日本語のテキスト 漢字", "Привет, мир", "مرحبا بالعالم", "हिन्दी नमस्ते",
    "😀 👩‍👩‍👧 🇩🇪 🏳️‍🌈 x😀y", "zero\u200bwidth\u200djoiner\ufeffbom", "!!! ... --- *** ((())) [x]{y} a!b !", "snake_case kebab-case camelCase http://a.b/c?d=e&f#g",
    "<|startoftext|> inside <|endoftext|> text", "<|STARTOFTEXT|>", "a </w> b", "\"quotes\" “curly” ‘single’ it’s", "a photo of a dog and a house on the grass near the sea",
    "ab" * 30, "supercalifragilisticexpialidocious antidisestablishmentarianism", "\u0000null \u0007bell", "ΑΣ ὈΔΥΣΣΕΎΣ", "ǅ ǆ Ǆ",
]


def record(folder):
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    base = len(tokenizer)
    words = {word: tokenizer(word, add_special_tokens=False).input_ids for word in ["dog", "Robot", "a dog", "grass"]}
    cases = lambda: {p: ids if len(ids := tokenizer(p).input_ids) <= 77 else len(ids) for p in PROMPTS}
    plain = cases()
    for token in PLACEHOLDERS:
        tokenizer.add_tokens(AddedToken(token, normalized=False, single_word=token.isalnum(), special=False))
    padded = tokenizer("a dog", padding="max_length", max_length=77).input_ids
    return {"vocab_size": base, "words": words, "plain": plain, "with_placeholders": cases(), "padded": padded}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=pathlib.Path, default=ROOT / "plugin/crates/sprites/model")
    arguments = parser.parse_args()
    recorded = {"versions": f"transformers {transformers.__version__}", "placeholders": PLACEHOLDERS,
                "sprites": record(arguments.model), "sd2-small": record(FIXTURES / "sd2-small")}
    lines = json.dumps(recorded, ensure_ascii=True, indent=1)
    (FIXTURES / "tokenizer.json").write_text(lines + "\n")
    print(f"tokenizer.json: {len(PROMPTS)} prompts, {len(lines) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
