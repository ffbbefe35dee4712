//! A plugin of one node, built against any of the contracts.

/// The table for hosts in other languages with `N` functions, of which version 1.0 has 8. Hosts in Rust read its head alone.
#[derive(Debug)]
#[repr(C)]
pub struct Table<const N: usize> {
    magic: [u8; 16],
    struct_size: u32,
    major: u32,
    minor: u32,
    reserved: u32,
    name: [u8; 64],
    version: [u8; 32],
    functions: [extern "C" fn(); N],
}

extern "C" fn not_called() {
    std::process::abort();
}

/// The table of a plugin that is called `name`.
#[must_use]
pub const fn table<const N: usize>(minor: u32, name: &str) -> Table<N> {
    Table {
        magic: *b"NODEPLUGINTABLE\0",
        struct_size: size_of::<Table<N>>() as u32,
        major: 1,
        minor,
        reserved: 0,
        name: padded(name),
        version: padded("0.1.0"),
        functions: [not_called; N],
    }
}

const fn padded<const N: usize>(text: &str) -> [u8; N] {
    let (mut out, mut i) = ([0; N], 0);
    while i < text.len() {
        out[i] = text.as_bytes()[i];
        i += 1;
    }
    out
}

/// Exports a plugin of the one node `Same`, which returns what it is given, with the types of the module `contract`. In
/// braces what its root module and its node have more than those of 1.0.
#[macro_export]
macro_rules! plugin {
    (
        contract: $contract:ident, name: $name:literal, minor: $minor:literal, functions_in_c: $n:literal,
        module: {$($field:ident: $function:expr),*}, node: {$($method:item)*}
    ) => {
        use $crate::abi_stable::export_root_module;
        use $crate::abi_stable::prefix_type::PrefixTypeTrait as _;
        use $crate::abi_stable::std_types::{RErr, ROk, RNone, ROption, RResult, RStr, RString, RVec, Tuple2};
        use $crate::abi_stable::type_level::downcasting::TD_Opaque;
        use $crate::$contract::*;

        static TABLE: $crate::Table<$n> = $crate::table($minor, $name);

        /// For all hosts.
        #[expect(unsafe_code, reason = "it is found by its symbol name")]
        #[unsafe(no_mangle)]
        pub extern "C" fn node_plugin() -> *const $crate::Table<$n> {
            &raw const TABLE
        }

        /// For hosts in Rust.
        #[export_root_module]
        pub fn root_module() -> PluginModule_Ref {
            PluginModule { describe, create_node, extension, $($field: $function),* }.leak_into_prefix()
        }

        extern "C" fn describe() -> RResult<RString, NodeError> {
            ROk(RString::from(concat!(
                r#"{"name": ""#, $name, r#"", "version": "0.1.0", "nodes": [{"class": "Same", "display_name": "Same",
                "category": "tests", "description": "Hands its input on", "widgets": [],
                "inputs": [{"name": "images", "port": "IMAGE", "tooltip": "What is handed on"}],
                "outputs": [{"name": "images", "port": "IMAGE", "tooltip": "The very same"}]}]}"#
            )))
        }

        extern "C" fn create_node(class: RStr<'_>) -> RResult<NodeBox, NodeError> {
            match class.as_str() {
                "Same" => ROk(NodeObject_TO::from_value(Same::default(), TD_Opaque)),
                other => RErr(invalid("", format!("there is no class {other}"))),
            }
        }

        extern "C" fn extension(_: RStr<'_>) -> ROption<ExtensionBox> {
            RNone
        }

        fn invalid(input: &str, message: String) -> NodeError {
            NodeError { code: 1, message: message.into(), input: input.into() }
        }

        #[derive(Default)]
        struct Same {
            n_runs: u64,
        }

        impl NodeObject for Same {
            fn validate(&self, _: RStr<'_>) -> RResult<(), NodeError> {
                ROk(())
            }

            fn fingerprint(&self, _: RStr<'_>) -> RResult<RString, NodeError> {
                ROk(RString::new())
            }

            fn run(&mut self, request: RunRequest, host: HostBox) -> RResult<RVec<Value>, NodeError> {
                self.n_runs += 1;
                host.metric("runs".into(), 0.0, self.n_runs as f64);
                let mut inputs = request.inputs.into_iter();
                match inputs.find(|Tuple2(name, _)| name == "images") {
                    Some(Tuple2(_, images)) => ROk(vec![images].into()),
                    None => RErr(invalid("images", "nothing is linked to the input images".to_owned())),
                }
            }

            fn extension(&self, _: RStr<'_>) -> ROption<ExtensionBox> {
                RNone
            }

            $($method)*
        }
    };
}
