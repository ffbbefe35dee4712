//! A plugin for tests of hosts: every node has one habit.
//!
//! | node | habit |
//! | --- | --- |
//! | `Slow` | counts slowly; shows progress, previews and curves; stops when asked and goes on later |
//! | `Passthrough` | hands its input on, the very same memory, and says where that is |
//! | `Relay` | hands its input on and says nothing |
//! | `Number` | gives a number to a widget |
//! | `Counted` | gives an object and says how many are alive; can lose one |
//! | `Hungry` | memory runs out while other objects live |
//! | `Fail` | fails with a code of one's choice |
//! | `Lie` | returns what it did not promise |
//! | `Scribble` | writes to its input |
//! | `Panic` | panics |
//! | `PanicAnywhere` | panics wherever a test wants it to, in all that a plugin has |
//! | `Hazard` | has one of many bad habits, of which crashes are some |

mod counted;
mod hazard;
mod honest;
mod misbehaving;
mod panicking;

use plugin_api::{DeviceDescriptor, ErrorCode, NodeError};

/// What a test wants hosts to be told: devices as JSON; a panic; or any other text, as an error.
fn devices() -> Result<Vec<DeviceDescriptor>, NodeError> {
    let wanted = std::env::var("FAULTY_DEVICES").unwrap_or_else(|_| "[]".to_owned());
    assert!(wanted != "panic", "no card in slot 3");
    serde_json::from_str(&wanted).map_err(|_| NodeError::new(ErrorCode::InvalidInput, wanted))
}

plugin_api::export_plugin! {
    name: "faulty-plugin",
    nodes: [
        honest::Slow,
        honest::Passthrough,
        honest::Relay,
        honest::Number,
        counted::Counted,
        counted::Hungry,
        misbehaving::Fail,
        misbehaving::Lie,
        misbehaving::Scribble,
        misbehaving::Panic,
        panicking::PanicAnywhere,
        hazard::Hazard,
    ],
    devices: devices,
    extensions: [
        "faulty-plugin.echo/1" => panicking::echo,
        "faulty-plugin.panic-in/1" => panicking::set_place,
    ],
}
