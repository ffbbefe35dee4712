//! Inputs for nodes that nobody wired: pictures, masks and maps are drawn, a plugin's own values come from its other nodes.

use std::collections::BTreeMap;

use plugin_api::{NodeDescriptor, TensorError, Value, WidgetKind};
use serde_json::{Map, Value as Json};

use super::listener::Behavior;
use super::memory::{self, Held};
use super::subject::Subject;

/// Width and height of drawn pictures.
const SIDE: usize = 64;
/// Masks and maps on one wire.
const PLANES: usize = 2;

/// Inputs by socket.
pub(crate) type Inputs = BTreeMap<String, Value>;

/// Where drawn tensors live.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// Memory whose only holder may write it.
    Heap,
    /// Pages that cannot be written.
    WriteProtected,
}

/// The shape of what a socket takes; `None` for sockets whose values cannot be drawn.
pub(crate) fn shape(port: &str) -> Option<Vec<usize>> {
    match port {
        picture_ports::IMAGE => Some(vec![1, SIDE, SIDE, 3]),
        picture_ports::MASK | picture_ports::ATTENTION_MAPS => Some(vec![PLANES, SIDE, SIDE]),
        _ => None,
    }
}

/// A disc on a ramp as a picture, the disc and its outside as masks, a hill and a valley as maps.
fn values(port: &str) -> Vec<f32> {
    let pixels = (0..SIDE * SIDE).map(|i| {
        let (x, y) = ((i % SIDE) as f32, (i / SIDE) as f32);
        let middle = SIDE as f32 / 2.0;
        let distance = (x - middle).hypot(y - middle) / middle;
        (x / SIDE as f32, distance)
    });
    let inside = |distance: f32| f32::from(u8::from(distance < 0.5));
    let hill = |distance: f32| (-distance * distance).exp();
    match port {
        picture_ports::IMAGE => pixels
            .flat_map(|(ramp, distance)| [ramp, 0.8 * inside(distance), 0.5])
            .collect(),
        picture_ports::MASK => {
            let disc: Vec<f32> = pixels.map(|(_, distance)| inside(distance)).collect();
            let outside = disc.iter().map(|value| 1.0 - value);
            disc.iter().copied().chain(outside).collect()
        }
        _ => {
            let first: Vec<f32> = pixels.map(|(_, distance)| hill(distance)).collect();
            let second = first.iter().map(|value| 1.0 - value);
            first.iter().copied().chain(second).collect()
        }
    }
}

/// A drawn value; `None` for sockets whose values cannot be drawn.
fn drawn(port: &str, place: Place, held: &Held) -> Option<Result<Value, TensorError>> {
    let json = |text: &str| Some(Ok(Value::Json(text.into())));
    match port {
        "INT" => return json("1"),
        "FLOAT" => return json("0.5"),
        "STRING" => return json("\"text\""),
        "BOOLEAN" => return json("true"),
        _ => {}
    }
    let shape = shape(port)?;
    let values = values(port);
    let tensor = match place {
        Place::Heap => memory::counted(&values, &shape, held),
        Place::WriteProtected => memory::write_protected(&values, &shape, held),
    };
    Some(tensor.map(Value::Tensor))
}

/// Parameters with every number of steps at its least: what is checked of a run does not need a long one.
pub(crate) fn quick_parameters(descriptor: &NodeDescriptor) -> Map<String, Json> {
    let value = |kind: &WidgetKind| match kind {
        WidgetKind::Integer {
            min, seed: false, ..
        } => Some(Json::from(*min)),
        _ => None,
    };
    let widgets = descriptor.widgets.iter();
    widgets
        .map(|widget| {
            let value = value(&widget.kind).unwrap_or_else(|| widget.default_value());
            (widget.name.clone(), value)
        })
        .collect()
}

/// Makes inputs; remembers what other nodes gave.
#[derive(Default)]
pub(crate) struct Feeder {
    made: BTreeMap<String, Value>,
    /// Classes that are being run for their outputs.
    running: Vec<String>,
}

impl Feeder {
    /// Inputs for a node: for its required sockets, or for all that there are values for.
    ///
    /// # Errors
    /// Why there is no value for a required socket, in words.
    pub(crate) fn inputs(
        &mut self,
        subject: &Subject<'_>,
        node: &NodeDescriptor,
        with_optional: bool,
        place: Place,
        held: &Held,
    ) -> Result<Inputs, String> {
        let mut inputs = Inputs::new();
        let sockets = node.inputs.iter();
        for socket in sockets.filter(|socket| with_optional || !socket.optional) {
            match self.value(subject, &socket.port, place, held) {
                Ok(value) => {
                    inputs.insert(socket.name.clone(), value);
                }
                Err(_) if socket.optional => {}
                Err(why) => {
                    return Err(format!("nothing can be given to {}: {why}", socket.name));
                }
            }
        }
        Ok(inputs)
    }

    fn value(
        &mut self,
        subject: &Subject<'_>,
        port: &str,
        place: Place,
        held: &Held,
    ) -> Result<Value, String> {
        if let Some(value) = drawn(port, place, held) {
            return value.map_err(|error| error.to_string());
        }
        if let Some(value) = self.made.get(port) {
            return Ok(value.clone());
        }
        let mut why = format!("no node of the plugin gives a {port} on generated inputs");
        // Those that need least come first.
        let gives = |node: &&NodeDescriptor| node.outputs.iter().any(|output| output.port == port);
        let mut sources: Vec<_> = subject.plugin.nodes.iter().filter(gives).collect();
        sources.sort_by_key(|node| node.inputs.iter().filter(|input| !input.optional).count());
        for source in sources {
            if self.running.contains(&source.class) {
                continue;
            }
            self.running.push(source.class.clone());
            let outputs = self.outputs_of(subject, source);
            self.running.pop();
            match outputs {
                Ok(value) => {
                    for (socket, value) in source.outputs.iter().zip(value) {
                        self.made.entry(socket.port.clone()).or_insert(value);
                    }
                    if let Some(value) = self.made.get(port) {
                        return Ok(value.clone());
                    }
                }
                Err(reason) => why = format!("{} gives none: {reason}", source.class),
            }
        }
        Err(why)
    }

    fn outputs_of(
        &mut self,
        subject: &Subject<'_>,
        source: &NodeDescriptor,
    ) -> Result<Vec<Value>, String> {
        let inputs = self.inputs(subject, source, false, Place::Heap, &Held::default())?;
        subject
            .trail
            .at(&format!("ran {} for its outputs", source.class));
        let mut node = subject
            .exports
            .create(&source.class)
            .map_err(|error| error.to_string())?;
        let parameters = quick_parameters(source);
        let ran = subject.run(&mut node, inputs, &parameters, Behavior::Patient);
        ran.result.map_err(|error| error.to_string())
    }
}
