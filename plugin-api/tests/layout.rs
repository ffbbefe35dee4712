//! Every type that crosses the boundary, as version 1.0 froze it.
//!
//! `layout-1.0.txt` is written from `abi_stable`'s own layouts, which hosts compare when they load a library. It holds the
//! types that the root module reaches, with their fields, and the tables of functions of the traits. Written anew by
//!
//! ```sh
//! CONTRACT_RECORD=1 cargo test --workspace --release --locked -- recorded_
//! ```
//! After the release of 1.0 it stays as it is. The types of the crate `contracts`, which nobody changes with those here, are
//! compared with it too, and both with each other by the rules that a host compares by.
#![expect(
    clippy::unwrap_used,
    reason = "what cannot be unwrapped fails the test"
)]

mod record;

use std::collections::VecDeque;
use std::fmt::Write as _;

use contracts::{another_layout, appended, v1_0};
use plugin_api::PluginModule_Ref;
use plugin_api::abi_stable::StableAbi;
use plugin_api::abi_stable::abi_stability::check_layout_compatibility;
use plugin_api::abi_stable::std_types::UTypeId;
use plugin_api::abi_stable::type_layout::{TLData, TLField, TLFields, TypeLayout};

/// Types in the order in which they are met.
#[derive(Default)]
struct Walk {
    seen: Vec<UTypeId>,
    waiting: VecDeque<&'static TypeLayout>,
}

impl Walk {
    /// The type's name, with a number: names do not say what a generic type is of. It is described later.
    fn meet(&mut self, layout: &'static TypeLayout) -> String {
        let id = layout.get_utypeid();
        let known = self.seen.iter().position(|seen| *seen == id);
        let number = known.unwrap_or_else(|| {
            self.seen.push(id);
            self.waiting.push_back(layout);
            self.seen.len() - 1
        });
        let full = layout.full_type().to_string();
        match layout.data() {
            TLData::Primitive(_) => full.trim_end().to_owned(),
            _ => format!("{} [{number}]", full.trim_end()),
        }
    }

    /// A field, with the functions in its type.
    fn field(&mut self, text: &mut String, field: &TLField, offset: Option<usize>) {
        let place = offset.map_or_else(String::new, |offset| format!("{offset:>4} "));
        let type_name = self.meet(field.layout());
        write!(text, "    {place}{}: {type_name}", field.name()).unwrap();
        for function in field.function_range().iter() {
            let names = function.param_names.as_str().split(',');
            let types = function.param_type_layouts.iter();
            let parameters: Vec<String> = names
                .zip(types)
                .map(|(name, layout)| format!("{}: {}", name.trim(), self.meet(layout())))
                .collect();
            let returned = function
                .return_type_layout()
                .map_or_else(|| "()".to_owned(), |layout| self.meet(layout()));
            write!(text, " fn({}) -> {returned}", parameters.join(", ")).unwrap();
        }
        text.push('\n');
    }

    /// Fields of a `repr(C)` struct from its start on; where they end.
    fn fields(&mut self, text: &mut String, fields: &[TLField]) -> usize {
        let mut end = 0usize;
        for field in fields {
            let offset = end.next_multiple_of(field.layout().alignment());
            self.field(text, field, Some(offset));
            end = offset + field.layout().size();
        }
        end
    }

    fn describe(&mut self, layout: &'static TypeLayout) -> String {
        let (size, alignment) = (layout.size(), layout.alignment());
        let list = |fields: TLFields| fields.iter().collect::<Vec<_>>();
        let name = self.meet(layout);
        let mut text = format!("{name}: {size} bytes, alignment {alignment}, ");
        match layout.data() {
            TLData::Primitive(primitive) => writeln!(text, "primitive {primitive:?}").unwrap(),
            TLData::Opaque => text.push_str("opaque\n"),
            TLData::Struct { fields } if fields.iter().len() == 0 => text.push_str("a pointer\n"),
            TLData::Struct { fields } => {
                text.push_str("struct\n");
                let end = self.fields(&mut text, &list(fields));
                assert_eq!(end.next_multiple_of(alignment), size, "offsets of {name}");
            }
            TLData::Union { fields } => {
                text.push_str("union\n");
                for field in fields.iter() {
                    self.field(&mut text, &field, Some(0));
                }
            }
            TLData::Enum(variants) => {
                writeln!(text, "enum, {:?}", layout.repr_attr()).unwrap();
                let fields = list(variants.fields);
                let mut fields = fields.as_slice();
                let names = variants.variant_names_iter();
                for (name, n) in names.zip(variants.field_count.iter()) {
                    writeln!(text, "  {name}").unwrap();
                    let (own, rest) = fields.split_at(usize::from(*n));
                    for field in own {
                        self.field(&mut text, field, None);
                    }
                    fields = rest;
                }
            }
            TLData::PrefixType(table) => {
                let n = table.first_suffix_field;
                writeln!(text, "table, the first {n} fields are in every version").unwrap();
                self.fields(&mut text, &list(table.fields));
            }
        }
        for field in layout.phantom_fields().iter() {
            self.field(&mut text, &field, None);
        }
        text
    }
}

/// All types that a root module reaches.
fn described(module: &'static TypeLayout) -> String {
    let mut walk = Walk::default();
    walk.meet(module);
    let mut text = String::from(
        "The types that cross between plugins and hosts in Rust, on 64-bit machines.\n\
         Written by the test recorded_layout: fields with their offsets, functions with their types.\n",
    );
    while let Some(layout) = walk.waiting.pop_front() {
        text.push('\n');
        text.push_str(&walk.describe(layout));
    }
    text
}

#[test]
fn recorded_layout() {
    let text = described(PluginModule_Ref::LAYOUT);
    record::compare("layout-1.0.txt", &text);
    for expected in [
        "PluginModule",
        "SharedTensor",
        "TensorOwnerObject",
        "HostObject",
        "RunRequest",
    ] {
        assert!(text.contains(expected), "{expected} is reached");
    }
}

#[test]
fn the_copy_of_1_0_is_what_was_recorded() {
    let recorded = include_str!("../layout-1.0.txt");
    assert!(described(v1_0::PluginModule_Ref::LAYOUT) == recorded);
    assert!(described(appended::PluginModule_Ref::LAYOUT) != recorded);
}

#[test]
fn hosts_and_plugins_of_1_0_and_of_this_version_fit() {
    let (this, old) = (PluginModule_Ref::LAYOUT, v1_0::PluginModule_Ref::LAYOUT);
    for (host, plugin) in [(this, old), (old, this)] {
        check_layout_compatibility(host, plugin).unwrap();
    }
}

/// Why nothing is appended to a table of functions.
#[test]
fn a_host_refuses_a_plugin_that_has_less_than_it_knows() {
    let (this, appended) = (PluginModule_Ref::LAYOUT, appended::PluginModule_Ref::LAYOUT);
    check_layout_compatibility(this, appended).unwrap();
    assert!(check_layout_compatibility(appended, this).is_err());
}

#[test]
fn fields_that_changed_places_are_told() {
    let (this, changed) = (
        PluginModule_Ref::LAYOUT,
        another_layout::PluginModule_Ref::LAYOUT,
    );
    for (host, plugin) in [(this, changed), (changed, this)] {
        let why = check_layout_compatibility(host, plugin).unwrap_err();
        assert!(why.to_string().contains("RunRequest"), "{why}");
    }
}
