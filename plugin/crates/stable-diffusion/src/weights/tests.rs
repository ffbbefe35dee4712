use std::path::Path;

use super::*;

fn layer(weights: &Weights) -> Result<()> {
    let layer = weights.pp("layers").pp(0);
    layer.get("weight", &[2, 3])?;
    layer.get("bias", &[2])?;
    weights.get("norm.weight", &[2])?;
    Ok(())
}

fn zeros(shape: &[usize]) -> Tensor {
    Tensor::zeros(shape, DType::F32, &Device::Cpu).unwrap()
}

fn map(entries: &[(&str, &[usize])]) -> WeightMap {
    WeightMap(
        entries
            .iter()
            .map(|(name, shape)| ((*name).to_owned(), zeros(shape)))
            .collect(),
    )
}

#[test]
fn every_difference_is_reported_at_once() {
    let map = map(&[
        ("layers.0.weight", &[3, 2]),
        ("layers.0.bias", &[2]),
        ("extra.weight", &[1]),
        ("embeddings.position_ids", &[1, 77]),
    ]);
    let error = map
        .build("unet.safetensors", |w| layer(&w))
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "unet.safetensors does not hold the model that its configuration describes:\n  \
         1 missing: norm.weight\n  \
         1 unexpected: extra.weight\n  \
         1 of the wrong shape: layers.0.weight is [3, 2] and should be [2, 3]"
    );
}

#[test]
fn the_text_encoders_prefix_is_optional_either_way() {
    let ask = |name: &'static str| move |w: Weights| w.get(name, &[2]).map(drop);
    map(&[("text_model.norm.weight", &[2])])
        .build("m", ask("norm.weight"))
        .unwrap();
    map(&[("norm.weight", &[2])])
        .build("m", ask("text_model.norm.weight"))
        .unwrap();
}

#[test]
fn random_weights_do_not_depend_on_the_order_of_requests() {
    let forward = WeightMap::random(7, |w| layer(&w)).unwrap();
    let backward = WeightMap::random(7, |w| {
        w.get("norm.weight", &[2])?;
        w.get("layers.0.bias", &[2])?;
        w.get("layers.0.weight", &[2, 3])?;
        Ok(())
    })
    .unwrap();
    let values = |map: &WeightMap| map.0["layers.0.weight"].to_vec2::<f32>().unwrap();
    assert_eq!(values(&forward), values(&backward));
    assert_ne!(
        values(&forward),
        values(&WeightMap::random(8, |w| layer(&w)).unwrap())
    );
    forward.build("random", |w| layer(&w)).unwrap();
    let shapes = WeightMap::shapes(|w| layer(&w)).unwrap();
    assert_eq!(shapes["layers.0.weight"], [2, 3]);
    assert_eq!(shapes.len(), 3);
}

/// A file whose header is `header` and which has `data` bytes of zeros.
fn write(path: &Path, header: &str, data: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0; data]);
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn damaged_files_are_refused_with_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let check = |header: &str, data: usize, expected: &str| {
        let path = folder.path().join("m.safetensors");
        write(&path, header, data);
        let read = TensorFile::open(&path).and_then(|file| WeightMap::read(&file, &Device::Cpu));
        let error = read.unwrap_err().to_string();
        assert_eq!(error, format!("{}: {expected}", path.display()));
    };
    let entry = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    check(
        &entry("F32", "[2,3]", 0, 24),
        20,
        "truncated: 24 bytes of tensors announced, 20 there; copy or download it again",
    );
    check(
        &entry("F32", "[2,3]", 0, 20),
        24,
        "w of shape [2, 3] has 20 bytes; copy or download it again",
    );
    check(
        &entry("F32", "[2,3]", 24, 0),
        24,
        "w ends before it starts; copy or download it again",
    );
    check(
        &entry("I32", "[6]", 0, 24),
        24,
        "w is I32, supported are F32, F16, BF16 and F64",
    );
    let huge = entry("F32", "[4294967296,4294967296,4]", 0, 24);
    check(
        &huge,
        24,
        "w of shape [4294967296, 4294967296, 4] is too large; copy or download it again",
    );
    check(
        "[]",
        0,
        "not a safetensors file: invalid type: sequence, expected a map at line 1 column 0; name a .safetensors file",
    );
}

#[test]
fn foreign_and_missing_files_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let open = |name: &str, bytes: &[u8]| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        let error = TensorFile::open(&path).unwrap_err().to_string();
        error
            .strip_prefix(&format!("{}: ", path.display()))
            .unwrap()
            .to_owned()
    };
    assert_eq!(
        open("a.safetensors", b"PK"),
        "not a safetensors file: 2 bytes long; name a .safetensors file"
    );
    assert_eq!(
        open(
            "b.safetensors",
            b"PK\x03\x04 a zip archive, that is a pickle"
        ),
        "not a safetensors file: its first eight bytes are no header length; name a .safetensors file"
    );
    let mut short = 100_u64.to_le_bytes().to_vec();
    short.push(b'{');
    assert_eq!(
        open("c.safetensors", &short),
        "truncated: 9 bytes long, its header alone has 100; copy or download it again"
    );
    assert_eq!(
        open("model.ckpt", b""),
        ".ckpt files are pickles, which can run any program when loaded: convert it to .safetensors first"
    );
    let missing = folder.path().join("none.safetensors");
    assert!(
        TensorFile::open(&missing)
            .unwrap_err()
            .to_string()
            .contains("there is no such file or folder")
    );
}

#[test]
fn half_precision_is_widened_and_infinities_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    let header = r#"{"__metadata__":{"made":"here"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[4,8]},
        "h":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}"#;
    write(&path, header, 0);
    let append = |words: [u16; 4]| {
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.truncate(8 + header.len());
        bytes.extend(words.iter().flat_map(|w| w.to_le_bytes()));
        std::fs::write(&path, bytes).unwrap();
    };
    // 1.5 and the smallest subnormal of f16; 1.5 and -2^127 of bf16.
    append([0x3e00, 0x0001, 0x3fc0, 0xff00]);
    let file = TensorFile::open(&path).unwrap();
    assert_eq!(file.metadata()["made"], "here");
    assert_eq!(
        file.read("h", &Device::Cpu)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap(),
        [1.5, 2.0_f32.powi(-24)]
    );
    assert_eq!(
        file.read("b", &Device::Cpu)
            .unwrap()
            .to_vec1::<f32>()
            .unwrap(),
        [1.5, -(2.0_f32.powi(127))]
    );
    append([0x3e00, 0x7c00, 0, 0]);
    let error = TensorFile::open(&path)
        .unwrap()
        .read("h", &Device::Cpu)
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("h holds values that are not finite"),
        "{error}"
    );
}
