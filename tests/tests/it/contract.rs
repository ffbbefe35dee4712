//! A library through the contract alone, without the host program.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use abi_stable::library::lib_header_from_path;
use abi_stable::std_types::{RString, Tuple2};
use plugin_api::node::{NodeBox, RunRequest};
use plugin_api::{
    ErrorCode, Host, HostContext, NodeError, PluginDescriptor, PluginModule_Ref, Preview, Progress,
    RunInfo, SharedTensor, Value,
};

use crate::support;

/// The library counts its objects in one place.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn module() -> PluginModule_Ref {
    lib_header_from_path(&support::faulty())
        .unwrap()
        .init_root_module()
        .unwrap()
}

fn create(class: &str) -> NodeBox {
    module().create_node()(class.into()).into_result().unwrap()
}

/// Remembers metrics.
#[derive(Default, Clone)]
struct Listener(Arc<Mutex<Vec<f64>>>);

impl HostContext for Listener {
    fn is_canceled(&self) -> bool {
        false
    }
    fn progress(&self, _: Progress) {}
    fn preview(&self, _: Preview) {}
    fn metric(&self, _: RString, _: f64, y: f64) {
        self.0.lock().unwrap().push(y);
    }
    fn log(&self, _: u32, _: RString) {}
    fn saved(&self, _: RString) {}
    fn run_info(&self) -> RunInfo {
        RunInfo {
            node_id: "1".into(),
            output_dir: "".into(),
            work_dir: "".into(),
            workflow: "".into(),
            prompt: "".into(),
        }
    }
}

fn run(
    node: &mut NodeBox,
    inputs: &[(&str, &Value)],
    parameters: &str,
) -> Result<Vec<Value>, NodeError> {
    let inputs = inputs
        .iter()
        .map(|(name, value)| Tuple2(RString::from(*name), (*value).clone()))
        .collect();
    let request = RunRequest {
        inputs,
        parameters: parameters.into(),
    };
    node.run(request, Host::from_context(Listener::default()))
        .into_result()
        .map(Into::into)
}

fn picture(n: usize) -> (Value, u64) {
    let values: Vec<f32> = (0..n * 12).map(|i| i as f32 / 100.0).collect();
    let tensor = SharedTensor::from_vec(values, &[n, 2, 2, 3]).unwrap();
    let address = tensor.data_address();
    (Value::Tensor(tensor), address)
}

#[test]
fn the_description_can_be_read_without_a_node() {
    let described: PluginDescriptor = serde_json::from_str(&module().describe()()).unwrap();
    let classes: Vec<_> = described
        .nodes
        .iter()
        .map(|node| node.class.as_str())
        .collect();
    assert_eq!(
        classes,
        [
            "Slow",
            "Passthrough",
            "Number",
            "Counted",
            "Hungry",
            "Fail",
            "Lie",
            "Panic"
        ]
    );
}

#[test]
fn a_tensor_passes_through_two_nodes_in_the_very_same_memory() {
    let (value, address) = picture(1000);
    let first = run(&mut create("Passthrough"), &[("images", &value)], "{}")
        .unwrap()
        .remove(0);
    let second = run(&mut create("Passthrough"), &[("images", &first)], "{}")
        .unwrap()
        .remove(0);
    drop((value, first));
    // The last handle keeps the memory alive, and it is what it was.
    let Value::Tensor(tensor) = second else {
        panic!("no tensor")
    };
    assert_eq!(tensor.data_address(), address);
    let expected: Vec<f32> = (0..12_000).map(|i| i as f32 / 100.0).collect();
    assert_eq!(tensor.as_f32().unwrap(), expected);
}

#[test]
fn objects_live_as_long_as_somebody_holds_them() {
    let _guard = one_at_a_time();
    let alive = || -> usize {
        let outputs = run(&mut create("Counted"), &[], "{}").unwrap();
        let Value::Json(text) = &outputs[1] else {
            panic!("no number")
        };
        text.parse().unwrap()
    };
    let before = alive();
    let object = run(&mut create("Counted"), &[], "{}").unwrap().remove(0);
    let other = object.clone();
    assert_eq!(alive(), before + 1);
    drop(object);
    assert_eq!(alive(), before + 1);
    let next = run(&mut create("Counted"), &[("other", &other)], "{}").unwrap();
    drop((other, next));
    assert_eq!(alive(), before);
    for _ in 0..100 {
        let _node = create("Counted");
    }
    assert_eq!(alive(), before);
    // What the counter is for: an object that is lost shows.
    drop(run(&mut create("Counted"), &[], r#"{"leak": true}"#).unwrap());
    assert_eq!(alive(), before + 1);
}

#[test]
fn a_panic_is_an_error_and_the_process_lives_on() {
    let error = run(&mut create("Panic"), &[], "{}").unwrap_err();
    assert_eq!(error.error_code(), ErrorCode::Panicked);
    assert!(error.message.contains("index 3 out of nothing"), "{error}");
    assert!(run(&mut create("Number"), &[], "{}").is_ok());
}

#[test]
fn wrong_calls_are_errors() {
    let (value, _) = picture(1);
    let number = Value::Json("7".into());
    let code = |result: Result<Vec<Value>, NodeError>| result.unwrap_err().error_code();
    assert_eq!(
        code(run(&mut create("Passthrough"), &[], "{}")),
        ErrorCode::InvalidInput
    );
    assert_eq!(
        code(run(
            &mut create("Passthrough"),
            &[("images", &number)],
            "{}"
        )),
        ErrorCode::InvalidInput
    );
    assert_eq!(
        code(run(&mut create("Counted"), &[("other", &value)], "{}")),
        ErrorCode::InvalidInput
    );
    assert_eq!(
        code(run(&mut create("Number"), &[], "[")),
        ErrorCode::InvalidInput
    );
    assert_eq!(
        code(run(&mut create("Number"), &[], r#"{"value": -1}"#)),
        ErrorCode::InvalidInput
    );
    assert!(
        module().create_node()("Nonsense".into())
            .into_result()
            .is_err()
    );
}
