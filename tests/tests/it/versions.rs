//! Plugins and hosts of different versions of the contract. Those of version 1.0 are built against what was frozen of it, others
//! against what has more (the crate `contracts`, and in C what stands behind the last of 1.0).

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use abi_stable::library::{LibraryError, lib_header_from_path};
use abi_stable::std_types::{
    RArc, RBox, RErr, RNone, ROk, ROption, RResult, RStr, RString, RVec, Tuple2,
};
use abi_stable::type_level::downcasting::TD_Opaque;
use contracts::{appended, v1_0};
use plugin_api::{SharedTensor, Value};
use serde_json::json;

use crate::contract::{Listener, run_with};
use crate::doors;
use crate::languages::compiled;
use crate::support::{Place, conceptloom, example, faulty, node, repository};

const SHAPE: [usize; 4] = [1, 2, 2, 3];

#[test]
fn plugins_of_1_0_and_those_with_more_run_in_this_host() {
    for (file, name) in [
        ("plugin_of_1_0", "plugin-of-1.0"),
        ("plugin_that_appends", "plugin-that-appends"),
    ] {
        let path = example(file);
        let plugin = doors::rust(&path);
        assert_eq!(plugin.describe().unwrap().name, name);
        assert!(plugin.extension("devices/1").is_none());
        assert!(
            plugin
                .create("Other")
                .unwrap_err()
                .message
                .contains("Other")
        );
        let tensor = SharedTensor::from_vec(vec![0.5f32; 12], &SHAPE).unwrap();
        let address = tensor.data_address();
        let mut same = plugin.create("Same").unwrap();
        same.validate("{}").unwrap();
        let host = Listener::default();
        let given = Value::Tensor(tensor);
        let outputs = run_with(&mut same, &[("images", &given)], "{}", host.clone()).unwrap();
        assert!(matches!(&outputs[..], [Value::Tensor(same)] if same.data_address() == address));
        assert_eq!(*host.heard.lock().unwrap(), ["metric runs 0 1"], "{name}");
        // The whole program too.
        let workflow = json!({
            "1": node("LoadImage", json!({"image": "demo:man-and-cat.png"})),
            "2": node("Same", json!({"images": ["1", 0]})),
            "3": node("SaveImage", json!({"images": ["2", 0]})),
        });
        let place = Place::with_faulty();
        place
            .run(&workflow, &["--plugin", path.to_str().unwrap()])
            .succeeded();
    }
}

#[test]
fn a_plugin_whose_types_are_laid_out_in_another_way_is_refused_in_one_sentence() {
    let place = Place::with_faulty();
    let path = example("plugin_of_another_layout");
    place.host(&["nodes", "--plugin", path.to_str().unwrap()]).failed_with(&[
        "plugin_of_another_layout",
        "its types are laid out differently from this host's; build both from the same version of plugin-api",
    ]);
}

/// A host's services; keeps names of curves.
#[derive(Clone, Default)]
struct Services(Arc<Mutex<Vec<String>>>);

impl v1_0::HostObject for Services {
    fn is_canceled(&self) -> bool {
        false
    }
    fn progress(&self, _: v1_0::Progress) {}
    fn preview(&self, _: v1_0::Preview) {}
    fn metric(&self, series: RString, _: f64, _: f64) {
        self.0.lock().unwrap().push(series.into());
    }
    fn log(&self, _: u32, _: RString) {}
    fn saved(&self, _: RString) {}
    fn run_info(&self) -> v1_0::RunInfo {
        let text = |text: &str| text.into();
        v1_0::RunInfo {
            node_id: text("1"),
            output_dir: text("."),
            work_dir: text(""),
        }
    }
    fn extension(&self, _: RStr<'_>) -> ROption<v1_0::ExtensionBox> {
        RNone
    }
}

/// Keeps the values of a tensor; says when it is gone.
struct Owner {
    values: Vec<f32>,
    is_gone: Arc<Mutex<bool>>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        *self.is_gone.lock().unwrap() = true;
    }
}

impl v1_0::TensorOwnerObject for Owner {
    fn wait_on(&self, _: u64) -> RResult<(), v1_0::NodeError> {
        ROk(())
    }
    fn host_sync(&self) -> RResult<(), v1_0::NodeError> {
        ROk(())
    }
    fn release_after(&self, _: u64) -> RResult<(), v1_0::NodeError> {
        ROk(())
    }
    fn copy_to(&self, _: v1_0::DeviceId) -> RResult<v1_0::SharedTensor, v1_0::NodeError> {
        let (message, input) = ("there is no other device".into(), RString::new());
        RErr(v1_0::NodeError {
            code: 1,
            message,
            input,
        })
    }
}

fn tensor(is_gone: &Arc<Mutex<bool>>) -> v1_0::SharedTensor {
    let (mut shape, mut strides) = ([0; 8], [0; 8]);
    shape[..4].copy_from_slice(&SHAPE);
    strides[..4].copy_from_slice(&[12, 6, 3, 1]);
    let is_gone = is_gone.clone();
    let owner = Owner {
        values: vec![0.5; 12],
        is_gone,
    };
    v1_0::SharedTensor {
        address: owner.values.as_ptr() as u64,
        byte_offset: 0,
        allocation_bytes: 48,
        device: v1_0::DeviceId { kind: 1, index: 0 },
        data_type: v1_0::DataType {
            code: 2,
            bits: 32,
            lanes: 1,
        },
        n_dims: 4,
        flags: 0,
        shape,
        strides,
        owner: RArc::new(v1_0::TensorOwnerObject_TO::from_value(owner, TD_Opaque)),
    }
}

