"""The three networks, the noise schedule and an attention processor that keeps the cross-attention maps."""
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

CONTEXT, WIDTH, STEPS = 77, 128, 1000
BETA_FIRST, BETA_LAST = 0.00085, 0.012
SCALE = 0.18215                    # Stable Diffusion's latent scaling factor
SIDE = 128                         # of a picture, in pixels


def alphas_cumprod():
    betas = torch.linspace(BETA_FIRST ** 0.5, BETA_LAST ** 0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def new_unet():
    return UNet2DConditionModel(
        sample_size=SIDE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 128, 192),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH, attention_head_dim=4, norm_num_groups=32)


def new_text_encoder(tokenizer):
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=4 * WIDTH, projection_dim=WIDTH,
        num_hidden_layers=4, num_attention_heads=4, max_position_embeddings=CONTEXT, hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id))


def new_autoencoder():
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, sample_size=SIDE, layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64), scaling_factor=SCALE)


def load_tokenizer(model):
    return CLIPTokenizer.from_pretrained(f"{model}/tokenizer")


def load_autoencoder(model):
    return AutoencoderKL.from_pretrained(f"{model}/vae", torch_dtype=torch.float32)


def load_unet(model):
    return UNet2DConditionModel.from_pretrained(f"{model}/unet", torch_dtype=torch.float32)


def load_text_encoder(model):
    return CLIPTextModel.from_pretrained(f"{model}/text_encoder", dtype=torch.float32)


class KeepMaps:
    """Plain attention; each cross-attention layer appends its mean map over the heads, [batch, pixels, tokens]."""

    def __init__(self):
        self.maps = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        split = lambda x: x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)
        q, k, v = split(attn.to_q(hidden_states)), split(attn.to_k(source)), split(attn.to_v(source))
        weights = torch.matmul(q * attn.scale, k.transpose(-1, -2)).softmax(-1)
        if encoder_hidden_states is not None:
            self.maps.append(weights.mean(1))
        out = torch.matmul(weights.to(v.dtype), v).transpose(1, 2)
        return attn.to_out[0](out.reshape(hidden_states.shape[0], hidden_states.shape[1], -1))

    def take(self):
        maps, self.maps = self.maps, []
        return maps


def image_tensor(pixels):
    """uint8 [n, side, side, 3] to floats in [-1, 1], channels first (stored channels-last)."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x.contiguous(memory_format=torch.channels_last)
