//! Layouts name the package that a type is from, and a host compares the names: the types here are those of another
//! version of `plugin-api`.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rustc-env=CARGO_PKG_NAME=plugin-api");
    println!("cargo::rustc-env=CARGO_PKG_VERSION=1.0.0");
}