/// The root module of a library as a host of 1.0 sees it.
fn module(path: &Path) -> v1_0::PluginModule_Ref {
    let header = lib_header_from_path(path).unwrap();
    header.init_root_module().unwrap()
}

fn request(images: v1_0::SharedTensor) -> v1_0::RunRequest {
    let images = v1_0::Value::Tensor(images);
    v1_0::RunRequest {
        inputs: RVec::from(vec![Tuple2("images".into(), images)]),
        parameters: "{}".into(),
    }
}

/// What the outputs of `Passthrough` are, and what it told the host.
fn is_passed_through(
    run: impl FnOnce(v1_0::RunRequest, v1_0::HostBox) -> RResult<RVec<v1_0::Value>, v1_0::NodeError>,
) {
    let (services, is_gone) = (Services::default(), Arc::new(Mutex::new(false)));
    let host = v1_0::HostObject_TO::from_ptr(RArc::new(services.clone()), TD_Opaque);
    let given = tensor(&is_gone);
    let address = given.address;
    let outputs = run(request(given), host).into_result().unwrap();
    let [v1_0::Value::Tensor(passed)] = outputs.as_slice() else {
        panic!("{} outputs", outputs.len())
    };
    assert_eq!(
        (passed.address, passed.shape),
        (address, tensor(&is_gone).shape)
    );
    *is_gone.lock().unwrap() = false;
    assert_eq!(*services.0.lock().unwrap(), ["address", "address"]);
    drop(outputs);
    assert!(*is_gone.lock().unwrap(), "what came back kept it");
}

#[test]
fn this_plugin_runs_in_a_host_of_1_0() {
    let ours = module(&conceptloom());
    let description = ours.describe()().into_result().unwrap();
    assert!(description.contains("\"EmLoop\""));
    let crf: v1_0::NodeBox = ours.create_node()("DenseCrfRefine".into())
        .into_result()
        .unwrap();
    crf.validate("{}".into()).into_result().unwrap();
    let error = crf
        .validate(r#"{"iterations": -1}"#.into())
        .into_result()
        .unwrap_err();
    assert_eq!((error.code, error.input.as_str()), (1, "iterations"));
    assert!(ours.extension()("devices/1".into()).is_some());

    let module = module(&faulty());
    let mut node = module.create_node()("Passthrough".into())
        .into_result()
        .unwrap();
    is_passed_through(|request, host| node.run(request, host));
    let mut panics: v1_0::NodeObject_TO<RBox<()>> =
        module.create_node()("Panic".into()).into_result().unwrap();
    let host = v1_0::HostObject_TO::from_ptr(RArc::new(Services::default()), TD_Opaque);
    let request = request(tensor(&Arc::default()));
    assert_eq!(
        panics.run(request, host).into_result().err().unwrap().code,
        6
    );
}

#[test]
fn a_host_that_knows_more_functions_refuses_this_plugin() {
    let header = lib_header_from_path(&faulty()).unwrap();
    let refused = header.init_root_module::<appended::PluginModule_Ref>();
    assert!(matches!(refused, Err(LibraryError::AbiInstability(_))));
}

/// The header as it was frozen.
fn header_of_1_0() -> PathBuf {
    repository().join("tests/contracts/node_plugin-1.0.h")
}

#[test]
fn plugins_in_c_of_1_0_and_later_run_in_this_host() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [&["-shared"][..], &["-shared", "-DLATER=1"]] {
        let library = folder.path().join(format!("lib{}.so", arguments.len()));
        if !compiled("threshold.c", &header_of_1_0(), arguments, &library) {
            return;
        }
        let mut threshold = doors::c(&library).create("Threshold").unwrap();
        let masks = SharedTensor::from_vec(vec![0.2f32, 0.7, 0.6, 0.1], &[1, 2, 2]).unwrap();
        let given = Value::Tensor(masks);
        let outputs = run_with(
            &mut threshold,
            &[("masks", &given)],
            "{}",
            Listener::default(),
        );
        assert!(matches!(&outputs.unwrap()[1], Value::Json(count) if count == "2"));
        let place = Place::with_faulty();
        let path = library.to_str().unwrap();
        let listed = place.host(&["nodes", "--plugin", path]).succeeded();
        assert!(listed.stdout.contains("Threshold"), "{}", listed.stdout);
    }
}

#[test]
fn this_plugin_runs_in_hosts_in_c_of_1_0_and_later() {
    let folder = tempfile::tempdir().unwrap();
    for (minor, arguments) in [(0, &["-ldl"][..]), (1, &["-ldl", "-DLATER=1"])] {
        let host = folder.path().join(format!("host-{minor}"));
        if !compiled("host.c", &header_of_1_0(), arguments, &host) {
            return;
        }
        let done = Command::new(&host)
            .arg(faulty())
            .args(["Passthrough", "images"])
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{told}");
        let said = String::from_utf8_lossy(&done.stdout);
        assert_eq!(
            said.trim(),
            format!(
                "faulty-plugin 1.0 ran in a host 1.{minor}: the same memory, the same values, 1 of 1 tensors freed, \
                 2 calls"
            )
        );
        let refused = Command::new(&host)
            .arg(faulty())
            .args(["Nothing", "images"])
            .output()
            .unwrap();
        assert!(
            String::from_utf8_lossy(&refused.stderr).contains("has no node of the class Nothing")
        );
    }
}
