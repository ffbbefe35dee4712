//! Low-rank changes of weights as files, by the names of whatever tool made them.
//!
//! | names | made by |
//! | --- | --- |
//! | `lora_unet_down_blocks_0_….lora_down.weight`, `.lora_up.weight`, `.alpha`; `lora_te_text_model_…` | kohya's scripts; read by ComfyUI, A1111, InvokeAI and diffusers |
//! | `unet.down_blocks.0.….lora_A.weight`, `.lora_B.weight`; `text_encoder.…` | diffusers with PEFT |
//! | `unet.….lora.down.weight`, `unet.….processor.to_q_lora.down.weight`, `….lora_linear_layer.down.weight` | diffusers before |
//! | `base_model.model.….lora_A.weight` | PEFT |
//! | `diffusion_model.input_blocks.1.….lora_up.weight`, `.diff`; `text_encoders.clip_l.transformer.…` | ComfyUI |
//!
//! A change is put into the weights, so that it costs nothing afterwards:
//!
//! ```text
//! W' = W + strength · alpha / rank · up · down
//! ```
//! | symbol | shape |
//! | --- | --- |
//! | up, down | `[out, r]`, `[r, in]`; of a convolution `[out, r, 1, 1]`, `[r, in, k, k]`; r may differ between layers |
//! | alpha | one number per layer; r where there is none |

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use serde_json::Value;

use crate::config::UNetConfig;
use crate::error::{Error, Result};
use crate::lora::added;
use crate::model::read_optional;
use crate::ops::dims_of;
use crate::single_file::unet_name;
use crate::weights::{TensorFile, WeightMap};

/// What diffusers, InvokeAI and others call the file in a folder of its own.
const IN_FOLDER: [&str; 2] = [
    "pytorch_lora_weights.safetensors",
    "adapter_model.safetensors",
];
/// What PEFT writes beside its file.
pub const PEFT_CONFIGURATION: &str = "adapter_config.json";
/// Starts the names in a file of PEFT's own.
const PEFT_PREFIX: &str = "base_model.model.";
/// Key of a file's metadata under which diffusers keeps PEFT's configuration, as JSON.
pub(crate) const CONFIGURATION: &str = "lora_adapter_metadata";

