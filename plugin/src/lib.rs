//! Conceptloom as a dynamic library: adapters from graph nodes to the method.
//!
//! | file | what it adapts |
//! | --- | --- |
//! | `device` | which device computes, and what hosts are told about it |
//! | `session` | the model that is in use |
//! | `ports` | sockets of its own, and what comes in through those for pictures |
//! | `values` | the plugin's own values on wires: model, concepts |
//! | `scene_input` | pictures and a list of concepts to a scene of the method |
//! | `observer` | events of the method to progress, previews and curves of the host |
//! | `failure` | errors of the crates to errors with a code |
//! | `nodes` | one file per node: ports and parameters in, one function call, ports out |
//!
//! No equation, no layer, no file format is in here.

mod device;
mod failure;
mod nodes;
mod observer;
mod ports;
mod scene_input;
mod session;
mod values;

/// Tensors, and what the kernels work in.
#[global_allocator]
static HEAP: machine_memory::Heap = machine_memory::Heap;

plugin_api::export_plugin! {
    name: "conceptloom",
    nodes: [
        nodes::LoadDiffusionModel,
        nodes::ConceptTokenLearner,
        nodes::AttentionMaskExtractor,
        nodes::DenseCrfRefine,
        nodes::EmLoop,
        nodes::PersonalizedSampler,
        nodes::SaveConcepts,
        nodes::LoadConcepts,
        nodes::LoadTunedModel,
    ],
    devices: device::described,
}
