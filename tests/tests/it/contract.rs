//! A library through the contract alone, without the host program, through both of its doors.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use plugin_api::extension::DEVICES;
use plugin_api::{
    DeviceId, ErrorCode, Extension, HostContext, LoadedNode, LoadedPlugin, NodeError, Preview,
    Progress, RunInfo, SharedTensor, Value,
};

use crate::{doors, support};

/// The library counts its objects in one place.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

fn plugin() -> LoadedPlugin {
    doors::rust(&support::faulty())
}

fn both() -> [LoadedPlugin; 2] {
    [plugin(), doors::c(&support::faulty())]
}

fn create(class: &str) -> LoadedNode {
    plugin().create(class).unwrap()
}

/// Remembers what it hears; panics over one service if it is told to.
#[derive(Default, Clone)]
pub(crate) struct Listener {
    pub(crate) heard: Arc<Mutex<Vec<String>>>,
    pub(crate) panics_over: &'static str,
    pub(crate) is_canceled: bool,
    /// Where nodes keep what they need to resume.
    pub(crate) work_dir: String,
}

impl Listener {
    fn hear(&self, service: &str, text: String) {
        assert!(self.panics_over != service, "over {service}");
        self.heard.lock().unwrap().push(format!("{service} {text}"));
    }
}

impl HostContext for Listener {
    fn is_canceled(&self) -> bool {
        assert!(self.panics_over != "is_canceled", "over is_canceled");
        self.is_canceled
    }
    fn progress(&self, progress: Progress) {
        let Progress {
            done,
            total,
            stage,
            text,
        } = progress;
        self.hear("progress", format!("{stage} {done}/{total} {text}"));
    }
    fn preview(
        &self,
        Preview {
            picture,
            series,
            label,
        }: Preview,
    ) {
        self.hear(
            "preview",
            format!("{series}, {label}: {:?}", picture.shape()),
        );
    }
    fn metric(&self, series: &str, x: f64, y: f64) {
        self.hear("metric", format!("{series} {x} {y}"));
    }
    fn log(&self, level: u32, text: &str) {
        self.hear("log", format!("{level} {text}"));
    }
    fn saved(&self, path: &str) {
        self.hear("saved", path.to_owned());
    }
    fn run_info(&self) -> RunInfo {
        assert!(self.panics_over != "run_info", "over run_info");
        RunInfo {
            node_id: "1".into(),
            work_dir: self.work_dir.as_str().into(),
            ..RunInfo::default()
        }
    }
    fn extension(&self, id: &str) -> Option<Box<dyn Extension>> {
        assert!(self.panics_over != "extension", "over extension");
        (id == "test.double/1").then(|| -> Box<dyn Extension> {
            Box::new(|request: Vec<Value>| Ok([request.clone(), request].concat()))
        })
    }
}

pub(crate) fn run(
    node: &mut LoadedNode,
    inputs: &[(&str, &Value)],
    parameters: &str,
) -> Result<Vec<Value>, NodeError> {
    run_with(node, inputs, parameters, Listener::default())
}

pub(crate) fn run_with(
    node: &mut LoadedNode,
    inputs: &[(&str, &Value)],
    parameters: &str,
    host: Listener,
) -> Result<Vec<Value>, NodeError> {
    let inputs = inputs
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).clone()));
    node.run(inputs, parameters, host)
}

fn picture(n: usize) -> (Value, u64) {
    let values: Vec<f32> = (0..n * 12).map(|i| i as f32 / 100.0).collect();
    let tensor = SharedTensor::from_vec(values, &[n, 2, 2, 3]).unwrap();
    let address = tensor.data_address();
    (Value::Tensor(tensor), address)
}

#[test]
fn the_description_can_be_read_without_a_node() {
    for plugin in both() {
        let described = plugin.describe().unwrap();
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
                "Relay",
                "Number",
                "Counted",
                "Hungry",
                "Fail",
                "Lie",
                "Scribble",
                "Panic",
                "PanicAnywhere",
                "Hazard"
            ]
        );
    }
}

#[test]
fn a_tensor_passes_through_nodes_of_both_doors_in_the_very_same_memory() {
    let (value, address) = picture(1000);
    let mut last = value;
    for plugin in both().into_iter().chain(both()) {
        let mut node = plugin.create("Passthrough").unwrap();
        last = run(&mut node, &[("images", &last)], "{}")
            .unwrap()
            .remove(0);
    }
    // The last handle keeps the memory alive, and it is what it was.
    let Value::Tensor(tensor) = last else {
        panic!("no tensor")
    };
    assert_eq!(tensor.data_address(), address);
    let expected: Vec<f32> = (0..12_000).map(|i| i as f32 / 100.0).collect();
    assert_eq!(tensor.as_slice::<f32>().unwrap(), expected);
}

