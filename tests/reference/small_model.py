"""A small model of SD 2.x's kind with made-up weights: linear projections, exact GELU, heads that
differ from level to level, velocity prediction, and a padding token of its own."""
import json
import pathlib

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel

import hash_noise

CORPUS = """a photo of a dog and a house on the grass near the sea with a small red car behind the old
wooden table in the garden while the cat is sleeping under a tree and the robot watches the mountain"""


def write_tokenizer(folder: pathlib.Path) -> int:
    """Trains 120 merges on one sentence, as CLIP's vocabulary is built. Returns the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=10_000, min_frequency=1, initial_alphabet=alphabet,
                                  end_of_word_suffix="</w>", show_progress=False)
    tokenizer.train_from_iterator([CORPUS], trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:120]
    # CLIP's order: bytes in GPT-2's order, the same at a word's end, merges, start, end.
    def in_gpt2_order(char):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        return printable.index(ord(char)) if ord(char) in printable else len(printable) + ord(char)
    alphabet = sorted(alphabet, key=in_gpt2_order)
    tokens = alphabet + [a + "</w>" for a in alphabet] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>",
               "pad_token": "!"}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    return len(vocab)


def write(folder: pathlib.Path) -> None:
    """Writes the model in diffusers' layout."""
    vocab_size = write_tokenizer(folder / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, block_out_channels=(32, 40, 48), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=48, attention_head_dim=(1, 5, 3), use_linear_projection=True, norm_num_groups=8)
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 24), layers_per_block=1, latent_channels=4, norm_num_groups=8, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=vocab_size, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=3,
        hidden_act="gelu", projection_dim=48, pad_token_id=0, bos_token_id=vocab_size - 2,
        eos_token_id=vocab_size - 1))
    for name, module in [("unet", unet), ("vae", vae), ("text_encoder", text_encoder)]:
        hash_noise.fill(module, name + ".")
        module.save_pretrained(folder / name)
    DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction").save_pretrained(folder / "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"],
             "vae": ["diffusers", "AutoencoderKL"], "text_encoder": ["transformers", "CLIPTextModel"],
             "tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", "DDIMScheduler"]}
    for file in folder.glob("*/*"):
        file.chmod(0o644)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
