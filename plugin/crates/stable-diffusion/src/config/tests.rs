use super::*;

#[test]
fn stable_diffusions_files_are_read_as_the_constructors_say() {
    // The keys of stable-diffusion-v1-5's files, as published.
    let unet = br#"{"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "attention_head_dim": 8, "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false,
        "cross_attention_dim": 768, "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D",
        "CrossAttnDownBlock2D", "DownBlock2D"], "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0,
        "in_channels": 4, "layers_per_block": 2, "mid_block_scale_factor": 1, "norm_eps": 1e-05,
        "norm_num_groups": 32, "out_channels": 4, "sample_size": 64, "up_block_types": ["UpBlock2D",
        "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}"#;
    let text = br#"{"architectures": ["CLIPTextModel"], "hidden_act": "quick_gelu", "hidden_size": 768,
        "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "vocab_size": 49408}"#;
    let vae = br#"{"_class_name": "AutoencoderKL", "act_fn": "silu", "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "in_channels": 3, "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3,
        "sample_size": 512, "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D",
        "UpDecoderBlock2D"]}"#;
    let scheduler = br#"{"_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "set_alpha_to_one": false, "skip_prk_steps": true,
        "steps_offset": 1, "trained_betas": null, "clip_sample": false}"#;
    let read = ModelConfig {
        unet: UNetConfig::from_json("unet", unet).unwrap(),
        text_encoder: TextEncoderConfig::from_json("text", text).unwrap(),
        vae: VaeConfig::from_json("vae", vae).unwrap(),
        scheduler: SchedulerConfig::from_json("scheduler", scheduler).unwrap(),
    };
    assert_eq!(read, ModelConfig::sd_1_5());
    assert_eq!(read.vae.downsampling(), 8);
    read.check("sd").unwrap();
    ModelConfig::sd_2_1().check("sd").unwrap();
}

#[test]
fn unsupported_values_are_refused_by_name_and_all_at_once() {
    let error = UNetConfig::from_json(
        "unet/config.json",
        br#"{"act_fn": "gelu", "addition_embed_type": "text_time", "layers_per_block": [2, 2],
            "down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D", "DownBlock2D"]}"#,
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "unet/config.json: \"layers_per_block\" is [2,2], supported is a number from 1 to 256, or a list of 4; \
         \"down_block_types\" is \"SkipDownBlock2D\", supported is \"DownBlock2D\" or \"CrossAttnDownBlock2D\"; \
         \"addition_embed_type\" is \"text_time\", supported is null; \"act_fn\" is \"gelu\", supported is \"silu\""
    );
}

#[test]
fn impossible_sizes_are_refused() {
    let check = |json: &str, expected: &str| {
        let error = UNetConfig::from_json("c", json.as_bytes())
            .unwrap_err()
            .to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(
        r#"{"block_out_channels": [0, 1]}"#,
        "\"block_out_channels\" is [0,1], supported is a list of at most 16 numbers from 1 to 16777216",
    );
    check(
        r#"{"sample_size": 1e12}"#,
        "\"sample_size\" is 1000000000000.0",
    );
    check(
        r#"{"sample_size": 20}"#,
        "\"sample_size\" 20 cannot be halved 3 times",
    );
    check(
        r#"{"attention_head_dim": 7}"#,
        "level 0 of width 320 cannot be split over 7 attention heads",
    );
    check(
        r#"{"up_block_types": ["UpBlock2D"]}"#,
        "\"up_block_types\" has 1 levels, \"block_out_channels\" has 4",
    );
    check("[1]", "not a JSON object");
}

#[test]
fn heads_are_a_count_whatever_the_key_says() {
    let config = UNetConfig::from_json("c", br#"{"attention_head_dim": [5, 10, 20, 20]}"#).unwrap();
    assert_eq!(config.heads, [5, 10, 20, 20]);
    let both = br#"{"attention_head_dim": 64, "num_attention_heads": [5, 10, 20, 20]}"#;
    assert_eq!(
        UNetConfig::from_json("c", both).unwrap().heads,
        [5, 10, 20, 20]
    );
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    let mut config = ModelConfig::sd_1_5();
    config.text_encoder = ModelConfig::sd_2_1().text_encoder;
    config.unet.in_channels = 9;
    assert_eq!(
        config.check("model").unwrap_err().to_string(),
        "model: the U-Net attends to embeddings of width 768, the text encoder's have 1024; \
         the U-Net takes 9 channels, the VAE's latents have 4 (inpainting and depth models are not supported); \
         the U-Net takes 9 channels and gives 4"
    );
}
