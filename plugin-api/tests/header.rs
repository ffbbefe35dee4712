//! The header for C is generated from `src/c_door`; `layout.rs` says how it is written anew.
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

mod record;

use std::collections::BTreeMap;
use std::path::Path;

use cbindgen::{Builder, Config, DocumentationStyle, Language, Style};
use plugin_api::c_door::abi::NODE_PLUGIN_MAGIC;

/// C of one file, without what stands around it.
fn generated(file: &str) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/c_door")
        .join(file);
    // Types that no exported function uses are left out unless they are named.
    let text = std::fs::read_to_string(&source).unwrap();
    let names = text
        .lines()
        .filter_map(|line| line.strip_prefix("pub struct "));
    let names = names.map(|line| line.trim_end_matches(['{', ' ']).to_owned());
    let mut config = Config {
        language: Language::C,
        style: Style::Both,
        no_includes: true,
        documentation_style: DocumentationStyle::C99,
        line_length: 110,
        usize_is_size_t: true,
        ..Config::default()
    };
    config.export.include = names.collect();
    if file == "abi.rs" {
        config.export.exclude = vec!["DLManagedTensorVersioned".to_owned()];
    }
    let mut header = Vec::new();
    let bindings = Builder::new()
        .with_config(config)
        .with_src(&source)
        .generate();
    bindings.unwrap().write(&mut header);
    String::from_utf8(header).unwrap().trim().to_owned()
}

/// The rules at the head of the source.
fn rules() -> String {
    let text = include_str!("../src/c_door/abi.rs").lines();
    let lines = text.map_while(|line| line.strip_prefix("//!"));
    lines.map(|line| format!("//{line}\n")).collect()
}

#[test]
fn recorded_header_for_c() {
    let header = format!(
        "// Plugins of graph nodes, in C. Generated from plugin-api/src/c_door.\n//\n{}\n\
         #ifndef NODE_PLUGIN_H\n#define NODE_PLUGIN_H\n\n\
         #include <stddef.h>\n#include <stdint.h>\n\n\
         #ifdef __cplusplus\nextern \"C\" {{\n#endif\n\n\
         // DLPack's own header may stand before this one.\n\
         #ifndef DLPACK_DLPACK_H_\n{}\n#endif\n\n{}\n\n\
         // What stands first in every table.\n#define NODE_PLUGIN_MAGIC \"{NODE_PLUGIN_MAGIC}\"\n\n\
         // The one function that a library exports. Any thread, at any time; returns the same table at every call.\n\
         const NodePluginTable *node_plugin(void);\n\n\
         #ifdef __cplusplus\n}}\n#endif\n\n#endif\n",
        rules(),
        generated("dlpack.rs"),
        generated("abi.rs"),
    );
    record::compare("include/node_plugin.h", &header);
}

/// The members of every struct and enum of a header and the constants beside them, by name, without comments.
fn declarations(header: &str) -> BTreeMap<String, Vec<String>> {
    let code = header.lines().map(|line| line.split("//").next().unwrap());
    let code = code.map(str::trim).filter(|line| !line.is_empty());
    let code = code.collect::<Vec<_>>().join("\n");
    let mut found = BTreeMap::new();
    let constants = code
        .lines()
        .filter_map(|line| line.strip_prefix("#define "));
    let constants = constants.filter_map(|line| line.split_once(' '));
    found.extend(constants.map(|(name, value)| (name.to_owned(), vec![value.to_owned()])));
    for part in code.split("typedef struct ").skip(1) {
        let Some((name, rest)) = part.split_once(" {") else {
            continue;
        };
        let (members, _) = rest.split_once(&format!("}} {name};")).unwrap();
        let members = members.split(';').map(|member| {
            let words: Vec<_> = member.split_whitespace().collect();
            words.join(" ")
        });
        let members = members.filter(|member| !member.is_empty());
        found.insert(name.to_owned(), members.collect());
    }
    found
}

/// What was compiled with the header of 1.0 works with what is compiled with this one.
#[test]
fn the_header_has_all_of_1_0_and_grows_at_the_ends_of_structs_that_say_their_size() {
    let old = declarations(include_str!("../../tests/contracts/node_plugin-1.0.h"));
    let new = declarations(include_str!("../include/node_plugin.h"));
    assert_eq!(old["NodePluginTable"].len(), 15, "{old:#?}");
    assert!(old.len() > 30, "{old:#?}");
    for (name, members) in &old {
        if name == "NODE_PLUGIN_MINOR" {
            continue;
        }
        let now = &new[name];
        if name == "NodePluginTable" || members[0] == "uint32_t struct_size" {
            assert!(now.starts_with(members), "{name}: {now:#?}");
        } else {
            assert_eq!(now, members, "{name}");
        }
    }
}