#[test]
fn objects_live_as_long_as_somebody_holds_them() {
    let _guard = one_at_a_time();
    for plugin in both() {
        let create = |class: &str| plugin.create(class).unwrap();
        let alive = || -> usize {
            let outputs = run(&mut create("Counted"), &[], "{}").unwrap();
            let Value::Json(text) = &outputs[1] else {
                panic!("no number")
            };
            text.parse().unwrap()
        };
        let before = alive();
        let object = run(&mut create("Counted"), &[], r#"{"megabytes": 3}"#)
            .unwrap()
            .remove(0);
        let Value::Object(shared) = &object else {
            panic!("no object")
        };
        assert_eq!(shared.type_name(), "COUNTED");
        assert_eq!(shared.summary(), format!("one of {} objects", before + 1));
        assert_eq!(shared.memory()[0].bytes, 3 << 20);
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
}

/// A library of one's own: what is set in it disturbs no other test.
fn copied(folder: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = folder.path().join(name);
    std::fs::copy(support::faulty(), &path).unwrap();
    path
}

#[test]
fn two_copies_of_a_library_do_not_take_each_others_objects_for_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let other = doors::rust(&copied(&folder, "other.so"));
    let made = run(&mut other.create("Counted").unwrap(), &[], "{}").unwrap();
    let error = run(&mut create("Counted"), &[("other", &made[0])], "{}").unwrap_err();
    assert!(error.message.contains("another plugin or build"), "{error}");
}

#[test]
fn an_object_of_one_door_is_refused_at_the_other_in_a_sentence() {
    let _guard = one_at_a_time();
    let [rust, c] = both();
    for (from, to) in [(rust, c), (c, rust)] {
        let made = run(&mut from.create("Counted").unwrap(), &[], "{}").unwrap();
        let mut node = to.create("Counted").unwrap();
        let error = run(&mut node, &[("other", &made[0])], "{}").unwrap_err();
        assert_eq!(error.input, "other");
        let part = "by this one for a host that speaks another language to it: one of";
        assert!(error.message.contains(part), "{error}");
    }
}

#[test]
fn a_panic_is_an_error_and_the_process_lives_on() {
    for plugin in both() {
        let error = run(&mut plugin.create("Panic").unwrap(), &[], "{}").unwrap_err();
        assert_eq!(error.error_code(), ErrorCode::Panicked);
        assert!(error.message.contains("index 3 out of nothing"), "{error}");
        assert!(run(&mut plugin.create("Number").unwrap(), &[], "{}").is_ok());
    }
}

/// Everything that a plugin does, once; the first error.
fn everything(plugin: LoadedPlugin) -> Result<(), NodeError> {
    plugin.describe()?;
    let gone = || NodeError::new(ErrorCode::Internal, "no extension");
    let echo = |extension: Option<plugin_api::LoadedExtension>| {
        let answer = extension
            .ok_or_else(gone)?
            .call(vec![Value::Json("7".into())])?;
        assert!(matches!(answer.as_slice(), [Value::Json(text)] if *text == "7"));
        Ok::<_, NodeError>(())
    };
    echo(plugin.extension("faulty-plugin.echo/1"))?;
    let mut node = plugin.create("PanicAnywhere")?;
    echo(node.extension("faulty-plugin.echo/1"))?;
    node.validate("{}")?;
    assert_eq!(node.fingerprint("{}")?, "print");
    let mut outputs = run(&mut node, &[], "{}")?;
    let Some(Value::Tensor(tensor)) = outputs.pop() else {
        panic!("no tensor")
    };
    let Some(Value::Object(object)) = outputs.pop() else {
        panic!("no object")
    };
    let summary = object.summary();
    if summary != "a bomb" {
        return Err(NodeError::new(ErrorCode::Panicked, summary));
    }
    if object.memory().is_empty() {
        return Err(NodeError::new(ErrorCode::Panicked, "in memory"));
    }
    tensor.wait_on(1)?;
    tensor.host_sync()?;
    let copied = tensor.to_device(DeviceId { kind: 12, index: 0 });
    let refused = copied.unwrap_err();
    if refused.to_string().contains("panicked") {
        return Err(refused.into());
    }
    tensor
        .release_after(1)
        .map_err(|not_released| NodeError::from(not_released.reason))?;
    Ok(())
}

#[test]
fn a_panic_anywhere_is_an_error_and_the_process_lives_on() {
    let folder = tempfile::tempdir().unwrap();
    for (name, is_c) in [("rust.so", false), ("c.so", true)] {
        let path = copied(&folder, name);
        let plugin = if is_c {
            doors::c(&path)
        } else {
            doors::rust(&path)
        };
        let set = |place: &str| {
            let set = plugin.extension("faulty-plugin.panic-in/1").unwrap();
            set.call(vec![Value::Json(format!("{place:?}").into())])
                .unwrap();
        };
        everything(plugin).unwrap();
        for place in [
            "describe",
            "create",
            "validate",
            "fingerprint",
            "run",
            "summary",
            "memory",
            "wait_on",
            "host_sync",
            "copy_to",
            "release_after",
            "call",
        ] {
            // Tensors of C are ready when they arrive, and it has no streams.
            if is_c && ["wait_on", "copy_to", "release_after"].contains(&place) {
                continue;
            }
            set(place);
            let error = everything(plugin).unwrap_err();
            assert!(
                error.message.contains(&format!("in {place}")),
                "{place}: {error}"
            );
        }
        for place in ["extension", "extension of the node"] {
            // One that was asked for is there for ever.
            if is_c && place == "extension" {
                continue;
            }
            set(place);
            let error = everything(plugin).unwrap_err();
            assert_eq!(error.message, "no extension", "{place}");
        }
        for place in [
            "drop of the node",
            "drop of the object",
            "drop of the owner",
        ] {
            set(place);
            // Nobody can be told.
            everything(plugin).unwrap();
        }
        set("nowhere");
        everything(plugin).unwrap();
    }
}

#[test]
fn a_panic_of_the_host_ends_the_run_with_the_hosts_fault() {
    let run = |plugin: LoadedPlugin, panics_over| {
        let work_dir = tempfile::tempdir().unwrap();
        let host = Listener {
            panics_over,
            work_dir: work_dir.path().to_str().unwrap().to_owned(),
            ..Listener::default()
        };
        let heard = host.heard.clone();
        let result = run_with(
            &mut plugin.create("Slow").unwrap(),
            &[],
            r#"{"steps": 3}"#,
            host,
        );
        let heard = heard.lock().unwrap().clone();
        result.map(|_| heard)
    };
    for plugin in both() {
        let heard = run(plugin, "").unwrap();
        for expected in [
            "metric loss 0 1",
            "progress counting 3/3 step 3/3  IoU 1.00",
            "preview counted, step 0: [16, 16, 3]",
        ] {
            assert!(heard.iter().any(|line| line == expected), "{heard:?}");
        }
        for service in ["is_canceled", "progress", "preview", "metric", "run_info"] {
            let error = run(plugin, service).unwrap_err();
            assert_eq!(error.error_code(), ErrorCode::Panicked, "{error}");
            let parts = [
                format!("{service} of the host panicked"),
                format!("over {service}"),
                "this is a fault of the host".to_owned(),
            ];
            assert!(
                parts.iter().all(|part| error.message.contains(part)),
                "{error}"
            );
        }
    }
}

#[test]
fn extensions_are_known_by_their_whole_id_alone() {
    for plugin in both() {
        assert!(plugin.extension(DEVICES).is_some());
        assert!(plugin.extension("faulty-plugin.echo/1").is_some());
        let node = plugin.create("PanicAnywhere").unwrap();
        assert!(node.extension("faulty-plugin.echo/1").is_some());
        for id in [
            "",
            "/",
            "devices",
            "devices/",
            "devices/2",
            "devices/1 ",
            "devices/11",
            " devices/1",
            "Devices/1",
            "devices/1/",
            "devices/1x",
            "faulty-plugin.echo/10",
        ] {
            assert!(plugin.extension(id).is_none(), "{id:?}");
            assert!(node.extension(id).is_none(), "{id:?}");
        }
        // Answers of all kinds come back.
        let (value, address) = picture(1);
        let echo = plugin.extension("faulty-plugin.echo/1").unwrap();
        let answer = echo.call(vec![value, Value::Json("[1]".into())]).unwrap();
        let [Value::Tensor(tensor), Value::Json(text)] = answer.as_slice() else {
            panic!("{answer:?}")
        };
        assert_eq!((tensor.data_address(), text.as_str()), (address, "[1]"));
        // A node outlives itself in its extensions.
        let echo = node.extension("faulty-plugin.echo/1").unwrap();
        drop(node);
        assert_eq!(echo.call(Vec::new()).unwrap().len(), 0);
    }
}

#[test]
fn wrong_calls_are_errors() {
    for plugin in both() {
        let create = |class: &str| plugin.create(class).unwrap();
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
        let error = run(&mut create("Number"), &[], r#"{"value": -1}"#).unwrap_err();
        assert_eq!(error.input, "value");
        let error = plugin.create("Nonsense").unwrap_err();
        assert_eq!(
            error.message,
            "faulty-plugin has no node of the class Nonsense"
        );
    }
}

#[test]
fn a_node_that_was_run_holds_none_of_its_inputs() {
    let (value, _) = picture(1);
    let inputs = BTreeMap::from([("images".to_owned(), value.clone())]);
    let mut node = create("Passthrough");
    drop(node.run(inputs, "{}", Listener::default()).unwrap());
    let Value::Tensor(mut tensor) = value else {
        panic!("no tensor")
    };
    assert!(tensor.is_writable(), "nobody else holds it any more");
}
