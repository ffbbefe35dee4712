//! A node as its author writes it.

use std::any::type_name;

use abi_stable::StableAbi;
use abi_stable::std_types::{RString, RVec, Tuple2};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;

use crate::extension::Extension;
use crate::object::Opaque;
use crate::{ErrorCode, Host, NodeDescriptor, NodeError, SharedObject, SharedTensor};

/// What a wire carries.
#[repr(u8)]
#[derive(StableAbi, Debug, Clone)]
pub enum Value {
    /// A tensor.
    Tensor(SharedTensor),
    /// A value of a plugin's own type.
    Object(SharedObject),
    /// A number, text or switch, as JSON.
    Json(RString),
}

/// The values on a node's sockets.
#[derive(Debug, Default)]
pub struct Inputs(RVec<Tuple2<RString, Value>>);

impl Inputs {
    /// Values by socket name; of two with one name the last counts.
    #[must_use]
    pub fn new(values: impl IntoIterator<Item = (String, Value)>) -> Self {
        let named = |(name, value): (String, Value)| Tuple2(name.into(), value);
        Self(values.into_iter().map(named).collect())
    }

    /// As they came.
    pub(crate) fn of_request(inputs: RVec<Tuple2<RString, Value>>) -> Self {
        Self(inputs)
    }

    pub(crate) fn into_request(self) -> RVec<Tuple2<RString, Value>> {
        self.0
    }

    fn get(&self, name: &str) -> Option<&Value> {
        let mut named = self.0.iter().rev().filter(|Tuple2(of, _)| of == name);
        named.next().map(|Tuple2(_, value)| value)
    }

    /// The tensor on a socket.
    ///
    /// # Errors
    /// Nothing is linked, or it is no tensor.
    pub fn tensor(&self, name: &str) -> Result<&SharedTensor, NodeError> {
        self.optional_tensor(name)?.ok_or_else(|| missing(name))
    }

    /// The tensor on an optional socket.
    ///
    /// # Errors
    /// It is no tensor.
    pub fn optional_tensor(&self, name: &str) -> Result<Option<&SharedTensor>, NodeError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Tensor(tensor)) => Ok(Some(tensor)),
            Some(other) => Err(NodeError::invalid_input(
                name,
                format!("the input {name} takes a tensor, got {other:?}"),
            )),
        }
    }

    /// The tensor on a socket, which is then no longer among the inputs: [`SharedTensor::make_unique`] copies nothing if
    /// nobody else holds it.
    ///
    /// # Errors
    /// Nothing is linked, or it is no tensor.
    pub fn take_tensor(&mut self, name: &str) -> Result<SharedTensor, NodeError> {
        let tensor = self.tensor(name)?.clone();
        self.0.retain(|Tuple2(of, _)| of != name);
        Ok(tensor)
    }

    /// The plugin's own value on a socket.
    ///
    /// # Errors
    /// Nothing is linked, or it is not a `T` of this very library.
    pub fn object<T: Opaque>(&self, name: &str) -> Result<&T, NodeError> {
        self.optional_object(name)?.ok_or_else(|| missing(name))
    }

    /// The plugin's own value on an optional socket.
    ///
    /// # Errors
    /// It is not a `T` of this very library.
    pub fn optional_object<T: Opaque>(&self, name: &str) -> Result<Option<&T>, NodeError> {
        match self.get(name) {
            None => Ok(None),
            Some(Value::Object(object)) => object.get::<T>().map(Some).ok_or_else(|| {
                NodeError::invalid_input(
                    name,
                    format!(
                        "the input {name} was made by another plugin or build, or by this one for a host that speaks \
                         another language to it: {}",
                        object.summary()
                    ),
                )
            }),
            Some(_) => Err(NodeError::invalid_input(
                name,
                format!("the input {name} takes a {}", type_name::<T>()),
            )),
        }
    }
}

fn missing(name: &str) -> NodeError {
    NodeError::invalid_input(name, format!("nothing is linked to the input {name}"))
}

/// The values that a node returns, in the order of its descriptor.
pub type Outputs = Vec<Value>;

/// What an author implements; everything else is made from it.
///
/// A node is made by `Default` on any thread: at once, without a device, a file or much memory. It may then move between
/// threads, but only one of its methods runs at a time; other nodes, of the same class too, may run meanwhile. It is dropped
/// on any thread. A panic in any of this, or in its destructor, stays inside and becomes an error; a node whose `run` panicked
/// is only dropped.
pub trait Node: Send + Default + 'static {
    /// The parameters: every field needs a default (`#[serde(default = …)]`), a doc comment and, if a number, bounds
    /// (`#[schemars(range(min = …, max = …))]`).
    type Parameters: DeserializeOwned + JsonSchema;

    /// What the node is, the same at every call. Any thread, several at once, before any node exists; in milliseconds,
    /// without a device or a file.
    fn descriptor() -> NodeDescriptor;

    /// Checks what the descriptor cannot say, for example that a file exists. At any time before a run; changes nothing,
    /// computes nothing, takes less than a second. It need not be called before a run.
    ///
    /// # Errors
    /// The first problem.
    fn validate(&self, _parameters: &Self::Parameters) -> Result<(), NodeError> {
        Ok(())
    }

    /// Text that changes when the result would change although inputs and parameters are the same, for example the state
    /// of a file that a parameter names. At any time; changes nothing and takes less than a second. A host does not run a
    /// node again while it is the same.
    fn fingerprint(&self, _parameters: &Self::Parameters) -> String {
        String::new()
    }

    /// Does the work, for as long as it takes and with the memory that it takes; memory that runs out is
    /// [`ErrorCode::OutOfMemory`]. It may be called again with other inputs, also after an error. It asks
    /// [`Host::is_canceled`] as described there. Threads that it starts are joined before it returns.
    ///
    /// # Errors
    /// [`NodeError`] with a code, one sentence and the input it is about; [`NodeError::canceled`] where the host asked it to
    /// stop.
    fn run(
        &mut self,
        inputs: &mut Inputs,
        parameters: Self::Parameters,
        host: &Host,
    ) -> Result<Outputs, NodeError>;

    /// The extension of this id ([`crate::extension`]). An id that is not known, byte by byte, is `None`. At any time; at once.
    fn extension(&self, _id: &str) -> Option<Box<dyn Extension>> {
        None
    }
}

/// The parameters of a node of this description.
///
/// # Errors
/// No JSON object, or the first parameter that does not fit.
pub(crate) fn parse<P: DeserializeOwned>(
    descriptor: &NodeDescriptor,
    parameters: &str,
) -> Result<P, NodeError> {
    let invalid = |text: String| NodeError::new(ErrorCode::InvalidInput, text);
    let given: serde_json::Map<String, serde_json::Value> = serde_json::from_str(parameters)
        .map_err(|error| {
            invalid(format!(
                "the parameters of {} are no JSON object: {error}",
                descriptor.class
            ))
        })?;
    if let Some(problem) = descriptor.check_parameters(&given).into_iter().next() {
        return Err(NodeError::invalid_input(
            &problem.parameter,
            problem.message,
        ));
    }
    serde_json::from_value(descriptor.completed_parameters(&given).into()).map_err(|error| {
        invalid(format!(
            "the parameters of {} cannot be read: {error}",
            descriptor.class
        ))
    })
}