/// Ends of tensors' names, and what they are.
const PARTS: [(&str, Part); 16] = [
    (".lora_A.weight", Part::Down),
    (".lora_B.weight", Part::Up),
    (".lora_A.default.weight", Part::Down),
    (".lora_B.default.weight", Part::Up),
    (".lora_down.weight", Part::Down),
    (".lora_up.weight", Part::Up),
    (".lora.down.weight", Part::Down),
    (".lora.up.weight", Part::Up),
    ("_lora.down.weight", Part::Down),
    ("_lora.up.weight", Part::Up),
    (".lora_linear_layer.down.weight", Part::Down),
    (".lora_linear_layer.up.weight", Part::Up),
    (".alpha", Part::Alpha),
    (".diff", Part::Difference),
    (".diff_b", Part::BiasDifference),
    (".lora_mid.weight", Part::Middle),
];
/// In the names of adapters that are no LoRA.
const OTHER_ADAPTERS: [(&str, &str); 5] = [
    ("hada_", "LoHa"),
    ("lokr_", "LoKr"),
    ("dora_scale", "DoRA"),
    ("oft_", "OFT"),
    (".a1.", "GLoRA"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Down,
    Up,
    Middle,
    Alpha,
    /// A change of the whole weight, and of the bias.
    Difference,
    BiasDifference,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Network {
    UNet,
    TextEncoder,
}

/// An open file.
#[derive(Debug)]
pub(crate) struct LoraFile {
    file: TensorFile,
    /// Names of tensors by what their module is called in the file.
    modules: BTreeMap<String, BTreeMap<Part, String>>,
    configuration: Value,
}

/// Weights with the changes of a file in them.
#[derive(Debug)]
pub(crate) struct Changed {
    pub(crate) unet: WeightMap,
    pub(crate) text_encoder: WeightMap,
    /// What the file calls modules that this model does not have.
    pub(crate) left_out: Vec<String>,
}

impl LoraFile {
    /// The file that a path means: itself, or the one in a folder.
    pub(crate) fn find(path: &Path) -> PathBuf {
        let in_folder = IN_FOLDER.iter().map(|name| path.join(name));
        let found = in_folder.into_iter().find(|file| file.is_file());
        found.unwrap_or_else(|| path.to_owned())
    }

    /// Whether a file looks like one, and not like the weights of a whole network.
    pub(crate) fn is_one(file: &TensorFile) -> bool {
        let is_other = |name: &str| OTHER_ADAPTERS.iter().any(|(part, _)| name.contains(part));
        file.names().any(|name| {
            is_other(name) || matches!(split(name), Some((_, part)) if part != Part::Alpha)
        })
    }

    /// Sorts a file's tensors; `beside` is its folder, where PEFT leaves what it scales by.
    ///
    /// # Errors
    /// [`Error::Unreadable`] for tensors that are no part of a LoRA, or a configuration that is none.
    pub(crate) fn new(file: TensorFile, beside: &Path) -> Result<Self> {
        let refuse = |reason: String| Err(Error::unreadable(file.name(), reason));
        let mut modules: BTreeMap<String, BTreeMap<Part, String>> = BTreeMap::new();
        for name in file.names() {
            let other = OTHER_ADAPTERS.iter().find(|(part, _)| name.contains(part));
            if let Some((_, kind)) = other {
                return refuse(format!(
                    "{name} belongs to a {kind} adapter; LoRA is read, so have it converted or merged"
                ));
            }
            match split(name) {
                Some((_, Part::Middle)) => {
                    return refuse(format!(
                        "{name} belongs to a Tucker decomposition, which is not read; train without it (use_cp, use_tucker)"
                    ));
                }
                Some((module, part)) => {
                    let parts = modules.entry(module.to_owned()).or_default();
                    parts.insert(part, name.to_owned());
                }
                None => return refuse(format!("{name} is not part of an adapter")),
            }
        }
        if modules.is_empty() {
            return refuse("it holds no adapter".to_owned());
        }
        let is_pefts = file.names().any(|name| name.starts_with(PEFT_PREFIX));
        let json = match file.metadata().get(CONFIGURATION) {
            Some(json) => Some(json.clone().into_bytes()),
            None if is_pefts => read_optional(&beside.join(PEFT_CONFIGURATION))?,
            None => None,
        };
        let configuration = json
            .map_or(Ok(Value::Null), |json| lenient_json::from_slice(&json))
            .map_err(|error| {
                Error::unreadable(file.name(), format!("its configuration: {error}"))
            })?;
        Ok(Self {
            file,
            modules,
            configuration,
        })
    }

    /// The weights of both networks with `strength` times the changes.
    ///
    /// # Errors
    /// [`Error::Unreadable`] for a change of another shape than its weight, and where no module is this model's.
    pub(crate) fn applied(
        &self,
        unet: &WeightMap,
        text_encoder: &WeightMap,
        config: &UNetConfig,
        strength: f64,
    ) -> Result<Changed> {
        let names = Names::of(unet, text_encoder, config);
        let mut changed = Changed {
            unet: unet.clone(),
            text_encoder: text_encoder.clone(),
            left_out: Vec::new(),
        };
        for (module, parts) in &self.modules {
            let Some((network, path)) = names.find(module) else {
                changed.left_out.push(module.clone());
                continue;
            };
            let weights = match network {
                Network::UNet => &mut changed.unet,
                Network::TextEncoder => &mut changed.text_encoder,
            };
            if let Some(change) =
                self.change(module, parts, network, &weights.0[&weight_of(path)])?
            {
                self.add(weights, &weight_of(path), &change, strength)?;
            }
            for (part, parameter) in [(Part::Difference, "weight"), (Part::BiasDifference, "bias")]
            {
                if let Some(name) = parts.get(&part) {
                    let change = self.file.read(name, unet_device(unet))?;
                    self.add(weights, &format!("{path}.{parameter}"), &change, strength)?;
                }
            }
        }
        if changed.left_out.len() == self.modules.len() {
            let reason = format!(
                "this model has none of its {} layers (the first is {}); it was made for another model",
                self.modules.len(),
                changed.left_out[0]
            );
            return Err(Error::unreadable(self.file.name(), reason));
        }
        Ok(changed)
    }

    /// alpha / rank · up · down in the shape of `weight`, if the module has factors.
    fn change(
        &self,
        module: &str,
        parts: &BTreeMap<Part, String>,
        network: Network,
        weight: &Tensor,
    ) -> Result<Option<Tensor>> {
        let (down, up) = match (parts.get(&Part::Down), parts.get(&Part::Up)) {
            (Some(down), Some(up)) => (down, up),
            (None, None) => return Ok(None),
            _ => {
                let reason = format!("{module} has one factor of two; the file is damaged");
                return Err(Error::unreadable(self.file.name(), reason));
            }
        };
        let device = weight.device();
        let (down, up) = (self.file.read(down, device)?, self.file.read(up, device)?);
        let rank = down.dims().first().copied().unwrap_or(0).max(1);
        let dims = dims_of(weight);
        let n_numbers: usize = dims.iter().product();
        let fits = up.dims().get(1) == Some(&rank)
            && up.elem_count() / rank * (down.elem_count() / rank) == n_numbers
            && up.dims()[0] == dims[0];
        if !fits {
            let reason = format!(
                "{module}: {:?} x {:?} for a weight {dims:?}; it was made for another model",
                up.dims(),
                down.dims()
            );
            return Err(Error::unreadable(self.file.name(), reason));
        }
        let product = up.flatten_from(1)?.matmul(&down.flatten_from(1)?)?;
        let alpha = match parts.get(&Part::Alpha) {
            Some(name) => {
                let alpha = self.file.read(name, &Device::Cpu)?.flatten_all()?;
                f64::from(
                    alpha
                        .to_vec1::<f32>()?
                        .first()
                        .copied()
                        .unwrap_or(rank as f32),
                )
            }
            None => self.configured_alpha(network, rank).unwrap_or(rank as f64),
        };
        Ok(Some(
            (product.reshape(weight.shape())? * (alpha / rank as f64))?,
        ))
    }

    /// What PEFT's configuration says of a network: alpha, or alpha · √rank where it divides by √rank.
    fn configured_alpha(&self, network: Network, rank: usize) -> Option<f64> {
        let prefix = match network {
            Network::UNet => "unet.",
            Network::TextEncoder => "text_encoder.",
        };
        let said = |key: &str| {
            let own = self.configuration.get(format!("{prefix}{key}"));
            own.or_else(|| self.configuration.get(key))
        };
        let alpha = said("lora_alpha")?.as_f64()?;
        let by_root = said("use_rslora").is_some_and(|value| *value == Value::Bool(true));
        Some(if by_root {
            alpha * (rank as f64).sqrt()
        } else {
            alpha
        })
    }

    fn add(
        &self,
        weights: &mut WeightMap,
        name: &str,
        change: &Tensor,
        strength: f64,
    ) -> Result<()> {
        let Some(weight) = weights
            .0
            .get_mut(name)
            .filter(|w| dims_of(w) == change.dims())
        else {
            let reason = format!("a change {:?} does not fit {name}", change.dims());
            return Err(Error::unreadable(self.file.name(), reason));
        };
        *weight = added(weight, &(change * strength)?)?;
        Ok(())
    }
}

fn unet_device(unet: &WeightMap) -> &Device {
    unet.0.values().next().map_or(&Device::Cpu, Tensor::device)
}

fn weight_of(path: &str) -> String {
    format!("{path}.weight")
}

/// The module of a tensor's name, and what the tensor is to it.
fn split(name: &str) -> Option<(&str, Part)> {
    let part = |(end, part): &(&'static str, Part)| Some((name.strip_suffix(end)?, *part));
    PARTS.iter().find_map(part)
}

/// The modules of a model by the names that files have for them.
struct Names<'a> {
    known: BTreeMap<String, (Network, &'a str)>,
    config: &'a UNetConfig,
}

impl<'a> Names<'a> {
    fn of(unet: &'a WeightMap, text_encoder: &'a WeightMap, config: &'a UNetConfig) -> Self {
        let mut known = BTreeMap::new();
        let networks = [
            (Network::UNet, unet, &["unet", "lora_unet"][..]),
            (
                Network::TextEncoder,
                text_encoder,
                &["text_encoder", "lora_te", "lora_te1"],
            ),
        ];
        for (network, weights, prefixes) in networks {
            let [dotted, flat @ ..] = prefixes else {
                continue;
            };
            for path in weights
                .0
                .keys()
                .filter_map(|name| name.strip_suffix(".weight"))
            {
                let full = match network {
                    Network::TextEncoder if !path.starts_with("text_model.") => {
                        format!("text_model.{path}")
                    }
                    _ => path.to_owned(),
                };
                for flat in flat {
                    known.insert(
                        format!("{flat}_{}", full.replace('.', "_")),
                        (network, path),
                    );
                }
                known.insert(format!("{dotted}.{full}"), (network, path));
            }
        }
        Self { known, config }
    }

    /// The network and path of what a file calls `module`.
    fn find(&self, module: &str) -> Option<(Network, &'a str)> {
        let module = module.strip_prefix(PEFT_PREFIX).unwrap_or(module);
        if let Some(rest) = module.strip_prefix("diffusion_model.") {
            let path = unet_name(self.config, &format!("{rest}.weight"))?;
            return self
                .known
                .get(&format!("unet.{}", path.strip_suffix(".weight")?))
                .copied();
        }
        if let Some((_, path)) = module.split_once(".transformer.text_model.")
            && module.starts_with("text_encoders.")
        {
            return self
                .known
                .get(&format!("text_encoder.text_model.{path}"))
                .copied();
        }
        // The attention processors of older diffusers: their projections are the attention's own.
        let plain = module.replace(".processor.", ".");
        let spelled = [
            plain.clone(),
            format!("{plain}.0"),
            plain.replace("self_attn.to_out", "self_attn.out_proj"),
            plain.replace("self_attn.to_", "self_attn.") + "_proj",
        ];
        spelled.iter().find_map(|name| {
            let known = self
                .known
                .get(name)
                .or_else(|| self.known.get(&format!("unet.{name}")));
            known.copied()
        })
    }
}
