//! Compiles `kernels/*.cu` for a build with the feature `cuda`; without it there is nothing to do.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    if let Err(reason) = cuda::compile() {
        println!("cargo::error={reason}");
    }
}

/// With the compiler, and for the compute capability, that candle's own kernels are compiled with and for.
#[cfg(feature = "cuda")]
mod cuda {
    use std::{
        env,
        fmt::Write,
        path::Path,
        process::{Child, Command},
    };

    /// What the attention of 16 bits needs. For older cards there are no kernels of our own.
    const LEAST_COMPUTE_CAPABILITY: usize = 80;

    pub(crate) fn compile() -> Result<(), String> {
        for variable in ["NVCC", "CUDA_HOME", "CUDA_PATH", "CUDA_COMPUTE_CAP"] {
            println!("cargo::rerun-if-env-changed={variable}");
        }
        println!("cargo::rerun-if-changed=kernels");
        let nvcc = cudaforge::CudaToolkit::detect()
            .map_err(|error| error.to_string())?
            .nvcc_path;
        let capability = cudaforge::detect_compute_cap()
            .map_err(|error| error.to_string())?
            .base();
        let out = env::var("OUT_DIR").map_err(|error| error.to_string())?;
        let out = Path::new(&out);

        let mut sources = Vec::new();
        for entry in std::fs::read_dir("kernels").map_err(|error| error.to_string())? {
            let path = entry.map_err(|error| error.to_string())?.path();
            if path.extension().is_some_and(|ending| ending == "cu") {
                sources.push(path);
            }
        }
        sources.sort();
        let mut running: Vec<(String, Child)> = Vec::new();
        let mut images = String::new();
        for source in &sources {
            let name = source
                .file_stem()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let image = out.join(format!("{name}.fatbin"));
            if capability < LEAST_COMPUTE_CAPABILITY {
                std::fs::write(&image, []).map_err(|error| error.to_string())?;
            } else {
                // Code for that card, and what the driver of a later one compiles for itself.
                let code = format!(
                    "-gencode=arch=compute_{capability},code=[sm_{capability},compute_{capability}]"
                );
                let child = Command::new(&nvcc)
                    .args(["-std=c++17", "-O3", "-fatbin", &code, "-o"])
                    .args([&image, source])
                    .spawn()
                    .map_err(|error| format!("{}: {error}", nvcc.display()))?;
                running.push((name.clone(), child));
            }
            let _ = write!(
                images,
                "(\"{name}\", include_bytes!(concat!(env!(\"OUT_DIR\"), \"/{name}.fatbin\"))),"
            );
        }
        for (name, mut child) in running {
            let status = child.wait().map_err(|error| error.to_string())?;
            if !status.success() {
                return Err(format!(
                    "{} could not compile kernels/{name}.cu: {status}",
                    nvcc.display()
                ));
            }
        }
        let n = sources.len();
        let text = format!(
            "static IMAGES: [(&str, &[u8]); {n}] = [{images}];\nconst COMPUTE_CAPABILITY: usize = {capability};\n"
        );
        std::fs::write(out.join("images.rs"), text).map_err(|error| error.to_string())
    }
}
