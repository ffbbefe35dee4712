use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde_json::json;

use super::*;
use crate::run_folder::{Destination, RunFolder};
use crate::validate::validate;

/// Remembers what happened, as `id event`.
#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Observer for Log {
    fn on_event(&self, node: &NodeLabel, event: &Event<'_>) {
        let event = match event {
            Event::Started { .. } => "started",
            Event::Cached { .. } => "cached",
            Event::Finished { .. } => "finished",
            Event::Saved { .. } => "saved",
            Event::Preview { .. } => "preview",
            Event::Progress(_) | Event::Metric { .. } | Event::Log { .. } => return,
        };
        self.0.lock().push(format!("{} {event}", node.id));
    }
}

fn run_once(
    document: &Json,
    cache: &mut Cache,
    cancel: bool,
) -> (Result<(), RunError>, Vec<String>) {
    let graph = Graph::from_api(document.as_object().unwrap()).unwrap();
    let catalog = Catalog::builtin_only();
    let plan = validate(&graph, &catalog).unwrap();
    let root = tempfile::tempdir().unwrap();
    let folder = RunFolder::create(&Destination::Exactly(root.path().join("out"))).unwrap();
    let log = Arc::new(Log::default());
    let job = Job {
        graph: &graph,
        plan: &plan,
        catalog: &catalog,
        output_dir: folder.path(),
        work_dirs: &folder.work_dirs(),
        workflow: String::new(),
        prompt: String::new(),
        cancel: Arc::new(AtomicBool::new(cancel)),
        observer: log.clone(),
    };
    let result = run(&job, cache);
    (result, log.0.lock().clone())
}

fn demo(prefix: &str) -> Json {
    json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": prefix}},
    })
}

#[test]
fn unchanged_nodes_come_from_the_cache_and_output_nodes_run_again() {
    let mut cache = Cache::new(1 << 30);
    let (result, log) = run_once(&demo("a"), &mut cache, false);
    assert!(result.is_ok());
    assert_eq!(
        log,
        [
            "1 started",
            "1 finished",
            "2 started",
            "2 saved",
            "2 finished"
        ]
    );
    let (_, log) = run_once(&demo("a"), &mut cache, false);
    assert_eq!(log, ["1 cached", "2 started", "2 saved", "2 finished"]);
    let other = json!({
        "1": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat-mask-man.png"}},
        "2": {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}},
    });
    let (_, log) = run_once(&other, &mut cache, false);
    assert_eq!(
        log,
        [
            "1 started",
            "1 finished",
            "2 started",
            "2 preview",
            "2 finished"
        ]
    );
}

#[test]
fn a_canceled_run_starts_nothing() {
    let (result, log) = run_once(&demo("a"), &mut Cache::new(0), true);
    assert!(matches!(
        result,
        Err(RunError::Canceled {
            resumable: false,
            ..
        })
    ));
    assert_eq!(log, [] as [&str; 0]);
}

#[test]
fn errors_name_node_and_input() {
    let document = json!({
        "1": {"class_type": "LoadImageMask", "inputs": {"image": "demo:man-and-cat-mask-man.png"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": "demo:man-and-cat.png"}},
        "3": {"class_type": "MaskToImage", "inputs": {"mask": ["1", 0]}},
        "4": {"class_type": "ImageBatch", "inputs": {"image1": ["2", 0], "image2": ["3", 0]}},
        "5": {"class_type": "PreviewImage", "inputs": {"images": ["4", 0]}},
    });
    let (result, _) = run_once(&document, &mut Cache::new(0), false);
    assert!(result.is_ok(), "both are of one size");
    let error = RunError::Node {
        node: NodeLabel {
            id: "4".to_owned(),
            class: "ImageBatch".to_owned(),
            title: String::new(),
        },
        error: Box::new(NodeError::invalid_input("image2", "it is too small")),
    };
    assert_eq!(
        error.to_string(),
        "node 4 (ImageBatch), input image2: it is too small"
    );
}

#[test]
fn values_are_freed_when_nobody_waits_for_them() {
    let graph = Graph::from_api(demo("a").as_object().unwrap()).unwrap();
    let catalog = Catalog::builtin_only();
    let plan = validate(&graph, &catalog).unwrap();
    let root = tempfile::tempdir().unwrap();
    let folder = RunFolder::create(&Destination::Exactly(root.path().join("out"))).unwrap();
    let job = Job {
        graph: &graph,
        plan: &plan,
        catalog: &catalog,
        output_dir: folder.path(),
        work_dirs: &folder.work_dirs(),
        workflow: String::new(),
        prompt: String::new(),
        cancel: Arc::new(AtomicBool::new(false)),
        observer: Arc::new(Log::default()),
    };
    let mut worker = Worker::new(&job);
    assert_eq!(worker.waiting, BTreeMap::from([(NodeId::new("1"), 1)]));
    worker
        .values
        .insert(NodeId::new("1"), vec![Value::Json("0".into())]);
    worker.values.insert(NodeId::new("2"), Vec::new());
    worker.release(&NodeId::new("2"), &graph.nodes[&NodeId::new("2")]);
    assert!(worker.values.is_empty());
}
